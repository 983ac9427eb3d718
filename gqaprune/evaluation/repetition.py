"""Repetition in a text: loops, recurring phrases, stutter, and the share of different n-grams; on any tokens."""

from collections import Counter
from collections.abc import Hashable, Sequence
from typing import NamedTuple

IMMEDIATE_TOKENS = 4
"""Tokens, at least, of a stretch in which something follows upon itself: "very very" is English."""
RECURRING_TOKENS = 4
"""Tokens of a phrase that may come again, apart from the time before: shorter ones recur in any text."""
RECURRING_TIMES = 3
"""Times that such a phrase has to come to count as repetition; a name or a term comes twice."""
LOOP_TOKENS = 8
"""Tokens at the end, at least, that say once more what was just before them: then the text has come to go round."""
STUTTER_TOKENS = 3
"""Tokens, at most, of a word or two that follow upon themselves: sound models repeat sentences, greedily, not words."""


class Loop(NamedTuple):
    """The end of a text that goes round.

    Args:
        start: token that it begins with.
        period: tokens of one round.
    """

    start: int
    period: int


def find_loop(tokens: Sequence[Hashable]) -> Loop | None:
    """The loop that a text ends in: at least two rounds, at least `LOOP_TOKENS` of them after the first; else None."""
    for period in range(1, len(tokens) // 2 + 1):
        start = len(tokens) - period
        while start > 0 and tokens[start - 1] == tokens[start - 1 + period]:
            start -= 1
        if len(tokens) - period - start >= max(period, LOOP_TOKENS):
            return Loop(start, period)
    return None


def measure_repetition(tokens: Sequence[Hashable]) -> float:
    """Share of a text's tokens, 0 to 1, inside of what recurs: a run that follows upon itself at once, or a phrase of
    `RECURRING_TOKENS` that comes `RECURRING_TIMES`; the first time is counted, too.
    """  # noqa: D205  (one sentence)
    inside = _mark_runs(tokens, len(tokens) // 2)
    phrases = _list_ngrams(tokens, RECURRING_TOKENS)
    times = Counter(phrases)
    for start, phrase in enumerate(phrases):
        if times[phrase] >= RECURRING_TIMES:
            inside[start : start + RECURRING_TOKENS] = [True] * RECURRING_TOKENS
    return sum(inside) / len(inside) if inside else 0.0


def measure_stutter(tokens: Sequence[Hashable]) -> float:
    """Share of a text's tokens, 0 to 1, inside of runs of a word or two, `STUTTER_TOKENS` at most, upon itself."""
    inside = _mark_runs(tokens, STUTTER_TOKENS)
    return sum(inside) / len(inside) if inside else 0.0


def measure_distinct(tokens: Sequence[Hashable], length: int) -> float | None:
    """Share of a text's n-grams of a length that are different ones; None for a text that is shorter (distinct-n)."""
    ngrams = _list_ngrams(tokens, length)
    return len(set(ngrams)) / len(ngrams) if ngrams else None


def _mark_runs(tokens: Sequence[Hashable], longest: int) -> list[bool]:
    """For each token, whether it is in a stretch of two rounds or more, each of `longest` tokens at most."""
    inside = [False] * len(tokens)
    for period in range(1, min(longest, len(tokens) // 2) + 1):
        start = 0
        for place in range(len(tokens) - period + 1):
            if place == len(tokens) - period or tokens[place] != tokens[place + period]:
                size = place + period - start
                if size >= max(2 * period, IMMEDIATE_TOKENS):
                    inside[start : start + size] = [True] * size
                start = place + 1
    return inside


def _list_ngrams(tokens: Sequence[Hashable], length: int) -> list[tuple[Hashable, ...]]:
    return [tuple(tokens[start : start + length]) for start in range(len(tokens) - length + 1)]
