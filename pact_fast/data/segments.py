"""Semantic segments of reasoning text: the pieces that PACT's annealed supervision keeps a prefix of."""

from __future__ import annotations

import re
from collections.abc import Sequence

# The blank after a sentence starts the next token in most vocabularies; a line break ends the one before.
_SENTENCE_END = re.compile(r"[.!?…][\"')\]]*(?=[ \t])|\s*\n\s*")


def token_segments(text: str, starts: Sequence[int], segments: int) -> list[int]:
    """Segment (0, 1, ...) of each token: `text` is cut at sentence or paragraph ends into at most `segments`
    parts of near-equal token length, never inside a token. `starts`: where in `text` each token begins.
    """
    ends = [match.end() for match in _SENTENCE_END.finditer(text)]
    # A cut is the index of the first token of the next segment.
    candidates = sorted({sum(start < end for start in starts) for end in ends} - {0, len(starts)})
    cuts: list[int] = []
    for k in range(1, segments):
        ideal = k * len(starts) / segments
        later = [cut for cut in candidates if not cuts or cut > cuts[-1]]
        if later:
            cuts.append(min(later, key=lambda cut: abs(cut - ideal)))
    return [sum(position >= cut for cut in cuts) for position in range(len(starts))]
