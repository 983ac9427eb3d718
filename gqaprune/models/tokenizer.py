"""A model's tokenizer, and whether the two belong together."""

import json
from pathlib import Path

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from gqaprune.common.errors import first_line
from gqaprune.models.families import begins_with_bos
from gqaprune.models.gguf_file import read_header
from gqaprune.models.gguf_reader import read_tokenizer
from gqaprune.models.sources import LOADING_ERRORS, load_config, locate, make_loading_error, read_own_header

_VOCABULARY_FILES = ("tokenizer.*", "vocab*", "*.model", "*.tiktoken", "tekken*.json")
"""What a folder without a tokenizer has none of."""
_GEMMA_CLASSES = ("GemmaTokenizer", "GemmaTokenizerFast")
"""What transformers loads the tokenizers of Gemma as, where they come from elsewhere than `load_tokenizer`."""


def load_tokenizer(source: str | Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model, which then knows whether the model's windows begin with its BOS (`find_bos`).

    Args:
        source: as for `load_model`.
        trust_remote_code: run code that comes with the checkpoint.

    Raises:
        ValueError: if there is none, or it is broken.
    """
    place, gguf = locate(source)
    try:
        if header := read_own_header(source):
            tokenizer = read_tokenizer(header)
        else:
            known = gguf or {"config": load_config(source, trust_remote_code)}
            tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=trust_remote_code, **known)
        tokenizer.begins_with_bos = begins_with_bos(_read_model_type(source, trust_remote_code))
        if _is_empty(tokenizer):
            raise ValueError("it has no tokens but special ones")
        if gguf:
            _drop_appended(tokenizer)
    except LOADING_ERRORS as error:
        reason = first_line(error)
        if isinstance(place, Path) and not gguf and not any(any(place.glob(name)) for name in _VOCABULARY_FILES):
            reason = "it has no tokenizer files; copy them from the model that it comes from"
        raise make_loading_error("tokenizer", source, reason) from None
    return tokenizer


def find_bos(tokenizer: PreTrainedTokenizerBase, bos: bool | None = None) -> int | None:
    """Find the beginning-of-text token that every window and every prompt of a model begins with.

    Args:
        tokenizer: of the model.
        bos: whether they begin with it; None asks the model's family, and needs no such token.

    Returns:
        The token's id; None where a text has what the tokenizer adds to it, at its beginning alone.

    Raises:
        ValueError: if they are to begin with a token that the tokenizer has not.
    """
    token: int | None = tokenizer.bos_token_id
    if bos and token is None:
        raise ValueError("bos is true and the tokenizer has no beginning-of-text token: set it to false or null")
    if bos is None:
        bos = getattr(tokenizer, "begins_with_bos", type(tokenizer).__name__ in _GEMMA_CLASSES)
    return token if bos else None


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer puts its beginning-of-text token before a text by itself."""
    token = tokenizer.bos_token_id
    return token is not None and tokenizer("a")["input_ids"][:1] == [token]


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    """Refuse a tokenizer that makes ids the model has no embedding for.

    Raises:
        ValueError: with both sizes.
    """
    rows = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        raise ValueError(
            f"the tokenizer has {len(tokenizer):,} tokens but the model embeds {rows:,}: it belongs to another model"
        )


def _read_model_type(source: str | Path, trust_remote_code: bool) -> str:
    """The type of the model: of a GGUF file, whose whole config takes long to read, its architecture."""
    place, gguf = locate(source)
    if gguf:
        return str(read_header(Path(place) / gguf["gguf_file"]).metadata.get("general.architecture"))
    return str(load_config(source, trust_remote_code).model_type)


def _is_empty(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether transformers made a tokenizer up: for some families it does where there are no files."""
    is_backed = isinstance(tokenizer, PreTrainedTokenizerFast)
    return is_backed and tokenizer.get_vocab().keys() <= tokenizer.added_tokens_encoder.keys()


def _drop_appended(tokenizer: PreTrainedTokenizerFast) -> None:
    """Drop what transformers adds to a GGUF file's own tokens, for which the model need not have an embedding."""
    backend = tokenizer.backend_tokenizer
    last = max(backend.get_vocab(with_added_tokens=False).values())
    if len(tokenizer) > last + 1:
        state = json.loads(backend.to_str())
        state["added_tokens"] = [token for token in state["added_tokens"] if token["id"] <= last]
        tokenizer._tokenizer = Tokenizer.from_str(json.dumps(state))
