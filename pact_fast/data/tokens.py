"""Tokens that carry from their construction what they are: component, assistant turn, reasoning level."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum


class Component(IntEnum):
    """What a token is. Only assistant turns hold REASONING, STRUCTURE, TOOL_CALL, ANSWER and THINK_TAG."""

    CONTEXT = 0  # system and user text, role headers, everything that the template adds
    REASONING = 1
    STRUCTURE = 2  # tool-call tags, line breaks beside them, end of turn
    TOOL_CALL = 3
    TOOL_RESPONSE = 4
    ANSWER = 5
    THINK_TAG = 6  # think tags, line breaks beside them


@dataclass
class Tokens:
    """Token ids with, per token: component, assistant turn index (-1 in the prompt), and of a reasoning token
    the lowest level whose prefix holds it (K + 1 where none does; 0 outside reasoning).
    """

    ids: list[int] = field(default_factory=list)
    components: list[int] = field(default_factory=list)
    turns: list[int] = field(default_factory=list)
    levels: list[int] = field(default_factory=list)

    def append(self, token: int, component: Component, turn: int, level: int = 0) -> None:
        self.ids.append(token)
        self.components.append(int(component))
        self.turns.append(turn)
        self.levels.append(level)

    def extend(self, other: Tokens) -> Tokens:
        """Append `other` in place and return self."""
        self.ids += other.ids
        self.components += other.components
        self.turns += other.turns
        self.levels += other.levels
        return self

    def __add__(self, other: Tokens) -> Tokens:
        return Tokens().extend(self).extend(other)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, part: slice) -> Tokens:
        return Tokens(self.ids[part], self.components[part], self.turns[part], self.levels[part])
