"""Repetition on cases made by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gqaprune.evaluation.repetition import Loop, find_loop, measure_distinct, measure_repetition, measure_stutter

from tiny import PROSE, SENTENCE


@pytest.mark.parametrize(
    ("words", "loop"),
    [
        ([], None),
        (PROSE, None),
        (["the"] * 9, Loop(0, 1)),
        (["the"] * 8, None),  # seven after the first
        ([*PROSE, *["the"] * 12], Loop(len(PROSE), 1)),
        ([*PROSE, *["ha", "ho"] * 5], Loop(len(PROSE), 2)),
        ([*PROSE, *["ha", "ho"] * 4], None),
        ([*["the"] * 12, "end"], None),  # it came out of it
        ([*PROSE, *PROSE], Loop(0, len(PROSE))),
        ([*PROSE[:-4], *PROSE[:-4], *PROSE[:6]], Loop(0, len(PROSE) - 4)),  # the last round is cut off
        ([*PROSE, *PROSE[:-1]], None),  # not yet two rounds
        ([*PROSE, *SENTENCE * 3, *SENTENCE[:2]], Loop(len(PROSE), 5)),
    ],
)
def test_loop_is_what_goes_round_until_the_end(words: list[str], loop: Loop | None) -> None:
    assert find_loop(words) == loop


@pytest.mark.parametrize(
    ("words", "inside"),
    [
        ([], 0),
        (PROSE, 0),  # "of times" and "was the" come twice
        (["no", "no", "no"], 0),
        (["no"] * 4, 4),
        ([*PROSE, "very", "very"], 0),
        ([*PROSE, "ha", "ho", "ha", "ho"], 4),
        ([*["the"] * 5, *PROSE, *["a"] * 6], 11),
        ([*PROSE, *SENTENCE, *SENTENCE], 10),
        ([*SENTENCE, "1", *SENTENCE, "2"], 0),  # twice, apart
        ([*SENTENCE, "1", *SENTENCE, "2", *SENTENCE], 15),
        (["1", *SENTENCE[:3], "2", *SENTENCE[:3], "3", *SENTENCE[:3]], 0),  # three words are too few to tell
    ],
)
def test_repetition_counts_what_follows_upon_itself_or_comes_three_times(words: list[str], inside: int) -> None:
    assert measure_repetition(words) == pytest.approx(inside / len(words) if words else 0)


def test_stutter_counts_runs_of_a_word_or_two_alone() -> None:
    words = [*PROSE, *["a", "b", "c"] * 2, *SENTENCE * 3, *["ha"] * 4]
    assert measure_stutter(words) == 10 / len(words)
    assert measure_stutter(PROSE) == measure_stutter([]) == measure_stutter(["no"] * 3) == 0


@given(st.lists(st.integers(0, 3), max_size=40))
def test_measures_hold_together_on_any_text(tokens: list[int]) -> None:
    share, loop = measure_repetition(tokens), find_loop(tokens)
    assert 0 <= share <= 1
    if loop is not None:
        assert all(tokens[i] == tokens[i + loop.period] for i in range(loop.start, len(tokens) - loop.period))
        assert loop.start == 0 or tokens[loop.start - 1] != tokens[loop.start - 1 + loop.period]
        assert share >= (len(tokens) - loop.start) / len(tokens)
    for length in (1, 2, 3):
        ngrams = list(zip(*(tokens[start:] for start in range(length)), strict=False))
        assert measure_distinct(tokens, length) == (len(set(ngrams)) / len(ngrams) if ngrams else None)


def test_distinct_is_the_share_of_different_ngrams() -> None:
    words = ["a", "b", "a", "b", "a", "c"]
    assert [measure_distinct(words, length) for length in (1, 2, 3, 6, 7)] == [3 / 6, 3 / 5, 3 / 4, 1, None]
