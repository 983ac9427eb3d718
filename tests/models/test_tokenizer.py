"""Which tokenizers belong to a model, and a sentence for those that are missing or broken."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from gqaprune.checkpoints.save import save
from gqaprune.models.tokenizer import check_tokenizer, load_tokenizer

from tiny import make_model


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
    with pytest.raises(ValueError, match="it has no tokenizer files; copy them from the model that it comes from"):
        load_tokenizer(tmp_path)


def test_broken_tokenizer_is_said_in_a_sentence(tmp_path: Path) -> None:
    save(make_model("llama"), None, tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="cannot load a tokenizer from") as caught:
        load_tokenizer(tmp_path)
    assert "no tokenizer files" not in str(caught.value)
