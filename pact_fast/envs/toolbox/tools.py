"""The tools themselves. Standard library only: a worker process runs this file's source, without the package.

`call(world, name, arguments)` answers one call. A world is {"person"|"place"|"company": {name: {field:
text}}}. Every value is text, and every value of a response stands in double quotes; an error starts with
"Error:".
"""

from datetime import date

LOOKUPS = ("person", "place", "company")
# field -> kind of entity it names (None: plain text). A field belongs to one kind only, so the word decides
# the tool.
RELATIONS = {
    "person": {"friend": "person", "boss": "person", "home": "place", "employer": "company"},
    "place": {"mayor": "person", "neighbor": "place", "market": "company"},
    "company": {"founder": "person", "seat": "place", "rival": "company"},
}
ATTRIBUTES = {"person": ("age", "job", "born"), "place": ("size",), "company": ("staff", "opened")}
WEATHER = ("sunny", "rainy", "windy", "cloudy")
UNITS = {("km", "mi"): 0.621371, ("mi", "km"): 1.609344, ("kg", "lb"): 2.204623, ("lb", "kg"): 0.453592}

PARAMETERS = {
    "person": ("name", "field"),
    "place": ("name", "field"),
    "company": ("name", "field"),
    "search": ("field", "value"),
    "weather": ("place",),
    "news": ("topic",),
    "convert": ("value", "unit", "to"),
    "calculator": ("a", "op", "b"),
    "days_between": ("start", "end"),
}


class ToolError(Exception):
    """What the caller did wrong, said so that the next call can be right."""


def call(world, name, arguments):
    """(kind, text): kind is "ok", "unknown_tool", "bad_arguments" or "tool_error"."""
    if name not in PARAMETERS:
        return "unknown_tool", f'Error: no tool "{_short(name)}". Tools: {", ".join(PARAMETERS)}.'
    expected = PARAMETERS[name]
    if not isinstance(arguments, dict):
        return "bad_arguments", f"Error: {name} needs a JSON object with {', '.join(expected)}."
    for key in arguments:
        if key not in expected:
            return "bad_arguments", f'Error: {name} takes {", ".join(expected)}, not "{_short(key)}".'
    for key in expected:
        if key not in arguments:
            return "bad_arguments", f"Error: {name} needs {', '.join(expected)}; {key} is missing."
        if isinstance(arguments[key], bool) or not isinstance(arguments[key], (str, int, float)):
            return "bad_arguments", f"Error: {key} of {name} must be text."
    try:
        return "ok", TOOLS[name](world, *(str(arguments[key]) for key in expected))
    except ToolError as error:
        return "tool_error", f"Error: {error}"


def lookup(kind):
    def run(world, name, field):
        table = world[kind]
        if name not in table:
            actual = next((k for k in LOOKUPS if name in world[k]), None)
            if actual:
                raise ToolError(f'"{name}" is a {actual}; {kind} knows only its own kind. Use {actual}.')
            raise ToolError(f'no {kind} "{_short(name)}". Give a name of a {kind}.')
        if field not in table[name]:
            raise ToolError(f'{kind} has {", ".join(table[name])}; not "{_short(field)}".')
        return f'"{table[name][field]}"'

    return run


def search(world, field, value):
    known = [f for kind in LOOKUPS for f in next(iter(world[kind].values()))]
    if field not in known:
        raise ToolError(f'no field "{_short(field)}" to search.')
    hits = [name for kind in LOOKUPS for name, facts in world[kind].items() if facts.get(field) == value]
    shown = ", ".join(f'"{name}"' for name in hits[:4])
    more = f" and {len(hits) - 4} more" if len(hits) > 4 else ""
    return shown + more if hits else "no hits"


def weather(world, place):
    if place not in world["place"]:
        raise ToolError(f'no place "{_short(place)}". Give a name of a place.')
    return f'"{WEATHER[list(world["place"]).index(place) % len(WEATHER)]}"'


def news(world, topic):
    return f'no news on "{_short(topic)}"'


def convert(world, value, unit, to):
    if (unit, to) not in UNITS:
        raise ToolError(f'cannot convert "{_short(unit)}" to "{_short(to)}"; units: km, mi, kg, lb.')
    return f'"{_plain(_number(value) * UNITS[unit, to])}"'


def calculator(world, a, op, b):
    if op not in ("+", "-", "*", "/"):
        raise ToolError(f'op must be +, -, * or /, not "{_short(op)}".')
    x, y = _number(a), _number(b)
    if op == "/" and y == 0:
        raise ToolError("division by zero.")
    return f'"{_plain({"+": x + y, "-": x - y, "*": x * y}[op] if op != "/" else x / y)}"'


def days_between(world, start, end):
    return f'"{abs((_date(end) - _date(start)).days)}"'


def _number(text):
    try:
        number = float(text)
    except ValueError:
        raise ToolError(f'"{_short(text)}" is not a number.') from None
    if not abs(number) < 1e12:
        raise ToolError(f'"{_short(text)}" is too large.')
    return number


def _date(text):
    try:
        return date.fromisoformat(text)
    except ValueError:
        raise ToolError(f'"{_short(text)}" is not a date like 1990-04-21.') from None


def _plain(number):
    return f"{round(number, 1):.1f}".removesuffix(".0")


def _short(text):
    text = str(text)
    return text if len(text) <= 16 else text[:16] + "..."


TOOLS = {kind: lookup(kind) for kind in LOOKUPS} | {
    "search": search,
    "weather": weather,
    "news": news,
    "convert": convert,
    "calculator": calculator,
    "days_between": days_between,
}

WORLD: dict = {}  # set by the worker that runs this file


def call_here(name, arguments):
    return call(WORLD, name, arguments)
