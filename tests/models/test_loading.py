"""What is loaded, and a sentence for what is no model, or not safe to load."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import gqaprune
from gqaprune.checkpoints.save import save
from gqaprune.models.loading import load_model
from gqaprune.surgery.cut import apply_plan

from cuts import make_plan
from tiny import make_model


def test_embedded_model_is_the_real_one_in_the_type_asked_for() -> None:
    model = load_model("smollm2-135m", dtype="bfloat16")
    assert (model.dtype, sum(p.numel() for p in model.parameters())) == (torch.bfloat16, 134_515_008)


def test_truncated_weights_are_refused(tmp_path: Path) -> None:
    save(make_model("llama"), None, tmp_path / "out")
    weights = tmp_path / "out/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-200])
    with pytest.raises(ValueError, match="cannot load a model from"):
        load_model(tmp_path / "out")


@pytest.mark.parametrize(("variant", "groups"), [("llama", 2), ("mixtral", 2), ("llama", 1)])
def test_weights_of_another_shape_are_named_with_both_shapes(variant: str, groups: int, tmp_path: Path) -> None:
    model = make_model(variant)
    if groups == 1:  # layers that differ
        apply_plan(model, make_plan(model, [[0, 1], [0], [1]], [list(range(20)), [0, 1], [3]]))
    save(model, None, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.1.self_attn.k_proj.weight"] = torch.zeros(4, 24)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    sentence = (
        rf"layers\.1\.self_attn\.k_proj\.weight has shape \[4, 24\] in its files, but .* says \[{8 * groups}, 24\]"
    )
    with pytest.raises(ValueError, match=sentence):
        load_model(tmp_path)


def test_a_package_that_weights_need_is_said_in_a_sentence(tmp_path: Path) -> None:
    model = make_model("llama")
    model.config.quantization_config = {"quant_method": "gptq", "bits": 4, "group_size": 128}
    model.config.save_pretrained(tmp_path)
    packed = {name.replace("proj.weight", "proj.qweight"): tensor for name, tensor in model.state_dict().items()}
    packed = {name: tensor.int() if name.endswith("qweight") else tensor for name, tensor in packed.items()}
    save_file(packed, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"cannot load a model from .* GPTQ"):
        load_model(tmp_path)


def test_an_attention_kernel_without_its_package_is_said_in_a_sentence(tiny_folder: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot load a model from .* FlashAttention2"):
        load_model(tiny_folder, attn_implementation="flash_attention_2")


def test_pickled_weights_are_not_loaded(tmp_path: Path) -> None:
    model = make_model("llama")
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="cannot load a model from"):
        load_model(tmp_path)


def test_unknown_dtype_is_refused(tiny_folder: Path) -> None:
    with pytest.raises(ValueError, match="dtype must be one of float32, bfloat16, float16, auto, got 'int7'"):
        gqaprune.load(tiny_folder, dtype="int7")


def test_unsupported_family_is_refused_on_loading(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=16)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="type 'gpt2' cannot be pruned yet; supported types: exaone4, "):
        load_model(tmp_path)
