"""Whether a tokenizer and the windows of a model agree about BOS, and what it makes of perplexity where they do not."""

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
"""Parameters up to which a model is loaded for this."""
TOLERATED = 1.5
"""Times the lower of the two perplexities that the higher one may be."""
_WINDOWS, _WINDOW = 3, 512


@dataclass(frozen=True)
class BosCheck:
    """A tokenizer that puts BOS before a text, and windows that do not begin with it, or the other way.

    Args:
        begins_windows: whether windows begin with it; the tokenizer does the opposite.
        with_bos: perplexity of a few windows of the embedded text that begin with it; None where it is not measured.
        without_bos: likewise, of the text as the tokenizer leaves it.
        reason: why it is not measured.
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
        """Say what differs and what it comes to, in a sentence."""
        if self.begins_windows:
            parties = "windows begin with BOS, which the tokenizer does not put before a text"
        else:
            parties = "the tokenizer puts BOS before a text, and windows do not begin with it"
        if self.with_bos is None or self.without_bos is None:
            return f"{parties}; what that makes of perplexity is not measured: {self.reason}"
        found = f"perplexity is {self.with_bos:,.1f} with it and {self.without_bos:,.1f} without"
        is_better = self.with_bos < self.without_bos
        if not self.matters or is_better == self.begins_windows:
            return f"{parties}: {found}"
        return f"{parties}: {found}; set data.bos to {str(is_better).lower()}"


def check_bos(source: str, config: PretrainedConfig, parameters: int, trust_remote_code: bool) -> BosCheck | None:
    """Measure a model with and without BOS where its tokenizer and its windows do not agree about it.

    Args:
        source: as for `load_model`.
        config: of the model.
        parameters: of the model.
        trust_remote_code: run code that comes with the model.

    Returns:
        What was found; None where they agree, or there is no tokenizer to ask.
    """
    try:
        if _says_add_bos(source) == begins_with_bos(config.model_type):  # its tokenizer takes long to load
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
    """What a GGUF file says of its tokenizer, True or False; None for all else."""
    place, gguf = locate(source)
    return read_header(Path(place) / gguf["gguf_file"]).metadata.get("tokenizer.ggml.add_bos_token") if gguf else None
