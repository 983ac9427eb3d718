"""Check whether a model's tokenizer and windows agree about BOS, and what perplexity is if they do not."""

from dataclasses import dataclass
from pathlib import Path

from transformers import PretrainedConfig

from gqaprune.data.corpora import EMBEDDED, Corpus
from gqaprune.data.windows import cut_windows, make_batches, tokenize_corpus
from gqaprune.evaluation.perplexity import measure_perplexity
from gqaprune.models.architecture import read_context
from gqaprune.models.families import begins_with_bos
from gqaprune.models.gguf_file import read_header
from gqaprune.models.loading import load
from gqaprune.models.sources import find_weights, locate
from gqaprune.models.tokenizer import adds_bos, find_bos, load_tokenizer

MEASURED_PARAMETERS = 2_000_000_000
"""Largest number of parameters of a model that is loaded for this check."""
TOLERATED = 1.5
"""Largest ratio of the two perplexities that is not reported."""
_WINDOWS, _WINDOW = 3, 512


@dataclass(frozen=True)
class BosCheck:
    """A disagreement: the tokenizer adds BOS to texts and windows do not begin with it, or the other way round.

    Args:
        begins_windows: whether windows begin with BOS; the tokenizer does the opposite.
        with_bos: perplexity on a few windows of the embedded text that begin with BOS; None if it is not measured.
        without_bos: the same without BOS.
        reason: why perplexity is not measured.
    """

    begins_windows: bool
    with_bos: float | None = None
    without_bos: float | None = None
    reason: str = ""

    @property
    def matters(self) -> bool:
        """Whether the two perplexities differ by more than half of the lower one."""
        pair = self.with_bos, self.without_bos
        return None not in pair and max(pair) > TOLERATED * min(pair)  # type: ignore[type-var, operator]

    def describe(self) -> str:
        """Describe the disagreement and its effect in a sentence."""
        if self.begins_windows:
            parties = "windows begin with BOS, but the tokenizer does not add it to texts"
        else:
            parties = "the tokenizer adds BOS to texts, but windows do not begin with it"
        if self.with_bos is None or self.without_bos is None:
            return f"{parties}; its effect on perplexity is not measured: {self.reason}"
        found = f"perplexity is {self.with_bos:,.1f} with it and {self.without_bos:,.1f} without"
        is_better = self.with_bos < self.without_bos
        if not self.matters or is_better == self.begins_windows:
            return f"{parties}: {found}"
        return f"{parties}: {found}; set data.bos to {str(is_better).lower()}"


def check_bos(source: str, config: PretrainedConfig, parameters: int, trust_remote_code: bool) -> BosCheck | None:
    """Measure a model with and without BOS if its tokenizer and its windows do not agree about it.

    Args:
        source: model, as for `load_model`.
        config: config of the model.
        parameters: number of its parameters.
        trust_remote_code: run code that comes with the model.

    Returns:
        The disagreement; None if they agree, or if there is no tokenizer.
    """
    try:
        if _says_add_bos(source) == begins_with_bos(config.model_type):  # a GGUF's tokenizer takes long to load
            return None
        tokenizer = load_tokenizer(source, trust_remote_code)
    except ValueError:
        return None
    bos = find_bos(tokenizer)
    if adds_bos(tokenizer) == (bos is not None):
        return None
    if parameters > MEASURED_PARAMETERS:
        reason = f"the model has more than {MEASURED_PARAMETERS:,} parameters; try gqaprune validate with data.bos "
        return BosCheck(bos is not None, reason=reason + "true and false")
    try:
        find_weights(source, local_files_only=True)
        model, tokenizer = load(source, trust_remote_code=trust_remote_code)
        window = min(_WINDOW, read_context(config))
        tokens = tokenize_corpus(tokenizer, Corpus(EMBEDDED, "validation"), _WINDOWS * window)
        texts = {
            name: make_batches(*cut_windows(tokens, window, bos=first), 1)
            for name, first in (("with BOS", tokenizer.bos_token_id), ("without BOS", None))
        }
        found = measure_perplexity(model, texts)
        return BosCheck(bos is not None, found["with BOS"], found["without BOS"])
    except ValueError as error:
        return BosCheck(bos is not None, reason=str(error))


def _says_add_bos(source: str) -> object:
    """Return whether a GGUF file says that its tokenizer adds BOS; None for other models."""
    place, gguf = locate(source)
    return read_header(Path(place) / gguf["gguf_file"]).metadata.get("tokenizer.ggml.add_bos_token") if gguf else None
