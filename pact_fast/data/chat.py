"""Conversations built as tokens, forward only: what was sampled is never decoded and tokenised again.

A conversation is prompt(...) and then, turn by turn, assistant(...) or sampled ids followed by
tool_results(...) or user(...); concatenating the pieces gives the sequence. Every token carries its
component from construction.

Text between two atomic tags (tags that are one added token of the tokenizer) is tokenised together, as the
model saw it in its own training, and a token belongs to the piece of text that it starts in. So the ids
equal the ids of the whole rendered conversation, and each token has exactly one component.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from pact_fast.data import formats
from pact_fast.data.formats import DEFAULT_PRIVILEGED_TEMPLATE, FORMAT_NAMES, CallSyntax, Headers
from pact_fast.data.parsing import SPELT, AssistantTurn, ToolCall, parse_turn
from pact_fast.data.reading import clean_text
from pact_fast.data.segments import level_ends, token_levels
from pact_fast.data.tokens import Component, Tokens

__all__ = ["AssistantTurn", "ChatFormat", "Component", "Tokens", "ToolCall"]

_MARK = "@@pact_fast:privileged@@"  # where privileged text goes in a rendered prompt


class _Piece(NamedTuple):
    text: str
    component: Component
    tag: bool = False  # one token of its own where the tokenizer has it as an added token
    ends: Sequence[int] = ()  # of the prefix levels, in reasoning


class ChatFormat:
    """Writes and reads conversations for one tokenizer; make it with `ChatFormat.for_tokenizer`.

    Attributes: tokenizer, name ("hermes", "compact" or "llama"), template (Jinja text that renders prompts),
    own_template (True where that is the model's own), levels, stop_token_ids.
    """

    def __init__(
        self,
        tokenizer: Any,
        name: str,
        headers: Headers,
        syntax: CallSyntax,
        template: str,
        *,
        own_template: bool = False,
        levels: int = 4,
        privileged_template: str = DEFAULT_PRIVILEGED_TEMPLATE,
    ):
        if levels < 1:
            raise ValueError(f"levels={levels}: need at least one level of reasoning")
        if "{trace}" not in privileged_template:
            raise ValueError(
                f"privileged_template={privileged_template!r}: lacks '{{trace}}', where the trace goes"
            )
        self.tokenizer, self.name, self.template, self.own_template = tokenizer, name, template, own_template
        self.levels, self.privileged_template = levels, privileged_template
        self._headers, self._syntax = headers, syntax
        self._encoding = threading.Lock()
        added = tokenizer.get_added_vocab()
        wanted = (*formats.TAGS, *headers.special, headers.end)
        self._atomic: dict[str, int] = {text: added[text] for text in wanted if text in added}
        control = _control_tokens(tokenizer, self._atomic)
        self._control, self._steering = _pattern(control), _pattern(control - set(formats.TAGS))
        self._tag_ids = {i: text for text, i in self._atomic.items() if text in formats.TAGS}
        extra_ends = (headers.end, "<|endoftext|>", "<|eom_id|>")
        stops = [added[text] for text in extra_ends if text in added]
        if tokenizer.eos_token_id is not None:
            stops.append(tokenizer.eos_token_id)
        self.stop_token_ids: tuple[int, ...] = tuple(dict.fromkeys(stops))
        if self.decode(self._encode_text("a\nb")[0]) != "a\nb":
            raise ValueError(
                f"tokenizer {type(tokenizer).__name__} changes text (adds or drops blanks), so turns cannot "
                "be tokenised one after the other; use a byte-level tokenizer"
            )

    @classmethod
    def for_tokenizer(
        cls,
        tokenizer: Any,
        name: str = "auto",
        *,
        levels: int = 4,
        privileged_template: str = DEFAULT_PRIVILEGED_TEMPLATE,
    ) -> ChatFormat:
        """The format of a Hugging Face fast tokenizer.

        name: "auto" reads it off the tokenizer's chat template, where that knows tools, else "hermes" for
        ChatML tokenizers and "llama" for Llama 3 ones. "hermes" | "llama" take the model's own template
        where it writes calls that way, else the bundled one. "compact" is hermes with a short tool list
        (bundled).
        levels: K, the prefix levels of a turn's reasoning. privileged_template: text with {trace} in it.
        Raises ValueError for an unknown name, a slow tokenizer, or role markers that no format knows.
        """
        if name not in FORMAT_NAMES:
            raise ValueError(f"chat format {name!r} is unknown; use one of {', '.join(FORMAT_NAMES)}")
        if not getattr(tokenizer, "is_fast", False):
            raise ValueError(
                f"{type(tokenizer).__name__} is not a fast tokenizer (tokenizer.json): offsets are needed"
            )
        headers = formats.headers_of(tokenizer)
        own, own_syntax = formats.own_template(tokenizer)
        if name == "auto":
            default = "llama" if headers is formats.LLAMA3 else "hermes"
            name = own_syntax or default
        if (name, headers) not in formats.BUNDLED:
            raise ValueError(
                f"chat format {name!r} needs ChatML role markers (<|im_start|>), the tokenizer has Llama's"
            )
        syntax, template = formats.BUNDLED[name, headers]
        use_own = own is not None and own_syntax == name
        return cls(
            tokenizer,
            name,
            headers,
            syntax,
            own if use_own and own is not None else template,
            own_template=use_own,
            levels=levels,
            privileged_template=privileged_template,
        )

    # -- building --------------------------------------------------------------------------------------------

    def prompt(
        self,
        messages: Sequence[Mapping],
        tools: Sequence[Mapping],
        *,
        privileged: str | None = None,
        note: str | None = None,
    ) -> Tokens:
        """Tokens of x, or of c(x,h) with `privileged` = h as text, up to and with the first generation
        header. `note`: plain text instead, as it is and without markup.

        The privileged text goes to the end of the last user message and is tokenised apart, so that x and
        c(x,h) share every token up to there.
        """
        last_user = max((i for i, m in enumerate(messages) if m["role"] == "user"), default=None)
        if last_user is None:
            raise ValueError("prompt has no user message to answer")
        marked = self._spelt([dict(message) for message in messages])
        marked[last_user]["content"] += _MARK
        text = self.tokenizer.apply_chat_template(
            marked,
            tools=self._spelt(list(tools)) or None,
            chat_template=self.template,
            add_generation_prompt=True,
            tokenize=False,
        )
        before, mark, after = text.partition(_MARK)
        header = "".join(self._headers.open("assistant"))
        end = after.rfind(header)
        if not mark or _MARK in after or end < 0:
            raise ValueError(
                "the chat template does not render the last user message once, followed by the header "
                f"{header!r}; choose a bundled format by name instead of 'auto'"
            )
        # Some templates open the thinking block themselves; here the model does, and it is trained on it.
        after = after[: end + len(header)]
        texts = [before, after]
        if note is not None:
            texts.insert(1, self._spelt(note))
        elif privileged is not None:
            texts.insert(1, self.privileged_template.replace("{trace}", privileged))
        tokens = Tokens()
        for i, part in enumerate(texts):
            pieces = part.split(SPELT)
            if privileged is not None and i == 1:  # its tags are markup (`render_trace`), no header ever is
                pieces = [piece for text in pieces for piece in _cut(text, self._steering)]
            for piece in pieces:
                for token in self._encode_text(piece)[0]:
                    tokens.append(token, Component.CONTEXT, -1)
        return tokens

    def _spelt(self, value: Any) -> Any:
        """A JSON value whose texts have SPELT inside every control token that they spell: data, not
        markup.
        """
        if isinstance(value, str):
            return SPELT.join(_cut(clean_text(value), self._control))
        if isinstance(value, Mapping):
            return {self._spelt(key): self._spelt(item) for key, item in value.items()}
        return [self._spelt(item) for item in value] if isinstance(value, list | tuple) else value

    def assistant(self, message: Mapping, turn: int) -> Tokens:
        """One expert turn as the model would have to emit it after the generation header, end of turn
        included.
        """
        return self._tokens(
            [*self._assistant_pieces(message), _Piece(self._headers.end, Component.STRUCTURE, True)], turn
        )

    def tool_results(self, results: Sequence[str], turn: int, names: Sequence[str] | None = None) -> Tokens:
        """What follows a turn with calls: one response a call, template text and the next generation header.

        `names` (the called tools) is taken for formats that write them; hermes and llama do not.
        """
        if not results:
            raise ValueError(
                "results is empty: a turn without calls is followed by user(...), not tool_results(...)"
            )
        if names is not None and len(names) != len(results):
            raise ValueError(f"{len(results)} results but {len(names)} names")
        context, response = Component.CONTEXT, Component.TOOL_RESPONSE
        if self._syntax.tagged:
            pieces = [_Piece(self._headers.between, context), *self._open("user", newline=False)]
            for result in results:
                pieces += [
                    _Piece("\n", context),
                    _Piece(formats.RESPONSE_OPEN, context, True),
                    _Piece("\n", context),
                    _Piece(result, response),
                    _Piece("\n", context),
                    _Piece(formats.RESPONSE_CLOSE, context, True),
                ]
            pieces.append(_Piece(self._headers.end, context, True))
        else:
            role = "ipython" if self._headers is formats.LLAMA3 else "tool"
            pieces = []
            for result in results:
                pieces += [
                    _Piece(self._headers.between, context),
                    *self._open(role),
                    _Piece(result, response),
                ]
                pieces.append(_Piece(self._headers.end, context, True))
        return self._tokens([*pieces, *self._generation_header()], turn)

    def user(self, text: str, turn: int) -> Tokens:
        """A later user turn and the generation header of the next assistant turn."""
        context = Component.CONTEXT
        pieces = [_Piece(self._headers.between, context), *self._open("user"), _Piece(text, context)]
        return self._tokens(
            [*pieces, _Piece(self._headers.end, context, True), *self._generation_header()], turn
        )

    def trace(self, messages: Sequence[Mapping]) -> Tokens:
        """The whole expert trace h; prompt(...) + trace(h) is the supervised sequence."""
        tokens = Tokens()
        turn, position = -1, 0
        while position < len(messages):
            message = messages[position]
            position += 1
            if message["role"] == "assistant":
                turn += 1
                tokens.extend(self.assistant(message, turn))
            elif message["role"] == "tool":
                results = [message["content"]]
                while position < len(messages) and messages[position]["role"] == "tool":
                    results.append(messages[position]["content"])
                    position += 1
                tokens.extend(self.tool_results(results, turn))
            elif message["role"] == "user":
                tokens.extend(self.user(message["content"], turn))
            else:
                raise ValueError(f"expert trace: role {message['role']!r} at message {position - 1}")
        return tokens

    def render_trace(self, messages: Sequence[Mapping], *, observations: bool = True) -> str:
        """h as text for `prompt(privileged=...)`: reasoning, calls, answers and, with observations, tool
        responses. Control tokens that these spell have SPELT inside.
        """
        parts = []
        for message in messages:
            if message["role"] == "assistant":
                pieces = self._assistant_pieces(message)
                parts.append("".join(p.text if p.tag else self._spelt(p.text) for p in pieces))
            elif message["role"] == "user":
                parts.append(f"User: {self._spelt(message['content'])}")
            elif observations:
                response = self._spelt(message["content"])
                parts.append(f"{formats.RESPONSE_OPEN}\n{response}\n{formats.RESPONSE_CLOSE}")
        return "\n".join(parts)

    # -- reading ---------------------------------------------------------------------------------------------

    def parse(self, ids: Sequence[int], *, complete: bool) -> AssistantTurn:
        """Read one sampled turn (with or without its stop token) by the rules of pact_fast.data.parsing."""
        end = len(ids)
        while end and ids[end - 1] in self.stop_token_ids:
            end -= 1
        return parse_turn(self._marked(ids[:end]), self._syntax, complete=complete)

    def _marked(self, ids: Sequence[int]) -> str:
        """Text of a turn; tags that are spelt, where the tokenizer has them as tokens, have SPELT inside."""
        parts, begin = [], 0
        for i, token in enumerate([*ids, None]):
            if token is None or token in self._tag_ids:
                parts.append(SPELT.join(_cut(self.decode(ids[begin:i]), self._control)))
                parts.append("" if token is None else self._tag_ids[token])
                begin = i + 1
        return "".join(parts)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`, special tokens and tags included."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    # -- inside ----------------------------------------------------------------------------------------------

    def _assistant_pieces(self, message: Mapping) -> list[_Piece]:
        structure, think = Component.STRUCTURE, Component.THINK_TAG
        reasoning, content = message.get("reasoning_content") or "", message.get("content") or ""
        pieces = []
        if reasoning:
            pieces += [
                _Piece(formats.THINK_OPEN, think, True),
                _Piece("\n", think),
                _Piece(reasoning, Component.REASONING, ends=level_ends(message, self.levels)),
                _Piece("\n", think),
                _Piece(formats.THINK_CLOSE, think, True),
                _Piece("\n\n", think),
            ]
        if content:
            pieces.append(_Piece(content, Component.ANSWER))
        for i, call in enumerate(message.get("tool_calls") or []):
            if i or content:
                pieces.append(_Piece("\n", structure))
            pieces += self._call_pieces(call)
        return pieces

    def _call_pieces(self, call: Mapping) -> list[_Piece]:
        arguments = json.dumps(call["arguments"], ensure_ascii=False)
        text = f'{{"name": "{call["name"]}", "{self._syntax.arguments_key}": {arguments}}}'
        if not self._syntax.tagged:
            return [_Piece(text, Component.TOOL_CALL)]
        return [
            _Piece(formats.CALL_OPEN, Component.STRUCTURE, True),
            _Piece("\n", Component.STRUCTURE),
            _Piece(text, Component.TOOL_CALL),
            _Piece("\n", Component.STRUCTURE),
            _Piece(formats.CALL_CLOSE, Component.STRUCTURE, True),
        ]

    def _open(self, role: str, *, newline: bool = True) -> list[_Piece]:
        texts = self._headers.open(role)
        if not newline:  # the template puts the line break before each response instead
            texts[-1] = texts[-1].rstrip("\n")
        return [_Piece(text, Component.CONTEXT, text in self._headers.special) for text in texts]

    def _generation_header(self) -> list[_Piece]:
        return [_Piece(self._headers.between, Component.CONTEXT), *self._open("assistant")]

    def _tokens(self, pieces: Sequence[_Piece], turn: int) -> Tokens:
        tokens = Tokens()
        run: list[_Piece] = []
        for piece in pieces:
            if piece.tag and piece.text in self._atomic:
                self._add_run(tokens, run, turn)
                tokens.append(self._atomic[piece.text], piece.component, turn)
                run = []
            else:
                run.append(piece)
        self._add_run(tokens, run, turn)
        return tokens

    def _add_run(self, tokens: Tokens, run: Sequence[_Piece], turn: int) -> None:
        """Tokenise the pieces between two atomic tags at once; a token belongs where it starts."""
        text = "".join(piece.text for piece in run)
        if not text:
            return
        ids, starts = self._encode_text(text, plain=True)
        index, begin = 0, 0
        reasoning: list[tuple[int, int]] = []  # position in `tokens`, first character within the reasoning
        for token, start in zip(ids, starts, strict=True):
            while start >= begin + len(run[index].text) and index + 1 < len(run):
                begin += len(run[index].text)
                index += 1
            if run[index].component == Component.REASONING:
                reasoning.append((len(tokens), start - begin))
            tokens.append(token, run[index].component, turn)
        if reasoning:
            ends = next(piece.ends for piece in run if piece.component == Component.REASONING)
            levels = token_levels([start for _, start in reasoning], ends)
            for (position, _), level in zip(reasoning, levels, strict=True):
                tokens.levels[position] = level

    def _encode_text(self, text: str, *, plain: bool = False) -> tuple[list[int], list[int]]:
        """Ids and first characters. `plain`: control tokens written out in `text` stay text (tool output)."""
        text = clean_text(text)  # half a surrogate pair is no UTF-8, and the backend refuses it
        if not plain:
            return self._encode(text)
        ids: list[int] = []
        starts: list[int] = []
        begin = 0
        for piece in _cut(text, self._control):
            own, first = self._encode(piece)
            ids += own
            starts += [begin + start for start in first]
            begin += len(piece)
        return ids, starts

    def _encode(self, text: str) -> tuple[list[int], list[int]]:
        # The backend itself, as the tokenizer's own call costs five times the encoding of a short text; that
        # call sets these two anew for itself every time. They are the backend's own: one thread at a time.
        backend = self.tokenizer.backend_tokenizer
        with self._encoding:
            if backend.truncation is not None:
                backend.no_truncation()
            if backend.padding is not None:
                backend.no_padding()
            encoding = backend.encode(text, add_special_tokens=False)
        return encoding.ids, [start for start, _ in encoding.offsets]


def _control_tokens(tokenizer: Any, atomic: Mapping[str, int]) -> set[str]:
    """Added tokens that steer: the special ones, the tags and headers, and what is written in brackets.

    Other added tokens are words of the vocabulary, which a text may well hold.
    """
    return {
        token.content
        for token in tokenizer.added_tokens_decoder.values()
        if len(token.content.strip()) > 1
        and (token.special or token.content in atomic or re.fullmatch(r"<.+>|\[.+\]", token.content))
    }


def _pattern(texts: set[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or r"(?!)")


def _cut(text: str, control: re.Pattern[str]) -> list[str]:
    """`text` cut after the first character of every control token that it spells: none of them is left."""
    pieces = []
    while (spelt := control.search(text)) is not None:
        pieces.append(text[: spelt.start() + 1])
        text = text[spelt.start() + 1 :]
    return [*pieces, text]
