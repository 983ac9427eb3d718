"""Load a model's tokenizer, and check that it is safe to use and belongs to the model.

The rules in a tokenizer's files can be written to multiply every character or to take years. It is therefore tried in
a child process first, which costs some milliseconds and loading it twice.
"""

import json
import time
from functools import partial
from operator import itemgetter
from pathlib import Path

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from gqaprune.common.limited import run_limited
from gqaprune.models.families import begins_with_bos
from gqaprune.models.gguf_reader import is_own, read_tokenizer
from gqaprune.models.loading_guard import guard_loading
from gqaprune.models.sources import find_revision, load_config, locate, pin, read_gguf_header

_VOCABULARY_FILES = ("tokenizer.*", "vocab*", "*.model", "*.tiktoken", "tekken*.json")
"""Patterns of files, of which a folder with a tokenizer has at least one."""
_SECONDS, _SECONDS_PER_MB = 3.0, 3.0
"""Limit of the CPU time of loading; converting 4 MB of a SentencePiece model takes some 10 seconds."""
_PROBE = (
    'The quick brown fox, 0123456789 times: "jumps" over {the} [lazy] (dog) & <b>it</b> isn\'t a#b@c.d e/f\\g!?\r\n\t'
    "Größe, niño, ça; Привет; Ελλάδα; 日本語、한국어; العربية; हिन्दी; ไทย; ﬁ ﷺ ½ → ✅ 👩\u200d💻 <s></s>\n"
)
_RUNS = "a A1 0.-=_*#/\n\té日"
_GROWTH, _ALLOWANCE = 8, 1000
"""Largest number of tokens per byte of a text, plus a constant; also of characters after normalising and decoding."""
_PROBE_SECONDS = 1.0
"""Limit of the CPU time for some 4,000 characters, which take a normal tokenizer a few milliseconds."""
_GEMMA_CLASSES = ("GemmaTokenizer", "GemmaTokenizerFast")
"""Classes of Gemma's tokenizers, for those that were not loaded by `load_tokenizer`."""
_SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def load_tokenizer(
    source: str | Path, trust_remote_code: bool = False, revision: str | None = None
) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model, and mark whether the model's windows begin with BOS (for `find_bos`).

    Args:
        source: model, as for `load_model`.
        trust_remote_code: run code that comes with the checkpoint.
        revision: revision, as for `load_model`.

    Raises:
        ValueError: if it does not exist, or is broken.
    """
    source = pin(str(source), revision)
    place, gguf = locate(source)
    read = partial(_read_tokenizer, source, trust_remote_code)
    with guard_loading("tokenizer", source):
        if isinstance(place, Path) and not gguf and not any(any(place.glob(name)) for name in _VOCABULARY_FILES):
            raise ValueError("it has no tokenizer files; copy them from the original model")
        if isinstance(place, Path) and not gguf and not trust_remote_code:  # other cases are only data, or run code
            files = {file for name in _VOCABULARY_FILES for file in place.glob(name)}
            size = sum(file.stat().st_size for file in files) / 1e6
            run_limited(lambda: _try_tokenizer(read()), _SECONDS + _SECONDS_PER_MB * size)
            tokenizer = read()
        else:
            tokenizer = read()
            run_limited(lambda: _try_tokenizer(tokenizer))
    return tokenizer


def _read_tokenizer(source: str | Path, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    place, gguf = locate(source)
    if (header := read_gguf_header(source)) is not None and is_own(header):
        tokenizer: PreTrainedTokenizerBase = read_tokenizer(header)
    else:
        known = gguf or {"config": load_config(source, trust_remote_code), **find_revision(source)}
        tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=trust_remote_code, **known)
    if _is_empty(tokenizer):
        raise ValueError("it has no tokens but special ones")
    if gguf:
        _drop_appended(tokenizer)
    tokenizer.begins_with_bos = begins_with_bos(_read_model_type(source, trust_remote_code))
    return tokenizer


def _try_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise an error if a tokenizer makes far too many tokens or takes far too long. Runs in a child process.

    Raises:
        ValueError: with the excess.
    """
    began = time.process_time()
    text = _PROBE * 6 + "".join(100 * character for character in _RUNS)
    largest = _GROWTH * len(text.encode()) + _ALLOWANCE
    normalizer = getattr(getattr(tokenizer, "backend_tokenizer", None), "normalizer", None)
    for part in (_PROBE, text):  # the short text first, because output may grow with a power of its length
        normalized = part if normalizer is None else normalizer.normalize_str(part)
        ids = tokenizer(part, verbose=False)["input_ids"] if len(normalized) <= largest else []
        decoded = tokenizer.decode(ids) if len(ids) <= largest else ""
        for made, what in ((normalized, "characters"), (ids, "tokens"), (decoded, "characters, back from its tokens")):
            if len(made) > largest:
                raise ValueError(f"it turns a text of {len(part):,} characters into {len(made):,} {what}")
        if (taken := time.process_time() - began) > _PROBE_SECONDS:
            raise ValueError(f"it takes {taken:.1f} s for a text of {len(part):,} characters")


def find_bos(tokenizer: PreTrainedTokenizerBase, bos: bool | None = None) -> int | None:
    """Find the beginning-of-text token that every window and every prompt of a model begins with.

    Args:
        tokenizer: tokenizer of the model.
        bos: whether they begin with it; None follows the model's family, and then the token may be missing.

    Returns:
        The token's id; None if windows do not begin with it, and only the tokenizer adds tokens to texts.
    """
    token: int | None = tokenizer.bos_token_id
    if bos and token is None:
        raise ValueError("bos is true, but the tokenizer has no beginning-of-text token: set it to false or null")
    if bos is None:
        bos = getattr(tokenizer, "begins_with_bos", type(tokenizer).__name__ in _GEMMA_CLASSES)
    return token if bos else None


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether the tokenizer itself adds its beginning-of-text token to texts."""
    token = tokenizer.bos_token_id
    return token is not None and tokenizer("a")["input_ids"][:1] == [token]


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    """Raise an error if the tokenizer or the model's special tokens have ids without an embedding.

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


def _read_model_type(source: str | Path, trust_remote_code: bool) -> str:
    """Read the type of the model; of a GGUF file its architecture, because reading its whole config takes long."""
    if (header := read_gguf_header(source)) is not None:
        return str(header.metadata.get("general.architecture"))
    return str(load_config(source, trust_remote_code).model_type)


def _is_empty(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether transformers invented a tokenizer, as it does for some families without files."""
    is_backed = isinstance(tokenizer, PreTrainedTokenizerFast)
    return is_backed and tokenizer.get_vocab().keys() <= tokenizer.added_tokens_encoder.keys()


def _drop_appended(tokenizer: PreTrainedTokenizerFast) -> None:
    """Drop tokens that transformers adds to those of a GGUF file, because the model may have no embedding for them."""
    backend = tokenizer.backend_tokenizer
    last = max(backend.get_vocab(with_added_tokens=False).values())
    if len(tokenizer) > last + 1:
        state = json.loads(backend.to_str())
        state["added_tokens"] = [token for token in state["added_tokens"] if token["id"] <= last]
        tokenizer._tokenizer = Tokenizer.from_str(json.dumps(state))
