"""Tensors of types or sizes that a config does not explain are refused by name, before any memory is taken for them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gqaprune.checkpoints.save import save
from gqaprune.commands.inspect import inspect
from gqaprune.models.loading import load_model
from gqaprune.placement.loading_by_layer import load_offloaded_model

from cuts import get_logits
from tiny import make_model, make_tokenizer

Weights = dict[str, Tensor]
UP = "model.layers.1.mlp.up_proj.weight"


def store(folder: Path, change: Callable[[Weights], Weights], **settings: Any) -> Path:
    """A checkpoint of a tiny model with other tensors, and other settings in its config."""
    save(make_model("llama", channels=256), make_tokenizer(), folder)
    file, config = folder / "model.safetensors", folder / "config.json"
    save_file(change(load_file(file)), file, {"format": "pt"})
    config.write_text(json.dumps(json.loads(config.read_text()) | settings))
    return folder


def cast_to(dtype: torch.dtype) -> Callable[[Weights], Weights]:
    return lambda weights: weights | {UP: weights[UP].to(dtype)}


def scale(weights: Weights) -> Weights:
    """Projections in float8 with the scale that makes them whole, as fp8 checkpoints have them."""
    stored = dict(weights)
    for name, weight in weights.items():
        if "proj" in name:
            stored[f"{name}_scale_inv"] = (weight.abs().max() / 448).reshape(1, 1)
            stored[name] = (weight / stored[f"{name}_scale_inv"]).to(torch.float8_e4m3fn)
    return stored


def leave(weights: Weights) -> Weights:
    return weights


def pack(weights: Weights) -> Weights:
    return {name.replace("proj.weight", "proj.qweight"): weight for name, weight in weights.items()} | {
        "model.layers.0.mlp.up_proj.qweight": torch.ones(4, 4, dtype=torch.int32)
    }


def add(name: str) -> Callable[[Weights], Weights]:
    return lambda weights: weights | {name: torch.ones(1)}


FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
FORGED: dict[str, tuple[Callable[[Weights], Weights], dict[str, Any], str]] = {
    "float8 with scales": (scale, {}, r"down_proj\.weight is stored as F8_E4M3 \(21 such tensors in all\)"),
    "float8 and a null config": (scale, {"quantization_config": None}, r"stored as F8_E4M3 .* does not explain"),
    "float8 by an unknown method": (scale, {"quantization_config": {"quant_method": "x"}}, "stored as F8_E4M3"),
    "a method in another setting": (scale, {"compression_config": FP8}, "stored as F8_E4M3"),
    "8 bits": (cast_to(torch.int8), {}, r"model\.layers\.1\.mlp\.up_proj\.weight is stored as I8 \(1 such"),
    "bytes": (cast_to(torch.uint8), {}, "stored as U8"),
    "bits": (cast_to(torch.bool), {}, "stored as BOOL"),
    "complex numbers": (cast_to(torch.complex64), {}, "stored as C64"),
    "float64": (cast_to(torch.float64), {}, "stored as F64"),
    "powers of two": (cast_to(torch.float8_e8m0fnu), {}, "stored as F8_E8M0"),
    "packed integers": (pack, {}, r"up_proj\.qweight is stored as I32"),
    "a scale alone": (add(f"{UP}_scale_inv"), {}, r"files have model\.layers\.1\.mlp\.up_proj\.weight_scale_inv"),
    "a scale of the head": (add("lm_head.weight_scale"), {}, r"its files have lm_head\.weight_scale"),
    "plain weights called float8": (leave, {"quantization_config": FP8}, r"quantization_config \(fp8\), but its weigh"),
    "a type that nothing computes in": (leave, {"dtype": "float64"}, "dtype must be one of float32, bfloat16, float16"),
}


@pytest.mark.parametrize("name", FORGED)
def test_weights_that_the_config_does_not_explain_are_refused_by_every_way_in(name: str, tmp_path: Path) -> None:
    change, settings, sentence = FORGED[name]
    folder = store(tmp_path / "model", change, **settings)
    ways: list[Callable[[], object]] = [lambda: load_model(folder), lambda: inspect(str(folder))]
    if not settings.get("quantization_config"):  # such a model is refused layer by layer whatever it holds
        ways.append(lambda: load_offloaded_model(folder, tmp_path / "layers"))
    for way in ways:
        with pytest.raises(ValueError, match=f"cannot load a model from '{folder}'.*{sentence}"):
            way()


def test_integers_called_float8_are_refused_once_they_are_loaded(tmp_path: Path) -> None:
    folder = store(tmp_path / "model", cast_to(torch.int8), quantization_config=FP8)
    with pytest.raises(ValueError, match="cannot load a model from"):
        load_model(folder)


def test_float8_that_the_config_explains_is_read_as_it_was(tmp_path: Path) -> None:
    folder = store(tmp_path / "model", scale, quantization_config=FP8)
    expected = get_logits(make_model("llama", channels=256))
    assert (get_logits(load_model(folder)) - expected).norm() / expected.norm() < 0.2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_type_of_most_weights_counts_whatever_the_config_says(
    dtype: torch.dtype, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def halve(weights: Weights) -> Weights:
        return {name: weight if "norm" in name else weight.to(dtype) for name, weight in weights.items()}

    folder = store(tmp_path / "model", halve, dtype="float32")
    assert load_model(folder).dtype == dtype
    assert load_offloaded_model(folder, tmp_path / "layers").dtype == dtype
    inspect(str(folder), json=True)
    assert json.loads(capsys.readouterr().out)["dtype"] == str(dtype).removeprefix("torch.")


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers must be a whole number from 1 to 1,024, got '1000000000'"),
        ({"num_hidden_layers": 1000}, "its config says 1000 layers, but its files have 3"),
        ({"hidden_size": 10**9}, "hidden_size must be a whole number from 1 to 1,048,576"),
        ({"vocab_size": 10**7}, r"its config needs 480,0.* parameters, but its files have \d"),
        ({"intermediate_size": "8"}, "intermediate_size must be a whole number from 1 to .*, got '8'"),
        ({"num_attention_heads": True}, "num_attention_heads must be a whole number from 1 to"),
        ({"per_layer_config": {"0": {"intermediate_size": 2**40}}}, "intermediate_size must be a whole number"),
        ({"rope_theta": 2**70}, "rope_theta is a number of 22 digits"),
    ],
)
def test_sizes_beyond_all_bounds_are_refused_before_anything_is_built(
    settings: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    folder = store(tmp_path / "model", leave, **settings)
    for way in (load_model, lambda source: load_offloaded_model(source, tmp_path / "layers")):
        with pytest.raises(ValueError, match=f"cannot load a model from '{folder}'.*{sentence}"):
            way(folder)
