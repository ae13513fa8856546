"""pact-fast chat MODEL --env NAME: talk to a model with an environment's tools, a line a message.

/task N   the model does task N of the split, from its own prompt and with its own tools, and is scored
/tools    the tools of now, with their parameters
/new      forgets the conversation
/quit     ends (as does the end of the input)
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.text import Text

from pact_fast.commands.eval import LIMITS, OTHER_LIMITS, parse_setting
from pact_fast.data.chat import ChatFormat, Component, Tokens
from pact_fast.data.colours import LOOKS, name_of
from pact_fast.data.formats import FORMAT_NAMES
from pact_fast.data.records import Record, load_records
from pact_fast.envs.base import REGISTRY, ToolEnv, make_env
from pact_fast.evaluation.evaluate import turn_pieces
from pact_fast.rollout import Engine, RolloutLimits, local_engine, reply_tokens
from pact_fast.train.build import device_of, load_pretrained, set_threads


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pact-fast chat", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help='a Hugging Face folder or hub name, a run\'s folder, or "toolbox-base"')
    parser.add_argument("--env", default="toolbox", help=f"{', '.join(REGISTRY)}, or module:Class")
    parser.add_argument(
        "--setting", action="append", default=[], metavar="KEY=VALUE", help="a setting of the environment"
    )
    parser.add_argument("--split", default="test", choices=["train", "validation", "test"])
    parser.add_argument("--file", help="records in JSONL or parquet that replace the split")
    parser.add_argument("--task", type=int, default=0, help="whose tools and system prompt to begin with")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--max-turns", type=int, help="assistant turns a message (default: as eval's)")
    parser.add_argument("--max-turn-length", type=int, help="tokens a turn (default: as eval's)")
    parser.add_argument("--chat-format", default="auto", help=", ".join(FORMAT_NAMES))
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, help="CPU threads; default: one for a small model, else all")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def main(argv: Sequence[str]) -> int:
    args = build_parser().parse_args(list(argv))
    console = Console(highlight=False, soft_wrap=True)
    env = make_env(args.env, dict(parse_setting(s) for s in args.setting))
    try:
        records = (
            load_records(args.file, require_trace=False).records if args.file else env.records(args.split)
        )
        _check_task(args.task, len(records))
        console.print(f"loading {args.model}", style="dim", markup=False)
        model, tokenizer = load_pretrained(args.model, args.dtype)
        set_threads(args.threads, model)
        turns, _, length = LIMITS.get(args.env, OTHER_LIMITS)
        context = getattr(model.config, "max_position_embeddings", None) or sys.maxsize
        limits = RolloutLimits(args.max_turns or turns, context, args.max_turn_length or length, context)
        chat = ChatFormat.for_tokenizer(tokenizer, args.chat_format)
        engine = local_engine(model, device_of(args.device))
        talk = Conversation(engine, env, chat, limits, console, temperature=args.temperature, seed=args.seed)
        talk.begin(records[args.task])
        tools = ", ".join(tool["function"]["name"] for tool in talk.record.tools) or "none"
        console.print(f"{args.env}: {len(records)} tasks; tools: {tools}", style="dim", markup=False)
        console.print("/task N, /tools, /new, /quit", style="dim")
        for line in _lines(console):
            if line == "/quit":
                break
            try:
                _obey(line, talk, records)
            except KeyboardInterrupt:
                talk.undo()
                console.print("interrupted; the message and what followed are forgotten", style="dim")
    finally:
        env.close()
    return 0


def _obey(line: str, talk: Conversation, records: Sequence[Record]) -> None:
    """One line of the user: a command, or a message."""
    word, _, rest = line.partition(" ")
    if word == "/task":
        try:
            number = int(rest)
            _check_task(number, len(records))
        except ValueError:
            talk.note(f"/task takes a number from 0 to {len(records) - 1}, got {rest!r}")
            return
        talk.solve(records[number])
    elif word == "/tools":
        for tool in talk.record.tools:
            talk.show(Component.CONTEXT, json.dumps(tool["function"], ensure_ascii=False), "tool")
    elif word == "/new":
        talk.begin(talk.record)
    elif word.startswith("/"):
        talk.note(f"no command {word}; there are /task N, /tools, /new, /quit")
    else:
        talk.say(line)


def _check_task(number: int, count: int) -> None:
    if not 0 <= number < count:
        raise ValueError(f"--task {number}: the split has {count} tasks, numbered from 0")


def _lines(console: Console) -> Iterator[str]:
    """The user's lines, without blank ones: from the terminal with a prompt, or from a pipe."""
    asking = sys.stdin.isatty()
    while True:
        if asking:
            console.print("> ", style="bold", end="")
        try:
            line = sys.stdin.readline()
        except KeyboardInterrupt:
            line = ""
        if not line:
            return
        if line.strip():
            yield line.strip()


