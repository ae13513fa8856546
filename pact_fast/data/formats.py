"""What the chat formats write: tags, headers and bundled templates.

Two things vary on their own. `Headers` are the role markers of a model family (ChatML, Llama 3). `CallSyntax`
is how a tool call and a tool response look (Hermes tags, Llama-style JSON). A bundled template is used
where the model's own chat template knows no tools. Sources: the chat templates of Qwen3 (hermes) and Llama
3.1 (llama).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

THINK_OPEN, THINK_CLOSE = "<think>", "</think>"
CALL_OPEN, CALL_CLOSE = "<tool_call>", "</tool_call>"
RESPONSE_OPEN, RESPONSE_CLOSE = "<tool_response>", "</tool_response>"
TAGS = (THINK_OPEN, THINK_CLOSE, CALL_OPEN, CALL_CLOSE, RESPONSE_OPEN, RESPONSE_CLOSE)

DEFAULT_PRIVILEGED_TEMPLATE = """

Here is how an expert solved this task. Use it as reference material and write your own solution.

{trace}"""


@dataclass(frozen=True)
class Headers:
    """Role markers: `special` opens a turn (two of them enclose the role), `blank` ends the header, `end`
    the turn.

    `between` stands between the end of a turn and the next header.
    """

    special: tuple[str, ...]
    blank: str
    end: str
    between: str

    def open(self, role: str) -> list[str]:
        """The texts that open a turn of `role`; special tokens are items of their own."""
        if len(self.special) == 1:
            return [self.special[0], role + self.blank]
        return [self.special[0], role, self.special[1], self.blank]


CHATML = Headers(special=("<|im_start|>",), blank="\n", end="<|im_end|>", between="\n")
LLAMA3 = Headers(
    special=("<|start_header_id|>", "<|end_header_id|>"), blank="\n\n", end="<|eot_id|>", between=""
)


@dataclass(frozen=True)
class CallSyntax:
    """How calls are written: the key of the arguments, and tags round each call (and response) or bare
    JSON.
    """

    name: str
    arguments_key: str
    tagged: bool


HERMES = CallSyntax("hermes", "arguments", tagged=True)
LLAMA = CallSyntax("llama", "parameters", tagged=False)


def _template(name: str) -> str:
    return (Path(__file__).parent / "templates" / f"{name}.jinja").read_text(encoding="utf-8").rstrip("\n")


# (format name, headers) -> call syntax and bundled template
BUNDLED: dict[tuple[str, Headers], tuple[CallSyntax, str]] = {
    ("hermes", CHATML): (HERMES, _template("hermes")),
    ("compact", CHATML): (HERMES, _template("compact")),
    ("llama", CHATML): (LLAMA, _template("llama_chatml")),
    ("llama", LLAMA3): (LLAMA, _template("llama3")),
}
FORMAT_NAMES = ("auto", "hermes", "compact", "llama")


def headers_of(tokenizer: Any) -> Headers:
    """The role markers of a tokenizer. ValueError where it has those of no known family."""
    added = tokenizer.get_added_vocab()
    for headers in (CHATML, LLAMA3):
        if all(text in added for text in (*headers.special, headers.end)):
            return headers
    raise ValueError(
        f"{type(tokenizer).__name__} ({tokenizer.name_or_path}) has neither <|im_start|>/<|im_end|> nor "
        "<|start_header_id|>/<|eot_id|> as tokens: no chat format writes its turns"
    )


def own_template(tokenizer: Any) -> tuple[str | None, str | None]:
    """The tokenizer's own chat template and the syntax it writes calls in, or (None, None) where it knows
    no tools.
    """
    own = tokenizer.chat_template
    if isinstance(own, dict):
        own = own.get("tool_use") or own.get("default")
    if not own or "tools" not in own:
        return None, None
    if "<function=" in own:
        raise ValueError(
            "the model's own chat template writes calls as XML (<function=...>), which is not supported; "
            "drop tokenizer.chat_template to use the bundled hermes format"
        )
    if CALL_OPEN in own:
        return own, "hermes"
    if '"parameters"' in own or "<|python_tag|>" in own or "ipython" in own:
        return own, "llama"
    return None, None
