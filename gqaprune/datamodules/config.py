"""Groups of data settings: calibration, training, evaluation, sampling."""

from dataclasses import dataclass, field

EMBEDDED = "embedded"


def _embedded() -> list[str]:
    return [EMBEDDED]


@dataclass(frozen=True)
class CalibrationConfig:
    """The text that units are scored and repaired on.

    Args:
        corpora: corpora to calibrate on, or one; none with `sampled_windows` alone.
        windows: windows to calibrate on, at least 1, sampled over all corpora; null takes all that are not held out.
        window: tokens per window, at least 2.
        batch_size: windows per micro-batch, at least 1.
        held_out_windows: further windows of the corpora, that nothing is calibrated on: what `PerplexityGuard` measures
            the model on; 0 turns it off. They come first: where the corpora have too few windows for both, up to half
            of them are held out, and that is said.
        sampled_windows: windows that the dense model writes itself, to calibrate on besides those of the corpora: they
            make up for what the corpora are not like; 0 needs none. Kept in the user's cache folder.

    Raises:
        ValueError: if a number is out of its bounds.
    """

    corpora: list[str] | str = field(default_factory=_embedded)
    windows: int | None = 128
    window: int = 512
    batch_size: int = 4
    held_out_windows: int = 8
    sampled_windows: int = 0

    def __post_init__(self) -> None:
        _check_least("calibration", 1, windows=self.windows, batch_size=self.batch_size)
        _check_least("calibration", 0, held_out_windows=self.held_out_windows, sampled_windows=self.sampled_windows)


@dataclass(frozen=True)
class TrainingConfig:
    """The text that recovery trains on.

    Args:
        corpora: corpora to fine-tune on, or one.
        window: tokens per window, at least 2.
        tokens: tokens to read from each corpus at most, 1 or more; null reads all.
        batch_size: windows per micro-batch and device, at least 1.
        sampled_windows: windows that the dense model writes itself, to fine-tune on besides those of the corpora
            (`corpora: []` takes these alone); sampled like those of calibration, but others;
            0 needs none.

    Raises:
        ValueError: if a number is out of its bounds.
    """

    corpora: list[str] | str = field(default_factory=_embedded)
    window: int = 512
    tokens: int | None = None
    batch_size: int = 4
    sampled_windows: int = 0

    def __post_init__(self) -> None:
        _check_least("training", 1, tokens=self.tokens, batch_size=self.batch_size)
        _check_least("training", 0, sampled_windows=self.sampled_windows)


@dataclass(frozen=True)
class EvaluationConfig:
    """The text that perplexity is measured on.

    Args:
        val: corpora for perplexity during training, logged as `ppl/<corpus>`.
        test: corpora for reported perplexity.
        window: tokens per window, at least 2 (2048 is the usual protocol, 128 LLM-Pruner's).
        stride: tokens between the starts of windows, 1 to `window`; null means no overlap.
        tokens: tokens to evaluate of each corpus at most, from its beginning; null evaluates all.
        batch_size: windows per batch and device; null takes as many as have 4,096 tokens. A batch that memory does not
            hold is halved.

    Raises:
        ValueError: if a number is out of its bounds.
    """

    val: list[str] | str = field(default_factory=_embedded)
    test: list[str] | str = field(default_factory=_embedded)
    window: int = 2048
    stride: int | None = None
    tokens: int | None = None
    batch_size: int | None = None

    def __post_init__(self) -> None:
        _check_least("evaluation", 1, tokens=self.tokens, batch_size=self.batch_size)


@dataclass(frozen=True)
class SamplingConfig:
    """How the dense model writes the sampled windows.

    Args:
        document: tokens of each document that windows are packed from, at least 2: many short ones cover more
            than few long ones.
        prompts: beginnings of those documents, used in turn; null means the beginning-of-text token.
        temperature: divides the logits, above 0.
        top_p: probability that the tokens sampled from have together, above 0 to 1.
    """

    document: int = 256
    prompts: list[str] | None = None
    temperature: float = 1.0
    top_p: float = 1.0


def _check_least(group: str, least: int, **values: int | None) -> None:
    for name, value in values.items():
        if value is not None and value < least:
            raise ValueError(f"data.{group}.{name} must be at least {least}, got {value}")
