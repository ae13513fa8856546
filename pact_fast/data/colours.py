"""How each component of a conversation looks, in terminals and pages alike: the one table of all commands."""

from __future__ import annotations

from typing import NamedTuple

from pact_fast.data.tokens import Component


class Look(NamedTuple):
    """terminal: a rich style. light, dark: (ink, paper) of pages, that the colour-blind can tell apart."""

    terminal: str
    light: tuple[str, str]
    dark: tuple[str, str]
    meaning: str


LOOKS = {
    Component.CONTEXT: Look(
        "dim",
        ("#5a6572", "transparent"),
        ("#9aa6b3", "transparent"),
        "prompt and template text, never a target",
    ),
    Component.REASONING: Look(
        "blue",
        ("#1e3a8a", "#dbeafe"),
        ("#dbeafe", "#1b3a61"),
        "supervised up to the level; | ends one; struck through: in no level",
    ),
    Component.STRUCTURE: Look(
        "bold magenta",
        ("#86198f", "#fae8ff"),
        ("#fae8ff", "#5b1a63"),
        "call tags and end of a calling turn, supervised like calls",
    ),
    Component.TOOL_CALL: Look(
        "bold green",
        ("#14532d", "#bbf7d0"),
        ("#dcfce7", "#1d4a2c"),
        "supervised, weight lambda",
    ),
    Component.TOOL_RESPONSE: Look(
        "yellow",
        ("#713f12", "#fef9c3"),
        ("#fef3c7", "#4a3f14"),
        "context only, never a target",
    ),
    Component.ANSWER: Look(
        "bold red",
        ("#7f1d1d", "#fee2e2"),
        ("#fee2e2", "#5f2323"),
        "supervised only where the config says so",
    ),
    Component.THINK_TAG: Look(
        "cyan",
        ("#155e75", "#cffafe"),
        ("#cffafe", "#134753"),
        "supervised only where the config says so",
    ),
}


def name_of(component: Component) -> str:
    """Its name in files and pages: "tool_call"."""
    return component.name.lower()


def css() -> str:
    """Rules for one class a component, light and dark."""
    light = "".join(_rule(c, look.light) for c, look in LOOKS.items())
    dark = "".join(_rule(c, look.dark) for c, look in LOOKS.items())
    return f"{light}\n@media (prefers-color-scheme: dark) {{ {dark} }}"


def _rule(component: Component, colours: tuple[str, str]) -> str:
    ink, paper = colours
    return f".{name_of(component)}{{color:{ink};background:{paper}}}"
