"""What is said of texts made by hand."""

from dataclasses import replace

import pytest

from gqaprune.evaluation.judgement import (
    BROKEN_RATIO,
    DEGRADED_RATIO,
    LEAST_PERPLEXITY,
    MeasuredText,
    Verdict,
    judge,
    judge_all,
    measure_text,
)
from gqaprune.evaluation.repetition import measure_distinct

from tiny import PROSE, SENTENCE


def describe(words: list[str], perplexity: float | None = None, ended: bool = False) -> MeasuredText:
    vocabulary = list(dict.fromkeys(words))
    ids = [vocabulary.index(word) for word in words]
    return measure_text(ids, lambda some: " ".join(vocabulary[i] for i in some), ended, perplexity)


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
        (GOOD, DENSE, "fine", "its tokens 1.3 times less likely than those of its own text (perplexity 4.0, 3.0)"),
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
        (describe([" ", "\n"] * 2), DENSE, "broken", "only white space"),
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
