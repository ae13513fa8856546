"""The sub-commands: `python -m bench COMMAND ...`, the same as `pact-fast bench COMMAND ...`."""

import importlib
import sys
from collections.abc import Sequence

COMMANDS = {  # module bench.NAME with `main(argv) -> exit status`: what it does
    "ops": "the ops beside their peers: times, memory, targets (what runs without a sub-command)",
    "tree": "token trees beside one-by-one packing: attention, training step, scoring, packer",
    "tiles": "tile shapes of the Triton tree attention, timed in one run",
    "step": "a training step of the default config on the CPU: token tree against one by one",
    "sandbox": "tool calls a second, and what one costs",
    "rollout": "rollouts beside transformers: tokens/s, time to first token, share of the memory floor",
    "resources": "registers, spills and instructions of every Triton kernel, compiled without a GPU",
}


def main(argv: Sequence[str]) -> int:
    words = list(argv)
    if words and words[0] in ("-h", "--help"):
        print(usage())
        return 0
    if not words or words[0].startswith("-"):
        words = ["ops", *words]
    if words[0] not in COMMANDS:
        print(f"error: unknown sub-command {words[0]!r}; there are {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    return importlib.import_module(f"bench.{words[0]}").main(words[1:])


def usage() -> str:
    lines = ["pact-fast bench [COMMAND] ...", ""]
    lines += [f"  {name:<15} {text}" for name, text in COMMANDS.items()]
    lines += ["", "Rows are appended to bench/results/local.csv, which git ignores."]
    return "\n".join([*lines, "", "pact-fast bench COMMAND --help tells more."])
