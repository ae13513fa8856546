"""The command line: `pact-fast COMMAND ...`; every command is a module of `pact_fast.commands`."""

from __future__ import annotations

import importlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

from pact_fast.config import ConfigError
from pact_fast.files import one_line
from pact_fast.version import __version__

COMMANDS = {  # module pact_fast.commands.NAME with `main(argv) -> exit status`: what it does
    "train": "train a policy (--help lists every key)",
    "eval": "score a model on an environment",
    "chat": "talk to a model with an environment's tools",
    "compare": "run presets x seeds x settings: one table, one plot",
    "report": "write report.html of a run folder, transcripts.html of an evaluation's",
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


class _Terminated(BaseException):
    """SIGTERM, raised where the program is, so that everything that is open is closed in order."""


def _guarded(run: Callable[[list[str]], int], words: list[str]) -> int:
    """Errors of the user's making are one line and exit status 2; anything else keeps its traceback.

    Ctrl-C and SIGTERM end a command with a line, too (130 and 143); `train` and `serve` have their own ways.
    """
    main_thread = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, _terminate) if main_thread else None
    try:
        return run(words)
    except BrokenPipeError:  # `pact-fast ... | head`: the reader has what it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ConfigError, ValueError, OSError) as error:
        told = one_line(error) if isinstance(error, OSError) else error
        print(f"error: {told}", file=sys.stderr)
        return 2
    except ImportError as error:
        if "pip install" not in str(error):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped by Ctrl-C; what was finished is saved, the same command goes on", file=sys.stderr)
        return 130
    except _Terminated:
        print("stopped by SIGTERM; what was finished is saved, the same command goes on", file=sys.stderr)
        return 143
    finally:
        if main_thread:  # a caller in the same process keeps its own way to stop
            signal.signal(signal.SIGTERM, before)


def _terminate(signum: int, frame: Any) -> None:
    raise _Terminated


if __name__ == "__main__":
    sys.exit(main())
