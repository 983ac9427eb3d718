"""Measure repetition in a sequence of tokens: loops, recurring phrases, stutter, and the share of different n-grams."""

from collections import Counter
from collections.abc import Hashable, Sequence
from typing import NamedTuple

IMMEDIATE_TOKENS = 4
"""Least number of tokens of an immediate repetition: "very very" is normal English."""
RECURRING_TOKENS = 4
"""Number of tokens of a phrase that counts if it recurs later: shorter ones recur in any text."""
RECURRING_TIMES = 3
"""Number of times that such a phrase must occur to count as repetition; a name or a term may occur twice."""
LOOP_TOKENS = 8
"""Least number of tokens at the end that repeat the ones before them, for the end to count as a loop."""
STUTTER_TOKENS = 3
"""Largest number of tokens of a stutter: healthy models, decoded greedily, repeat sentences but not words."""


class Loop(NamedTuple):
    """A loop at the end of a text.

    Args:
        start: index of its first token.
        period: tokens of one round.
    """

    start: int
    period: int


def find_loop(tokens: Sequence[Hashable]) -> Loop | None:
    """Find a loop at the end: at least two rounds, with at least `LOOP_TOKENS` tokens after the first; else None."""
    for period in range(1, len(tokens) // 2 + 1):
        start = len(tokens) - period
        while start > 0 and tokens[start - 1] == tokens[start - 1 + period]:
            start -= 1
        if len(tokens) - period - start >= max(period, LOOP_TOKENS):
            return Loop(start, period)
    return None


def measure_repetition(tokens: Sequence[Hashable]) -> float:
    """Measure the share of a text's tokens, 0 to 1, in repeated parts.

    These are immediate repetitions, and phrases of `RECURRING_TOKENS` that occur `RECURRING_TIMES`, with their first
    occurrences.
    """
    inside = _mark_runs(tokens, len(tokens) // 2)
    phrases = _list_ngrams(tokens, RECURRING_TOKENS)
    times = Counter(phrases)
    for start, phrase in enumerate(phrases):
        if times[phrase] >= RECURRING_TIMES:
            inside[start : start + RECURRING_TOKENS] = [True] * RECURRING_TOKENS
    return sum(inside) / len(inside) if inside else 0.0


def measure_stutter(tokens: Sequence[Hashable]) -> float:
    """Measure the share of a text's tokens, 0 to 1, in immediate repetitions of up to `STUTTER_TOKENS` tokens."""
    inside = _mark_runs(tokens, STUTTER_TOKENS)
    return sum(inside) / len(inside) if inside else 0.0


def measure_distinct(tokens: Sequence[Hashable], length: int) -> float | None:
    """Measure the share of different n-grams among a text's n-grams (distinct-n); None if the text is shorter."""
    ngrams = _list_ngrams(tokens, length)
    return len(set(ngrams)) / len(ngrams) if ngrams else None


def _mark_runs(tokens: Sequence[Hashable], longest: int) -> list[bool]:
    """Mark each token in two or more immediate repetitions of up to `longest` tokens each."""
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
