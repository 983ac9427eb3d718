"""Write a tokenizer into a GGUF file, and check that it tokenizes text as before."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from gqaprune.common.errors import first_line
from gqaprune.models.gguf_file import read_header
from gqaprune.models.gguf_reader import read_tokenizer
from gqaprune.models.tokenizer import adds_bos

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLITS = {rf"{_WORDS}|\p{{N}}{{1,3}}|{_REST}": "llama-bpe", rf"{_WORDS}|\p{{N}}|{_REST}": "qwen2"}
"""Pattern by which a byte-level tokenizer splits text -> its name in the format."""
_SAMPLE = "Pruned in 2026: 1234567890 heads — naïve?\n\n\tdef f(x):  return 'x'  # 漢字 🙂"
"""A text for which the written tokenizer must give the same tokens as the original."""


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer in the format's terms.

    Args:
        model: kind of the tokenizer.
        split: name of the way in which text is split before the merges.
        tokens: tokens by id.
        types: type of each token.
        merges: merges, best first.
        scores: score of each token, if the kind needs them.
    """

    model: str
    split: str
    tokens: list[str]
    types: list[int]
    merges: list[str]
    scores: list[float]


def read_vocabulary(tokenizer: PreTrainedTokenizerBase, size: int) -> Vocabulary:
    """Read a tokenizer's parts, with tokens added up to the number of the embedding's rows.

    Raises:
        ValueError: if the format has no name for its kind.
    """
    backend: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str()) if tokenizer.is_fast else {}
    model = backend.get("model", {"type": "slow"})
    if model["type"] != "BPE":
        raise ValueError(f"a GGUF file needs a BPE tokenizer, got one of type {model['type']!r}; use padded")
    tokens = [f"[PAD{index}]" for index in range(max(size, len(tokenizer)))]
    types = [int(gguf.TokenType.UNUSED)] * len(tokens)
    for token, index in model["vocab"].items():
        is_byte = model.get("byte_fallback", False) and len(token) == 6 and token.startswith("<0x")
        tokens[index], types[index] = token, int(gguf.TokenType.BYTE if is_byte else gguf.TokenType.NORMAL)
    for added in backend["added_tokens"]:
        token_type = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
        tokens[added["id"]], types[added["id"]] = added["content"], int(token_type)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    if model.get("byte_fallback"):
        ranks = {merge.replace(" ", "", 1): rank for rank, merge in reversed(list(enumerate(merges)))}
        return Vocabulary("llama", "default", tokens, types, merges, [-float(ranks.get(token, 0)) for token in tokens])
    return Vocabulary("gpt2", _name_split(backend["pre_tokenizer"]), tokens, types, merges, [])


def _name_split(step: Mapping[str, Any] | None) -> str:
    """Return the format's name for the way in which a byte-level tokenizer splits text."""
    steps = step["pretokenizers"] if step is not None and step["type"] == "Sequence" else [step or {"type": "none"}]
    kinds = [each["type"] for each in steps]
    if kinds == ["ByteLevel"] and steps[0]["use_regex"]:
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"] and steps[1]["use_regex"]:
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and (name := _SPLITS.get(steps[0]["pattern"].get("Regex", ""))):
        return name
    raise ValueError(
        f"the GGUF format cannot express how this tokenizer splits text ({' and '.join(kinds)}); use padded"
    )


def write_vocabulary(writer: gguf.GGUFWriter, vocabulary: Vocabulary, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write a tokenizer's vocabulary, special tokens and chat template."""
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.split)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.scores:
        writer.add_token_scores(vocabulary.scores)
    writer.add_token_merges(vocabulary.merges)
    for add, index in (
        (writer.add_bos_token_id, tokenizer.bos_token_id),
        (writer.add_eos_token_id, tokenizer.eos_token_id),
        (writer.add_unk_token_id, tokenizer.unk_token_id),
        (writer.add_pad_token_id, tokenizer.pad_token_id),
    ):
        if index is not None:
            add(index)
    writer.add_add_bos_token(adds_bos(tokenizer))
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def check_written_tokenizer(file: Path, tokenizer: PreTrainedTokenizerBase, by_transformers: bool) -> None:
    """Check that the tokenizer in a file gives the same tokens as the original.

    Args:
        file: the GGUF file.
        tokenizer: the original.
        by_transformers: read it with transformers' own reader, for which the file is made.
    """
    try:
        if by_transformers:
            written = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        else:
            written = read_tokenizer(read_header(file))
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"the tokenizer cannot be read from a GGUF file ({type(error).__name__}: {first_line(error)}); use padded"
        ) from None
    expected, found = (each(_SAMPLE, add_special_tokens=False)["input_ids"] for each in (tokenizer, written))
    if expected != found:
        raise ValueError(
            "the tokenizer in the GGUF file gives different tokens, because the format cannot express all of its "
            "steps; use padded"
        )
