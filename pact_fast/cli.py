"""The command line: `pact-fast COMMAND ...`; every command is a module of `pact_fast.commands`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence

from pact_fast.config import ConfigError
from pact_fast.version import __version__

COMMANDS = {  # module pact_fast.commands.NAME with `main(argv) -> exit status`: what it does
    "train": "train a policy (--help lists every key)",
    "eval": "score a model on an environment",
    "compare": "run presets x seeds x settings: one table, one plot",
    "report": "write report.html of a run folder",
    "export": "a run's weights as a plain Hugging Face folder",
    "serve": "sample for trainers elsewhere, over HTTP",
    "doctor": "what this machine has, and what each lack costs",
    "bench": "microbenchmarks of the ops beside their peers",
    "data": "check and show records of a data file",
    "traces": "make expert traces with a teacher, cut their reasoning into segments",
}


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(usage())
        return 0
    if words[0] == "--version":
        print(__version__)
        return 0
    command, rest = words[0], words[1:]
    if command not in COMMANDS:
        print(f"error: unknown command {command!r}; there are {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    return _guarded(command_main(command), rest)


def command_main(name: str) -> Callable[[list[str]], int]:
    """`main` of a command; imported only when it is called, for torch and transformers take seconds."""
    return importlib.import_module(f"pact_fast.commands.{name}").main


def usage() -> str:
    lines = ["pact-fast COMMAND ...", ""]
    lines += [f"  {name:<15} {text}" for name, text in COMMANDS.items()]
    return "\n".join([*lines, "", "pact-fast COMMAND --help tells more."])


def _guarded(run: Callable[[list[str]], int], words: list[str]) -> int:
    """Errors of the user's making are one line and exit status 2; anything else keeps its traceback."""
    try:
        return run(words)
    except (ConfigError, ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