class Conversation:
    """What was said so far as token ids, and an episode whose tools answer the model's calls.

    The ids are kept as sampled; a message and a response are tokenised once, when they come.
    """

    def __init__(
        self,
        engine: Engine,
        env: ToolEnv,
        chat: ChatFormat,
        limits: RolloutLimits,
        console: Console,
        *,
        temperature: float,
        seed: int,
    ) -> None:
        self.engine, self.env, self.chat, self.limits, self.console = engine, env, chat, limits, console
        self.temperature, self.seed = temperature, seed
        self.ids: list[int] = []
        self._before = 0  # length of `ids` before the last message
        self._turn = 0

    def begin(self, record: Record) -> None:
        """A conversation with the tools and the system prompt of a record, and nothing said."""
        self.record, self.ids, self._before, self._turn = record, [], 0, 0
        (self.episode,) = self.env.start([record])
        self.record = self.episode.record
        self.engine.reset()

    def undo(self) -> None:
        """Forgets the last message and all that came of it; the tools do not."""
        del self.ids[self._before :]
        self.engine.reset()

    def say(self, text: str) -> None:
        """A message of the user and the model's answer; its calls are run, nothing is scored."""
        self._before = len(self.ids)
        if self.ids:
            self._add(self.chat.user(text, self._turn))
        else:
            system = [m for m in self.record.prompt if m["role"] == "system"]
            self._add(self.chat.prompt([*system, {"role": "user", "content": text}], self.record.tools))
        self._answer(scored=False)

    def solve(self, record: Record) -> None:
        """A task from its own prompt, scored as in an evaluation."""
        self.begin(record)
        for message in self.record.prompt:
            self.show(Component.CONTEXT, str(message["content"]), message["role"])
        self._add(self.chat.prompt(self.record.prompt, self.record.tools))
        cut = self._answer(scored=True)
        (outcome,) = self.env.finish([self.episode], [cut])
        said = "solved" if outcome.solved else f"not solved: {outcome.failure}"
        scores = "".join(f", {name} {value:.3f}" for name, value in outcome.scores.items())
        self.note(f"{said}; reward {outcome.reward:.3f}, calls {outcome.calls}{scores}")

    def _answer(self, *, scored: bool) -> str | None:
        """Turns of the model until one has no call (with `scored`: until the environment says so) -> how it
        was cut off, if it was."""
        for number in range(self.limits.max_turns):
            room = min(self.limits.max_turn_length, (self.limits.context_length or 0) - len(self.ids))
            if room <= 0:
                self.note(f"the context of {self.limits.context_length} tokens is full: /new begins anew")
                return "length_limit"
            (made,) = self.engine.generate(
                [self.ids],
                max_new_tokens=[room],
                temperature=self.temperature,
                stop_token_ids=self.chat.stop_token_ids,
                seed=self.seed + self._turn,
                sessions=[0],
            )
            self._turn += 1
            self.ids += made.token_ids
            whole = made.finish_reason == "stop"
            turn = self.chat.parse(made.token_ids, complete=whole)
            for component, text in turn_pieces(turn):
                self.show(component, text)
            if not whole:
                self.ids.append(self.chat.stop_token_ids[0])  # so that a message can follow
                self.note(f"cut off after {len(made.token_ids)} tokens (--max-turn-length)")
                return "length_limit"
            if not turn.tool_calls and not scored:
                return None
            (result,) = self.env.step([self.episode], [turn])
            for text in result.tool_responses:
                self.show(Component.TOOL_RESPONSE, text)
            if result.user_message is not None:
                self.show(Component.CONTEXT, result.user_message, "user")
            more = bool(result.tool_responses) or result.user_message is not None
            if not more or (scored and result.done):
                return None
            if number + 1 < self.limits.max_turns:  # else a message would follow an open turn
                self._add(reply_tokens(self.chat, turn, result, self._turn))
        self.note(f"cut off after {self.limits.max_turns} turns (--max-turns)")
        return "turn_limit"

    def _add(self, tokens: Tokens) -> None:
        self.ids += tokens.ids

    def show(self, component: Component, text: str, label: str | None = None) -> None:
        line = Text(f"{label or name_of(component)}: ", style="bold")
        self.console.print(line.append(text, style=f"not bold {LOOKS[component].terminal}"))

    def note(self, text: str) -> None:
        self.console.print(f"-- {text}", style="dim", markup=False)
