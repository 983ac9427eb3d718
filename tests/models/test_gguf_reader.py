"""GGUF files that gqaprune wrote: their config is exact, and believed only as far as their tensors go."""

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch

from gqaprune.checkpoints.gguf_writer import write_gguf
from gqaprune.checkpoints.save import save
from gqaprune.models.gguf_file import read_header
from gqaprune.models.gguf_layout import CONFIG_KEY
from gqaprune.models.gguf_reader import is_own
from gqaprune.models.loading import load, load_config, load_model
from gqaprune.models.sources import locate
from gqaprune.models.tokenizer import load_tokenizer

from cuts import UNEVEN, get_logits, make_pruned
from tiny import make_model, make_tokenizer, round_weights

TOKENIZER = make_tokenizer([("e", "d"), ("r", "u")])


def write(path: Path) -> Path:
    model = make_pruned("llama", UNEVEN)
    write_gguf(path, model.config, model.state_dict(), TOKENIZER)
    return path


def forge(path: Path, changes: dict[str, Any], architecture: str = "deci", dropped: str = "") -> None:
    """Write a file anew with other settings."""
    reader = gguf.GGUFReader(path)
    settings = json.loads(read_header(path).metadata[CONFIG_KEY]) | changes
    tensors = [(each.name, each.data.copy(), each.tensor_type) for each in reader.tensors if each.name != dropped]
    path.unlink()
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_string(CONFIG_KEY, json.dumps(settings))
    for name, data, kind in tensors:
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_config_is_read_as_it_was_and_weights_in_the_type_that_is_asked(tmp_path: Path) -> None:
    model, path = make_pruned("llama", UNEVEN), write(tmp_path / "model.gguf")
    assert load_config(path).to_dict() == model.config.to_dict()
    assert load_model(path).dtype == torch.float32
    loaded, tokenizer = load(tmp_path, dtype="bfloat16")
    assert loaded.dtype == torch.bfloat16 and not loaded.training
    assert loaded.generation_config.eos_token_id == model.generation_config.eos_token_id
    assert tokenizer.get_vocab() == load_tokenizer(path).get_vocab()


def test_weights_of_unequal_files_are_quantised_on_request(tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    model, path = make_pruned("llama", UNEVEN), write(tmp_path / "model.gguf")
    expected = get_logits(model)
    loaded = load_model(path, quantization="int8")
    assert type(loaded.model.layers[0].mlp.up_proj.weight) is not torch.nn.Parameter
    assert 0.001 < (get_logits(loaded) - expected).norm() / expected.norm() < 0.05


def test_files_of_others_are_left_to_transformers() -> None:
    place, file = locate("smollm2-135m")
    assert not is_own(read_header(Path(place) / file["gguf_file"]))


def test_settings_that_name_code_are_not_taken(tmp_path: Path) -> None:
    path = write(tmp_path / "model.gguf")
    forge(path, {"auto_map": {"AutoConfig": "evil.Config"}, "attn_implementation": "evil/kernel", "_x": 1, "y": 2})
    config = load_config(path, trust_remote_code=True)
    assert not {"auto_map", "_x", "y"} & vars(config).keys()
    assert load_model(path, trust_remote_code=True).config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"num_hidden_layers": 900}, "its config says 900 layers, but it has 3"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers must be a whole number from 1 to 1,024, got '1000000000'"),
        ({"model_type": "gpt2"}, "its model type must be one of llama, mistral, qwen2, qwen3, got 'gpt2'"),
        ({"vocab_size": 261}, r"weight has shape \[260, 24\] in its files, but the config says \[261, 24\]"),
        ({"vocab_size": 10**7}, "its config needs 480,0.* parameters, but its files have "),
        ({"intermediate_size": 10**12}, "intermediate_size must be a whole number"),
        ({"num_attention_heads": 5}, "rows in its file, but the config says|validation error"),
        ({"per_layer_config": {"0": {"intermediate_size": 64}}}, "in its file"),
        ({"hidden_size": "wide"}, "hidden_size"),
    ],
)
def test_settings_that_are_not_those_of_the_tensors_are_refused(
    changes: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "model.gguf")
    forge(path, changes)
    with pytest.raises(ValueError, match=f"cannot load a model from .*({sentence})") as caught:
        load_model(path)
    assert "\n" not in str(caught.value)


def test_other_architectures_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "model.gguf")
    forge(path, {}, architecture="bert")
    with pytest.raises(ValueError, match="its architecture must be one of llama, qwen2, qwen3, deci, openelm, got 'be"):
        load_model(path)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (b"tokenizer.ggml.bos_token_id\4\0\0\0\2\1", b"tokenizer.ggml.bos_token_id\4\0\0\0\xff\xff"),
        (b"\3\0\0\0\0\0\0\0e d", b"\3\0\0\0\0\0\0\0e q"),
    ],
)
def test_tokenizers_whose_parts_do_not_fit_are_said_in_a_sentence(before: bytes, after: bytes, tmp_path: Path) -> None:
    path = write(tmp_path / "model.gguf")
    data = path.read_bytes()
    assert data.count(before) == 1
    path.write_bytes(data.replace(before, after))
    with pytest.raises(ValueError, match="cannot load a tokenizer from") as caught:
        load_tokenizer(path)
    assert "\n" not in str(caught.value)


def test_files_say_nothing_of_the_folder_that_a_model_came_from(tmp_path: Path) -> None:
    save(make_pruned("llama", UNEVEN), TOKENIZER, tmp_path / "folder")
    save(load_model(tmp_path / "folder"), TOKENIZER, tmp_path / "out", format="gguf-f16")
    settings = read_header(tmp_path / "out/model-f16.gguf").metadata[CONFIG_KEY]
    assert not any(word in settings for word in ("modeling_pruned", "PerLayer", str(tmp_path)))


def test_missing_tensors_are_refused_by_name(tmp_path: Path) -> None:
    path = write(tmp_path / "model.gguf")
    forge(path, {}, dropped="blk.1.ffn_up.weight")
    with pytest.raises(ValueError, match=r"its files lack model\.layers\.1\.mlp\.up_proj\.weight \(1 in all\)"):
        load_model(path)


def test_a_dense_model_written_here_is_read_here_too(tmp_path: Path) -> None:
    model = round_weights(make_model("qwen3"))
    write_gguf(tmp_path / "model.gguf", model.config, model.state_dict(), TOKENIZER)
    torch.testing.assert_close(get_logits(load_model(tmp_path)), get_logits(model), atol=1e-5, rtol=0)
