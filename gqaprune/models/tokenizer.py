"""A model's tokenizer, and whether the two belong together."""

import json
from pathlib import Path

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from gqaprune.common.errors import first_line
from gqaprune.models.gguf_reader import read_tokenizer
from gqaprune.models.sources import (
    LOADING_ERRORS,
    find_revision,
    load_config,
    locate,
    make_loading_error,
    pin,
    read_own_header,
)

_VOCABULARY_FILES = ("tokenizer.*", "vocab*", "*.model", "*.tiktoken", "tekken*.json")
"""What a folder without a tokenizer has none of."""


def load_tokenizer(
    source: str | Path, trust_remote_code: bool = False, revision: str | None = None
) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model.

    Args:
        source: as for `load_model`.
        trust_remote_code: run code that comes with the checkpoint.
        revision: as for `load_model`.

    Raises:
        ValueError: if there is none, or it is broken.
    """
    source = pin(str(source), revision)
    place, gguf = locate(source)
    try:
        if header := read_own_header(source):
            tokenizer = read_tokenizer(header)
        else:
            known = gguf or {"config": load_config(source, trust_remote_code), **find_revision(source)}
            tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=trust_remote_code, **known)
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
