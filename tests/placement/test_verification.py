"""What is written is read back and compared, tensor by tensor; what is not there as it was is never left in place."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

import gqaprune.placement.writing_by_layer
from gqaprune.checkpoints.save import save
from gqaprune.models.loading import load_model
from gqaprune.placement.loading_by_layer import load_offloaded_model
from gqaprune.placement.verification import check_tensors
from gqaprune.planning.selection import keep_everything

from cuts import EVEN, UNEVEN, get_logits, make_pruned, read_names
from tiny import make_model

Tensors = dict[str, torch.Tensor]
WEIGHT = "model.layers.1.mlp.up_proj."
NORM = "model.layers.1.input_layernorm.weight"


def find_weight(tensors: Tensors) -> str:
    return next(name for name in tensors if name.startswith(WEIGHT))


def lose(tensors: Tensors) -> None:
    del tensors[find_weight(tensors)]


def flip_a_bit(tensors: Tensors) -> None:
    tensors[NORM].view(torch.int32)[3] ^= 1


def reshape(tensors: Tensors) -> None:
    tensors[find_weight(tensors)] = tensors[find_weight(tensors)].reshape(-1)


def retype(tensors: Tensors) -> None:
    tensors[NORM] = tensors[NORM].bfloat16()


def break_files(patch: pytest.MonkeyPatch, damage: Callable[[Tensors], None]) -> None:
    """Whatever transformers writes from now on is damaged, as a faulty disk or another version of it would."""
    write = PreTrainedModel.save_pretrained

    def write_damaged(model: PreTrainedModel, folder: Path, **settings: Any) -> None:
        write(model, folder, **settings)
        tensors = load_file(folder / "model.safetensors")
        damage(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    patch.setattr(PreTrainedModel, "save_pretrained", write_damaged)


LACKS = r"(lack model\.layers\.1|model\.layers\.1.* in model\.safetensors differs from the model)"


@pytest.mark.parametrize("damage", [lose, flip_a_bit, reshape, retype])
@pytest.mark.parametrize("format", ["stock", "per-layer", "padded"])
def test_a_checkpoint_that_lacks_a_tensor_is_not_left_in_place(
    format: str, damage: Callable[[Tensors], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, old = make_pruned("llama", EVEN if format == "stock" else UNEVEN), make_model("llama")
    save(old, None, tmp_path / "out", keep_everything(old))
    break_files(monkeypatch, damage)
    with pytest.raises(ValueError, match=LACKS):
        save(model, None, tmp_path / "out", format=format)
    assert read_names(tmp_path) == {"out"}
    assert torch.equal(get_logits(load_model(tmp_path / "out")), get_logits(old))


@pytest.mark.parametrize("damage", [lose, flip_a_bit, reshape])
def test_weights_in_8_bits_are_checked_too(
    damage: Callable[[Tensors], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torchao")
    save(make_model("llama"), None, tmp_path / "whole")
    model = load_model(tmp_path / "whole", quantization="int8")
    save(model, None, tmp_path / "sound")
    break_files(monkeypatch, damage)
    with pytest.raises(ValueError, match=LACKS):
        save(model, None, tmp_path / "out")
    assert read_names(tmp_path) == {"whole", "sound"}


@pytest.mark.parametrize("damage", [lose, flip_a_bit])
def test_layers_are_checked_while_they_are_in_memory(
    damage: Callable[[Tensors], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_model("llama").save_pretrained(tmp_path / "dense")
    model = load_offloaded_model(tmp_path / "dense", tmp_path / "work")

    def write_damaged(tensors: Tensors, file: Path, metadata: dict[str, str]) -> None:
        changed = {name: tensor.clone() for name, tensor in tensors.items()}
        if any(name.startswith(WEIGHT) for name in changed):
            damage(changed)
        save_file(changed, file, metadata)

    monkeypatch.setattr(gqaprune.placement.writing_by_layer, "save_file", write_damaged)
    with pytest.raises(ValueError, match=r"model\.layers\.1\..* in model-00003-of-00004.safetensors differs"):
        save(model, None, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_values_that_are_not_numbers_are_compared_by_their_bits(tmp_path: Path) -> None:
    tensors = {"a": torch.tensor([float("nan"), -0.0, 1.0]), "b": torch.tensor(2.0), "c": torch.zeros(0, 3)}
    save_file(tensors, tmp_path / "file.safetensors")
    files = dict.fromkeys(tensors, tmp_path / "file.safetensors")
    check_tensors(tensors, files)
    check_tensors({"a": torch.empty(3, device="meta")}, files)
    for wrong in (torch.tensor([float("nan"), 0.0, 1.0]), torch.empty(4, device="meta")):
        with pytest.raises(ValueError, match="a in file.safetensors differs"):
            check_tensors({"a": wrong}, files)
