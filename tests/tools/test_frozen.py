"""Config keys, command line options and metric names are what frozen.txt lists: others' files depend on them.

A change of names is a deliberate one: `python tests/tools/test_frozen.py` writes the list anew.
"""

import contextlib
import dataclasses
import io
import re
import tomllib
from pathlib import Path

from bench import main as bench
from pact_fast import cli
from pact_fast.config import Config
from pact_fast.keys import markdown
from pact_fast.metrics import METRICS, PREFIXES

ROOT = Path(__file__).parent.parent.parent
LISTING = Path(__file__).with_name("frozen.txt")

PAGE = ROOT / "docs" / "config.md"
INTRODUCTION = """# Every configuration key

A config is a YAML file of these sections; `--section.key value` on the command line wins over it, it over its
preset (`pact_fast/objective/presets.py`), the preset over the defaults below. `pact-fast train --help` prints
the same list, `--dry-run` what a run's config comes to. [method.md](method.md) has the objective's equations.
This page is made from the keys themselves (`python tests/tools/test_frozen.py`).

"""
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]*")


def help_of(command, *words):
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        cli.command_main(command)([*words, "--help"])
    return out.getvalue()


def listing():
    lines = []
    for section in dataclasses.fields(Config):
        if section.default_factory is dataclasses.MISSING:
            lines.append(f"config {section.name}: {section.type}")
        else:
            fields = dataclasses.fields(section.default_factory)
            lines += [f"config {section.name}.{field.name}: {field.type}" for field in fields]
    for command in cli.COMMANDS:
        if command == "train":
            lines.append("command train --resume and every config key")
            continue
        for words in [(sub,) for sub in bench.COMMANDS] if command == "bench" else [()]:
            options = sorted(set(OPTION.findall(help_of(command, *words))) - {"--help"})
            lines.append(" ".join(["command", command, *words, *options]))
    lines += [f"metric {name} [{metric.unit}]" for name, metric in METRICS.items()]
    lines += [f"metric {prefix}* [{metric.unit}]" for prefix, metric in PREFIXES.items()]
    return lines


def test_names_are_the_listed_ones():
    listed, now = LISTING.read_text().splitlines(), listing()
    gone, new = sorted(set(listed) - set(now)), sorted(set(now) - set(listed))
    assert (gone, new) == ([], []), (
        f"gone or changed: {gone}; new: {new}. Others depend on these names: where the change is meant, "
        "write the list anew with `python tests/tools/test_frozen.py`"
    )


def test_the_floor_lane_installs_the_versions_that_the_package_states():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    stated = [*project["dependencies"], *project["optional-dependencies"]["lora"]]
    floors = dict(re.fullmatch(r"([\w-]+)>=([\d.]+)", word).groups() for word in stated)
    text = (ROOT / "constraints-floor.txt").read_text()
    installed = dict(re.findall(r"^([\w-]+)==([\d.]+)$", text, flags=re.MULTILINE))
    assert installed.keys() == floors.keys() - {"torch"}
    for name, version in installed.items():
        assert re.fullmatch(re.escape(floors[name]) + r"(\.0)*", version), f"{name} {version}"


def test_the_page_of_all_keys_is_what_the_keys_say():
    assert PAGE.read_text() == INTRODUCTION + markdown(Config), (
        "docs/config.md is not what the keys say: `python tests/tools/test_frozen.py` writes it anew"
    )


if __name__ == "__main__":
    LISTING.write_text("\n".join(listing()) + "\n")
    PAGE.write_text(INTRODUCTION + markdown(Config))
