"""Where models are looked for, and a sentence for what is none."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gqaprune.models.loading import load_model
from gqaprune.models.tokenizer import load_tokenizer

from tiny import make_model, make_tokens


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("/no/such/model", "the folder does not exist"),
        ("./here", "the folder does not exist"),
        ("gone.gguf", "no GGUF file at gone.gguf"),
        ("nobody/nothing", "from 'nobody/nothing', which is no folder here: "),
        ("lama", "from 'lama', which is no folder here: "),
    ],
)
def test_missing_model_is_said_in_a_sentence(source: str, sentence: str) -> None:
    for load_it in (load_model, load_tokenizer):
        with pytest.raises(ValueError, match=sentence):
            load_it(source)


def test_folder_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no Hugging Face checkpoint: it has no config.json"):
        load_model(tmp_path)


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    make_model("llama").save_pretrained(tmp_path, max_shard_size="20KB")
    first, second, *_ = sorted(tmp_path.glob("*.safetensors"))
    name, tensor = next(iter(load_file(first).items()))
    save_file({**load_file(second), name: tensor}, second, {"format": "pt"})
    with pytest.raises(ValueError, match=f"{name} is in {first.name} and in {second.name}: fetch the model again"):
        load_model(tmp_path)


def test_settings_of_what_a_forward_returns_do_not_count(tmp_path: Path) -> None:
    model = make_model("llama")
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"return_dict": False}))
    assert torch.equal(load_model(tmp_path)(make_tokens()).logits, model(make_tokens()).logits)


@pytest.mark.parametrize("text", ["{", "[]", '{"model_type": "no-such-type"}', '{"hidden_size": 3}'])
def test_broken_config_is_said_in_a_sentence(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match="cannot load a model from") as caught:
        load_model(tmp_path)
    assert "\n" not in str(caught.value)
