"""Which tokenizers belong to a model, and a sentence for those that are missing or broken."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models
from transformers import GemmaTokenizer, PreTrainedTokenizerFast

from gqaprune.checkpoints.save import save
from gqaprune.models.tokenizer import adds_bos, check_tokenizer, find_bos, load_tokenizer

from tiny import make_model, make_tokenizer, make_unknown


def test_tokenizer_that_makes_unknown_ids_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    model = make_model("llama")
    check_tokenizer(tokenizer, model)
    model.resize_token_embeddings(200)
    with pytest.raises(ValueError, match="the tokenizer has id 257 for '</s>' but the model embeds ids below 200"):
        check_tokenizer(tokenizer, model)


def test_an_id_beyond_the_rows_is_refused_however_few_tokens_there_are() -> None:
    few = Tokenizer(models.WordLevel({"a": 0, "b": 260}, unk_token="a"))
    with pytest.raises(ValueError, match="has id 260 for 'b' but the model embeds ids below 260"):
        check_tokenizer(PreTrainedTokenizerFast(tokenizer_object=few), make_model("llama"))


@pytest.mark.parametrize(("setting", "value"), [("eos_token_id", 260), ("eos_token_id", [1, 300])])
@pytest.mark.parametrize("part", ["config", "generation_config"])
def test_special_tokens_beyond_the_rows_are_refused(
    part: str, setting: str, value: object, tokenizer: PreTrainedTokenizerFast
) -> None:
    model = make_model("llama")
    setattr(getattr(model, part), setting, value)
    with pytest.raises(ValueError, match=rf"the model's {part.replace('_', ' ')} has {setting} .*, but it embeds ids"):
        check_tokenizer(tokenizer, model)


@pytest.mark.parametrize("variant", ["llama", "mistral", "qwen2", "qwen3", "gemma3"])
@pytest.mark.parametrize("settings", [None, '{"added_tokens_decoder": {"7": {"content": "<tool>", "special": false}}}'])
def test_missing_tokenizer_is_said_in_a_sentence(variant: str, settings: str | None, tmp_path: Path) -> None:
    save(make_model(variant), None, tmp_path)
    if settings is not None:
        (tmp_path / "tokenizer_config.json").write_text(settings)
    with pytest.raises(ValueError, match="it has no tokenizer files; copy them from the original model"):
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
        ValueError, match="^cannot load a tokenizer from .*: (it (turns|makes|takes|needs|does not end)|Onig)"
    ):
        load_tokenizer(tmp_path)


def test_a_tokenizer_is_tried_on_text_that_every_kind_takes(tiny_folder: Path) -> None:
    assert len(load_tokenizer(tiny_folder)) == 258
    assert len(load_tokenizer("smollm2-135m")) == 49152


@pytest.mark.parametrize("variant", ["gemma2", "gemma3"])
def test_windows_of_gemma_begin_with_bos_wherever_the_model_is_loaded_from(variant: str, tmp_path: Path) -> None:
    save(make_model(variant), make_tokenizer(), tmp_path / "model")
    tokenizer = load_tokenizer(tmp_path / "model")
    assert find_bos(tokenizer) == tokenizer.bos_token_id is not None
    assert find_bos(tokenizer, bos=False) is None
    save(make_model(variant), tokenizer, tmp_path / "again")
    assert find_bos(load_tokenizer(tmp_path / "again")) == tokenizer.bos_token_id


@pytest.mark.parametrize("family", ["gemma", "vaultgemma"])
def test_windows_of_gemmas_that_are_taken_for_llamas_begin_with_bos(family: str, tmp_path: Path) -> None:
    save(make_unknown(family), make_tokenizer(), tmp_path)
    assert find_bos(load_tokenizer(tmp_path)) == 256


@pytest.mark.parametrize("variant", ["llama", "mistral", "qwen2", "phi3", "olmo2", "granite", "exaone4", "smollm3"])
def test_windows_of_other_families_begin_with_bos_where_it_is_asked_for_alone(variant: str, tmp_path: Path) -> None:
    tokenizer = make_tokenizer(adds_bos=True)
    save(make_model(variant), tokenizer, tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert adds_bos(loaded) and find_bos(loaded) is None and find_bos(loaded, bos=True) == 256


def test_gemmas_tokenizer_is_known_by_its_class_where_transformers_has_loaded_it() -> None:
    tokenizer = GemmaTokenizer()
    assert find_bos(tokenizer) == tokenizer.bos_token_id is not None
    assert find_bos(make_tokenizer()) is None


def test_windows_cannot_begin_with_a_token_that_the_tokenizer_has_not(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.bos_token = None
    assert not adds_bos(tokenizer)
    with pytest.raises(ValueError, match="the tokenizer has no beginning-of-text token: set it to false or null"):
        find_bos(tokenizer, bos=True)
    save(make_model("gemma2"), tokenizer, tmp_path)
    assert find_bos(load_tokenizer(tmp_path)) is None
