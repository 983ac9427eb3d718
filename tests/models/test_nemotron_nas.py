"""Nemotron-NAS: the config that engines read, the class that reads it for them, and the way back to a Llama."""

import copy
import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, LlamaConfig, PreTrainedModel

from gqaprune import save
from gqaprune.commands.export import export
from gqaprune.models.architecture import read_geometry, write_geometry
from gqaprune.models.loading import build_model, load, load_model
from gqaprune.models.nemotron_nas import describe_as_nemotron_nas, read_nemotron_nas
from gqaprune.placement.loading_by_layer import load_offloaded_model

from cuts import UNEVEN, get_logits, make_pruned, narrow, read_names
from tiny import LLAMA3, make_model, make_tokenizer, rebuild

MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: make_model("llama", head_dim=None, channels=600),
    "llama-rope": lambda: rebuild(make_model("llama", head_dim=None, channels=600), rope_parameters=LLAMA3),
    "llama-bias": lambda: rebuild(make_model("llama", head_dim=None, channels=600), attention_bias=True),
    "mistral": lambda: make_model("mistral", head_dim=None, channels=600),
    "qwen2": lambda: make_model("qwen2", head_dim=None, channels=600, ratio=7),
    "qwen2-tied": lambda: make_model("qwen2-tied", head_dim=None, channels=600),
}


def compute_width(ffn_mult: float, hidden_size: int) -> int:
    """The formula of vLLM, SGLang, TensorRT-LLM and mlx-lm, which rounds the factor to 6 digits first."""
    width = int(2 * round(ffn_mult, 6) * hidden_size / 3)
    return width if width % 256 == 0 else width + 256 - width % 256


def save_narrow(name: str, folder: Path) -> PreTrainedModel:
    model = narrow(MODELS[name]())
    assert save(model, make_tokenizer(), folder, format="nemotron-nas") == "nemotron-nas"
    return model


