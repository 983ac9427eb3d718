"""Which tokenizers belong to a model, and a sentence for those that are missing or broken."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from gqaprune.checkpoints.save import save
from gqaprune.models.tokenizer import check_tokenizer, load_tokenizer

from tiny import make_model


def test_tokenizer_that_makes_unknown_ids_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    model = make_model("llama")
    check_tokenizer(tokenizer, model)
    model.resize_token_embeddings(200)
    with pytest.raises(ValueError, match="the tokenizer has 258 tokens but the model embeds 200"):
        check_tokenizer(tokenizer, model)


@pytest.mark.parametrize("variant", ["llama", "mistral", "qwen2", "qwen3", "gemma3"])
@pytest.mark.parametrize("settings", [None, '{"added_tokens_decoder": {"7": {"content": "<tool>", "special": false}}}'])
def test_missing_tokenizer_is_said_in_a_sentence(variant: str, settings: str | None, tmp_path: Path) -> None:
    save(make_model(variant), None, tmp_path)
    if settings is not None:
        (tmp_path / "tokenizer_config.json").write_text(settings)
    with pytest.raises(ValueError, match="it has no tokenizer files; copy them from the model that it comes from"):
        load_tokenizer(tmp_path)


def test_broken_tokenizer_is_said_in_a_sentence(tmp_path: Path) -> None:
    save(make_model("llama"), None, tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="cannot load a tokenizer from") as caught:
        load_tokenizer(tmp_path)
    assert "no tokenizer files" not in str(caught.value)


def replace(pattern: Mapping[str, str], content: str) -> dict[str, Any]:
    """A normaliser, or a decoder, that replaces."""
    return {"type": "Replace", "pattern": pattern, "content": content}


DOUBLINGS = [replace({"String": "e"}, "ee")] * 40
SEQUENCE = {"normalizer": {"type": "Sequence", "normalizers": DOUBLINGS}}
BACKTRACKING = "(?:(?:a|A|aa)+)+[^a]$"
EXPLOSIVE: Mapping[str, Mapping[str, Any]] = {
    "doublings": SEQUENCE,
    "one doubling too many": {"normalizer": {"type": "Sequence", "normalizers": DOUBLINGS[:10]}},
    "long replacement": {"normalizer": replace({"String": " "}, "x" * 100_000)},
    "long beginning": {"normalizer": {"type": "Prepend", "prepend": "x" * 10_000_000}},
    "every place": {"normalizer": replace({"Regex": ""}, "x" * 1000)},
    "backtracking": {"normalizer": replace({"Regex": BACKTRACKING}, "a")},
    "backtracking to split": {
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": BACKTRACKING}, "behavior": "Isolated", "invert": False}
    },
    "added tokens": SEQUENCE
    | {
        "added_tokens": [
            {
                "id": 256,
                "content": "e" * 100,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": True,
                "special": False,
            }
        ]
    },
    "decoder": {"decoder": {"type": "Sequence", "decoders": DOUBLINGS}},
    "special tokens": {
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}] * 50_000
            + [{"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [256], "tokens": ["<s>"]}},
        }
    },
}


@pytest.mark.parametrize("name", EXPLOSIVE)
def test_a_tokenizer_that_explodes_is_refused_in_a_sentence(name: str, tiny_folder: Path, tmp_path: Path) -> None:
    for file in ("config.json", "tokenizer_config.json"):
        (tmp_path / file).write_bytes((tiny_folder / file).read_bytes())
    state = json.loads((tiny_folder / "tokenizer.json").read_text()) | EXPLOSIVE[name]
    (tmp_path / "tokenizer.json").write_text(json.dumps(state))
    with pytest.raises(
        ValueError, match="^cannot load a tokenizer from .*: (it (makes|takes|needs|does not end)|Onig)"
    ):
        load_tokenizer(tmp_path)


def test_a_tokenizer_is_tried_on_text_that_every_kind_takes(tiny_folder: Path) -> None:
    assert len(load_tokenizer(tiny_folder)) == 258
    assert len(load_tokenizer("smollm2-135m")) == 49152
