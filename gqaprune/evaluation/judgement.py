"""Judge generated text like a reader, by its repetition and by how likely the dense model finds it.

These are pure functions on tokens and numbers. The thresholds were set by reading texts: see `judge`.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

from gqaprune.evaluation.repetition import find_loop, measure_distinct, measure_repetition, measure_stutter

Level = Literal["fine", "degraded", "broken"]
LEVELS: tuple[Level, ...] = ("fine", "degraded", "broken")

DEGRADED_REPETITION = 0.25
"""Share of repeated tokens, beyond that of the dense model's text, at which a text is degraded."""
BROKEN_REPETITION = 0.6
"""The same for a broken text."""
BROKEN_STUTTER = 0.25
"""Share of stuttering tokens, beyond that of the dense model's text, at which a text is broken."""
DEGRADED_RATIO = 3.5
"""Ratio of the dense model's perplexities of a text and of its own text, at which the text is degraded."""
BROKEN_RATIO = 8.0
"""The same for a broken text."""
LEAST_PERPLEXITY = 2.0
"""Lower bound of the dense model's perplexity of its own text, so that its certainty does not count against others."""
SHORT_TOKENS = 8
"""Texts with fewer tokens are not called broken because of their perplexity, which then depends on one or two words."""
DEGRADED_SHARE = 0.25
"""Share of texts that are not fine at which a model is called degraded."""
SHOWN_CHARACTERS = 40
"""Largest number of a loop's characters to show in a sentence."""