@pytest.mark.parametrize("name", list(MODELS))
def test_saved_model_loads_as_the_llama_that_it_is_with_the_same_logits(name: str, tmp_path: Path) -> None:
    model = save_narrow(name, tmp_path / "out")
    loaded, _ = load(tmp_path / "out")
    assert type(loaded.config) is LlamaConfig
    assert read_geometry(loaded.config).channels == (256, 512, 768)
    torch.testing.assert_close(get_logits(loaded), get_logits(model), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", list(MODELS))
def test_config_gives_engines_the_shapes_of_the_tensors(name: str, tmp_path: Path) -> None:
    model = save_narrow(name, tmp_path / "out")
    names = {"config.json", "configuration_decilm.py", "generation_config.json", "model.safetensors"}
    assert read_names(tmp_path / "out") == {*names, "tokenizer.json", "tokenizer_config.json"}
    config = json.loads((tmp_path / "out/config.json").read_text())
    tensors = load_file(tmp_path / "out/model.safetensors")
    assert (config["model_type"], config["architectures"]) == ("nemotron-nas", ["DeciLMForCausalLM"])
    assert config["num_attention_heads"] * config["head_dim"] == config["hidden_size"]
    for layer, block in enumerate(config["block_configs"]):
        prefix = f"model.layers.{layer}"
        width = compute_width(block["ffn"]["ffn_mult"], config["hidden_size"])
        assert tensors[f"{prefix}.mlp.down_proj.weight"].shape == (config["hidden_size"], width)
        rows = config["num_attention_heads"] // block["attention"]["n_heads_in_group"] * config["head_dim"]
        assert tensors[f"{prefix}.self_attn.k_proj.weight"].shape == (rows, config["hidden_size"])
        # Engines give the output projection a bias wherever the others have one.
        biases = {f"{prefix}.self_attn.{part}_proj.bias" for part in "qkvo"}
        assert biases & tensors.keys() == (biases if config["attention_bias"] else set())
    rope = model.config.rope_parameters
    assert config["rope_theta"] == rope["rope_theta"] and "rope_parameters" not in config
    assert config["rope_scaling"] == ({k: LLAMA3[k] for k in LLAMA3 if k != "rope_theta"} if "factor" in rope else None)


@pytest.mark.parametrize("hidden_size", [24, 576, 896, 2048, 3072, 3584, 5120, 8192])
def test_every_multiple_of_256_is_told_exactly(hidden_size: int) -> None:
    widths = tuple(range(256, 8 * hidden_size + 256, 256))
    config = LlamaConfig(hidden_size=hidden_size, num_attention_heads=8, num_hidden_layers=len(widths))
    write_geometry(config, replace(read_geometry(config), channels=widths))
    values = describe_as_nemotron_nas(config)
    found = tuple(compute_width(block["ffn"]["ffn_mult"], hidden_size) for block in values["block_configs"])
    assert found == widths == read_geometry(read_nemotron_nas(values)).channels


def test_config_class_that_comes_with_it_gives_settings_as_attributes(tmp_path: Path) -> None:
    save_narrow("llama-rope", tmp_path / "out")
    config = AutoConfig.from_pretrained(tmp_path / "out", trust_remote_code=True)
    for each in (config, copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        block = each.block_configs[1]
        assert block.attention.n_heads_in_group == 3 and block.ffn.no_op is False
        assert not hasattr(block.ffn, "hidden_act")
        assert (each.num_key_value_heads, each.rope_parameters) == (2, LLAMA3)
    assert json.loads(config.to_json_string())["block_configs"][1] == config.block_configs[1]


def test_kv_heads_of_layers_may_differ(tmp_path: Path) -> None:
    config = MODELS["llama"]().config
    write_geometry(config, replace(read_geometry(config), kv_heads=(2, 6, 3)))
    model = rebuild(build_model(config, torch.float32))
    save(model, None, tmp_path / "out", format="nemotron-nas")
    loaded = load_model(tmp_path / "out")
    assert read_geometry(loaded.config).kv_heads == (2, 6, 3)
    torch.testing.assert_close(get_logits(loaded), get_logits(model), atol=1e-5, rtol=0)


def test_saved_model_is_read_by_layer_and_exported_again(tmp_path: Path) -> None:
    model = save_narrow("qwen2", tmp_path / "out")
    export(str(tmp_path / "out"), str(tmp_path / "again"))
    torch.testing.assert_close(get_logits(load_model(tmp_path / "again")), get_logits(model), atol=1e-5, rtol=0)
    offloaded = load_offloaded_model(tmp_path / "out", tmp_path / "work")
    assert read_geometry(offloaded.config) == read_geometry(load_model(tmp_path / "again").config)


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        (
            lambda: make_pruned("llama", UNEVEN),
            "fill the hidden size of 24, but layer 0 has 2 heads of 8: prune only MLP",
        ),
        (lambda: make_model("mistral-sliding", head_dim=None), "cannot store sliding windows; use per-layer or padded"),
        (lambda: make_model("llama-biases", head_dim=None), "cannot store biases of MLPs"),
        (lambda: make_model("gemma2"), "nemotron-nas supports llama, mistral, qwen2 models, got 'gemma2'"),
    ],
)
def test_model_that_has_no_place_is_refused(
    model: Callable[[], PreTrainedModel], sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=sentence):
        save(model(), None, tmp_path / "out", format="nemotron-nas")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"hidden_act": "gelu"}, "the activation 'gelu'"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}, "rope of type 'yarn'"),
    ],
)
def test_setting_that_has_no_place_is_refused(settings: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    model = rebuild(MODELS["llama"](), **settings)
    with pytest.raises(ValueError, match=f"nemotron-nas cannot store {sentence}"):
        save(model, None, tmp_path / "out", format="nemotron-nas")


def test_layer_without_one_of_its_blocks_is_refused(tmp_path: Path) -> None:
    save_narrow("llama", tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    for change in ({"no_op": True}, {"replace_with_linear": True}):
        config["block_configs"][1]["ffn"] = change
        (tmp_path / "out/config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match="cannot load a model .*: layer 1 has no ffn block, or"):
            load_model(tmp_path / "out")
