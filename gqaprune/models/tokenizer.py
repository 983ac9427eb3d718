"""A model's tokenizer, and whether the two belong together."""

import json
from operator import itemgetter
from pathlib import Path

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from gqaprune.models.gguf_reader import is_own, read_tokenizer
from gqaprune.models.loading_guard import guard_loading
from gqaprune.models.sources import load_config, locate, read_gguf_header

_VOCABULARY_FILES = ("tokenizer.*", "vocab*", "*.model", "*.tiktoken", "tekken*.json")
"""What a folder without a tokenizer has none of."""
_SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def load_tokenizer(source: str | Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model.

    Args:
        source: as for `load_model`.
        trust_remote_code: run code that comes with the checkpoint.

    Raises:
        ValueError: if there is none, or it is broken.
    """
    place, gguf = locate(source)
    with guard_loading("tokenizer", source):
        if isinstance(place, Path) and not gguf and not any(any(place.glob(name)) for name in _VOCABULARY_FILES):
            raise ValueError("it has no tokenizer files; copy them from the model that it comes from")
        if (header := read_gguf_header(source)) is not None and is_own(header):
            tokenizer = read_tokenizer(header)
        else:
            known = gguf or {"config": load_config(source, trust_remote_code)}
            tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=trust_remote_code, **known)
        if _is_empty(tokenizer):
            raise ValueError("it has no tokens but special ones")
        if gguf:
            _drop_appended(tokenizer)
    return tokenizer


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    """Refuse a tokenizer that makes ids the model has no embedding for, and special tokens that it has none for.

    Raises:
        ValueError: with the first id and the rows of the embedding.
    """
    rows = model.get_input_embeddings().num_embeddings
    token, largest = max(tokenizer.get_vocab().items(), key=itemgetter(1))
    if largest >= rows:
        raise ValueError(
            f"the tokenizer has id {largest:,} for {token!r} but the model embeds ids below {rows:,}: it belongs to "
            "another model"
        )
    for name, config in (("config", model.config), ("generation config", model.generation_config)):
        for setting in _SPECIAL_IDS:
            value = getattr(config, setting, None)
            for one in value if isinstance(value, list) else [value]:
                if one is not None and not (isinstance(one, int) and one < rows):
                    raise ValueError(f"the model's {name} has {setting} {one!r}, but it embeds ids below {rows:,}")


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