@dataclass(frozen=True)
class MeasuredText:
    """A generated text and its measures.

    Args:
        text: the text without special tokens.
        tokens: number of tokens without the end-of-text token.
        ended: whether the model ended it with that token.
        repetition: share of tokens in repeated parts.
        stutter: share of tokens in immediate repetitions of one or two words.
        loop: text that is repeated to the end; empty if there is no loop.
        loop_rounds: number of the loop's rounds.
        loop_share: share of tokens in the loop.
        loop_tokens: tokens of one round.
        distinct: shares of different n-grams of 1, 2 and 3 tokens.
        perplexity: the dense model's perplexity of this text after its prompt, the end-of-text token included.
    """

    text: str
    tokens: int
    ended: bool
    repetition: float = 0.0
    stutter: float = 0.0
    loop: str = ""
    loop_rounds: float = 0.0
    loop_share: float = 0.0
    loop_tokens: int = 0
    distinct: tuple[float | None, float | None, float | None] = (None, None, None)
    perplexity: float | None = None

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to read."""
        return not self.text.strip()

    def to_dict(self) -> dict[str, Any]:
        """Convert it to plain types."""
        return asdict(self) | {"distinct": list(self.distinct)}


def measure_text(
    tokens: Sequence[int], decode: Callable[[Sequence[int]], str], ended: bool, perplexity: float | None = None
) -> MeasuredText:
    """Measure a generated text.

    Args:
        tokens: generated tokens, without the end-of-text token.
        decode: turns tokens into text.
        ended: whether an end-of-text token ended the text.
        perplexity: the dense model's perplexity of it; None without a dense model.
    """
    loop = find_loop(tokens)
    found: dict[str, Any] = {}
    if loop is not None:
        size = len(tokens) - loop.start
        found = {
            "loop": " ".join(decode(tokens[loop.start : loop.start + loop.period]).split()),
            "loop_rounds": size / loop.period,
            "loop_share": size / len(tokens),
            "loop_tokens": loop.period,
        }
    return MeasuredText(
        text=decode(tokens),
        tokens=len(tokens),
        ended=ended,
        repetition=measure_repetition(tokens),
        stutter=measure_stutter(tokens),
        distinct=(measure_distinct(tokens, 1), measure_distinct(tokens, 2), measure_distinct(tokens, 3)),
        perplexity=perplexity,
        **found,
    )


class Verdict(NamedTuple):
    """Verdict on a text, or on all texts.

    Args:
        level: `fine`, `degraded` or `broken`.
        reason: reason, in a sentence.
    """

    level: Level
    reason: str


def judge(pruned: MeasuredText, dense: MeasuredText | None = None) -> Verdict:
    """Judge a pruned model's text like a reader who sees the dense model's text beside it.

    Greedy decoding makes small dense models repeat themselves as well, so repetition and stutter count only beyond the
    dense model's on the same prompt. Nonsense without repetition is text that the dense model finds unlikely; without a
    dense model it is not detected.

    The thresholds were set by reading greedy texts of SmolLM2-135M-Instruct: 12 prompts, plain and as a chat, up to 60
    tokens. Texts called broken, degraded and fine, of 24 each: random pruning at 55 % 24, 0, 0; `l1` at 10 % 22, 2, 0;
    `fisher+obs` on 2,048 tokens at 10 % without repair 4, 3, 17, at 20 % with least squares 5, 7, 12; random at 5 %
    3, 5, 16; the channels of layer 15 shuffled 0, 4, 20. Unlike a reader, this does not notice fluent text that is
    wrong: "17 + 25 = 52" is fine. Text sampled at temperature 1 from the dense model itself is called broken 16 times
    of 24, because the model finds it unlikely compared with greedy text: both have to be greedy. Texts of larger models
    were not read.

    Args:
        pruned: text of the judged model.
        dense: text of the dense model; None if there is none.
    """
    found = [*_judge_emptiness(pruned, dense), *_judge_repetition(pruned, dense), *_judge_likelihood(pruned, dense)]
    if found:
        return max(found, key=lambda verdict: LEVELS.index(verdict.level))
    if dense is not None and pruned.loop:
        return Verdict("fine", f"repeats {_quote(pruned.loop)} to the end, but the dense model repeats itself as much")
    if dense is None or dense.perplexity is None or pruned.perplexity is None:
        return Verdict("fine", f"repeats itself in {pruned.repetition:.0%} of its tokens")
    if dense.text == pruned.text:
        return Verdict("fine", "the dense model's own text")
    return Verdict("fine", _compare_perplexities(pruned.perplexity, dense.perplexity))


def _judge_emptiness(pruned: MeasuredText, dense: MeasuredText | None) -> Iterator[Verdict]:
    if pruned.is_empty and (dense is None or not dense.is_empty):
        yield Verdict("broken", "empty" if pruned.tokens == 0 else "only white space")


def _judge_repetition(pruned: MeasuredText, dense: MeasuredText | None) -> Iterator[Verdict]:
    usual = 0.0 if dense is None else dense.repetition
    excess, stutters = pruned.repetition - usual, pruned.stutter - (0.0 if dense is None else dense.stutter)
    beside = "" if dense is None else f", the dense model's text in {usual:.0%}"
    reason = f"repeats itself in {pruned.repetition:.0%} of its tokens{beside}"
    if pruned.loop:
        reason = f"repeats {_quote(pruned.loop)} to the end, {pruned.loop_rounds:.0f} times"
    elif stutters >= BROKEN_STUTTER:
        reason = f"says the same word or two over and over in {pruned.stutter:.0%} of its tokens"
    if stutters >= BROKEN_STUTTER or excess >= BROKEN_REPETITION:
        yield Verdict("broken", reason)
    elif excess >= DEGRADED_REPETITION:
        yield Verdict("degraded", reason)


def _judge_likelihood(pruned: MeasuredText, dense: MeasuredText | None) -> Iterator[Verdict]:
    if dense is None or pruned.perplexity is None or dense.perplexity is None or pruned.is_empty:
        return
    ratio = pruned.perplexity / max(dense.perplexity, LEAST_PERPLEXITY)
    if ratio >= DEGRADED_RATIO:
        is_sure = ratio >= BROKEN_RATIO and pruned.tokens >= SHORT_TOKENS
        yield Verdict("broken" if is_sure else "degraded", _compare_perplexities(pruned.perplexity, dense.perplexity))


def _compare_perplexities(pruned: float, dense: float) -> str:
    factor = pruned / dense
    times = "as likely as" if factor < 1.05 else f"{factor:.{0 if factor >= 10 else 1}f} times less likely than"
    return f"the dense model finds its tokens {times} those of its own text (perplexity {pruned:.1f}, {dense:.1f})"


def _quote(text: str) -> str:
    shown = text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 1] + "…"
    return f"“{shown}”" if shown else "white space"


def judge_all(verdicts: Sequence[Verdict]) -> Verdict:
    """Sum up the verdicts on several texts.

    The result is `broken` if more than half are, and `degraded` if at least `DEGRADED_SHARE` are not fine; a single bad
    text may be chance.
    """
    times = Counter(verdict.level for verdict in verdicts)
    counts = ", ".join(f"{times[level]} {level}" for level in reversed(LEVELS) if times[level])
    level: Level = "fine"
    if times["broken"] > len(verdicts) / 2:
        level = "broken"
    elif times["broken"] + times["degraded"] >= DEGRADED_SHARE * len(verdicts):
        level = "degraded"
    return Verdict(level, f"of {len(verdicts)} texts {counts}")
