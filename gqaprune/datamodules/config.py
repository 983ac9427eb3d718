"""Groups of data settings: calibration, training, evaluation, sampling."""

from dataclasses import dataclass, field

EMBEDDED = "embedded"


def _embedded() -> list[str]:
    return [EMBEDDED]


@dataclass(frozen=True)
class CalibrationConfig:
    """The text that units are scored and repaired on.

    Args:
        corpora: corpus to calibrate on, or a list of corpora; an empty list uses only `sampled_windows`.
        windows: number of windows to calibrate on, at least 1, chosen over all corpora; null uses all that are not held
            out.
        window: tokens per window, at least 2.
        batch_size: windows per micro-batch, at least 1.
        held_out_windows: number of further windows of the corpora, at least 0, that are not used for calibration;
            `PerplexityGuard` measures the model on them, and 0 turns it off. If the corpora have too few windows for
            both, up to half of them are held out, and a console line says so.
        sampled_windows: number of windows, at least 0, that the dense model writes itself and that are added to those
            of the corpora: they cover kinds of text that the corpora lack. Kept in the user's cache folder.

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
        corpora: corpus to train on, or a list of corpora; an empty list uses only `sampled_windows`.
        window: tokens per window, at least 2.
        tokens: largest number of tokens to read from each corpus, at least 1; null reads all.
        batch_size: windows per micro-batch and device, at least 1.
        sampled_windows: number of windows, at least 0, that the dense model writes itself and that are added to those
            of the corpora; they are sampled with another seed than the calibration windows.

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
        val: corpora whose perplexity is measured during training and logged as `ppl/<corpus>`.
        test: corpora whose perplexity is reported.
        window: tokens per window, at least 2 (most papers use 2048, LLM-Pruner 128).
        stride: tokens between the starts of windows, 1 to `window`; null means no overlap.
        tokens: largest number of tokens to evaluate of each corpus, from its beginning, at least 1; null evaluates all.
        batch_size: windows per batch and device, at least 1; null chooses the number that makes 4,096 tokens. A batch
            that does not fit in memory is halved.

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
        document: tokens of each document that windows are packed from, at least 2; many short documents are more
            varied than few long ones.
        prompts: beginnings of the documents, used in turn; null begins them with the beginning-of-text token.
        temperature: divides the logits, above 0.
        top_p: sample from the likeliest tokens that together have this probability, above 0 to 1.
    """

    document: int = 256
    prompts: list[str] | None = None
    temperature: float = 1.0
    top_p: float = 1.0


def _check_least(group: str, least: int, **values: int | None) -> None:
    for name, value in values.items():
        if value is not None and value < least:
            raise ValueError(f"data.{group}.{name} must be at least {least}, got {value}")
