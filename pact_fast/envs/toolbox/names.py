"""Names of two syllables. Every world draws from the same pool, so no name tells anything about a world."""

from random import Random

# One token each in a small BPE vocabulary: no first syllable is a second one (the capital), so a name has one
# tokenisation, and copying it is two look-ups.
FIRST_SYLLABLES = tuple(
    c + v for c in "BDFGHJKLMNPRSTVZ" for v in "aeiou" if (c, v) not in {("H", "e"), ("N", "o")}
)
SECOND_SYLLABLES = tuple(
    c + v for c in "bdfgklmnprstvz" for v in "aeiou" if c + v not in {"be", "do", "me", "to"}
)


def draw_names(rng: Random, count: int) -> list[str]:
    """`count` names with pairwise different first syllables (so that the first token of a copy settles the
    rest)."""
    firsts = rng.sample(FIRST_SYLLABLES, count)
    return [first + rng.choice(SECOND_SYLLABLES) for first in firsts]
