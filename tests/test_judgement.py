"""Measures of text on cases made by hand, and what is said of them."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gqaprune.judgement import (
    BROKEN_RATIO,
    DEGRADED_RATIO,
    LEAST_PERPLEXITY,
    Loop,
    MeasuredText,
    Verdict,
    find_loop,
    judge,
    judge_all,
    measure_distinct,
    measure_repetition,
    measure_stutter,
    measure_text,
)

TEXT = "It was the best of times , it was the worst of times , and nobody knew which until much later"
PROSE = TEXT.split()
SENTENCE = ["boil", "an", "egg", "in", "water"]


def describe(words: list[str], perplexity: float | None = None, ended: bool = False) -> MeasuredText:
    vocabulary = list(dict.fromkeys(words))
    ids = [vocabulary.index(word) for word in words]
    return measure_text(ids, lambda some: " ".join(vocabulary[i] for i in some), ended, perplexity)


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


def test_a_text_is_measured_in_all() -> None:
    words = [*PROSE, *SENTENCE * 4, "boil"]
    text = describe(words, 3.5, ended=True)
    assert (text.text, text.tokens, text.ended, text.perplexity) == (" ".join(words), len(words), True, 3.5)
    assert (text.loop, text.loop_tokens, text.loop_rounds) == ("boil an egg in water", 5, 21 / 5)
    assert text.loop_share == text.repetition == 21 / len(words)
    assert text.distinct == tuple(measure_distinct(words, length) for length in (1, 2, 3))
    assert text.to_dict()["distinct"] == list(text.distinct)


DENSE = describe([*PROSE, "after", "all"], perplexity=3.0)
GOOD = describe([*PROSE, "and", "then", "some"], perplexity=4.0)
THE = describe([*PROSE[:5], *["the"] * 20], perplexity=3.0)
EGG = describe([*SENTENCE * 5], perplexity=1.5)


@pytest.mark.parametrize(
    ("pruned", "dense", "level", "reason"),
    [
        (GOOD, DENSE, "fine", "a token of it 1.3 times less likely than one of its own text (perplexity 4.0, 3.0)"),
        (DENSE, DENSE, "fine", "the dense model's own text"),
        (GOOD, None, "fine", "repeats itself in 0% of its tokens"),
        (THE, DENSE, "broken", "repeats “the” to the end, 20 times"),
        (THE, None, "broken", "repeats “the” to the end, 20 times"),
        (EGG, DENSE, "broken", "repeats “boil an egg in water” to the end, 5 times"),
        (EGG, EGG, "fine", "but the dense model repeats itself as much"),
        (THE, EGG, "broken", "repeats “the” to the end"),  # a sentence over and over is no excuse for a word
        (THE, THE, "fine", "but the dense model repeats itself as much"),
        (describe([*["its"] * 9, "your", *["not"] * 9, "end"]), EGG, "broken", "same word or two over and over in 90%"),
        (describe([*PROSE, *SENTENCE * 2], 3.0), DENSE, "degraded", "repeats itself in 32% of its tokens, the dense"),
        (describe([]), DENSE, "broken", "empty"),
        (describe([" ", "\n"] * 2), DENSE, "broken", "nothing but white space"),
        (describe([]), describe([]), "fine", "the dense model's own text"),
        (describe([" "] * 12), DENSE, "broken", "white space"),
    ],
)  # fmt: skip
def test_verdict_says_what_a_person_would(
    pruned: MeasuredText, dense: MeasuredText | None, level: str, reason: str
) -> None:
    if dense is not None and dense.perplexity is None:
        pruned, dense = replace(pruned, perplexity=3.0), replace(dense, perplexity=3.0)
    verdict = judge(pruned, dense)
    assert verdict.level == level and reason in verdict.reason


@pytest.mark.parametrize(
    ("ratio", "level"),
    [
        (DEGRADED_RATIO - 0.01, "fine"),
        (DEGRADED_RATIO, "degraded"),
        (BROKEN_RATIO - 0.01, "degraded"),
        (BROKEN_RATIO, "broken"),
    ],
)
@pytest.mark.parametrize("own", [3.0, 1.01])
def test_text_that_the_dense_model_finds_unlikely_is_degraded_then_broken(ratio: float, own: float, level: str) -> None:
    text = replace(GOOD, perplexity=ratio * max(own, LEAST_PERPLEXITY))
    assert judge(text, replace(DENSE, perplexity=own)).level == level
    short = replace(text, tokens=3)
    assert judge(short, replace(DENSE, perplexity=own)).level == ("degraded" if level == "broken" else level)


def test_verdict_over_all_is_broken_above_a_half_and_degraded_from_a_quarter_on() -> None:
    def sum_up(fine: int, degraded: int, broken: int) -> Verdict:
        levels = ["fine"] * fine + ["degraded"] * degraded + ["broken"] * broken
        return judge_all([Verdict(level, "") for level in levels])  # type: ignore[arg-type]

    assert sum_up(4, 0, 0) == ("fine", "of 4 texts 4 fine")
    assert sum_up(4, 1, 0).level == "fine"
    assert sum_up(3, 0, 1) == ("degraded", "of 4 texts 1 broken, 3 fine")
    assert sum_up(2, 0, 2).level == "degraded"
    assert sum_up(1, 1, 3) == ("broken", "of 5 texts 3 broken, 1 degraded, 1 fine")
