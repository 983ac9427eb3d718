"""Models are loaded whole or layer by layer to the same weights, cut to a plan, ready to train."""

from pathlib import Path

import pytest
import torch

import gqaprune
from gqaprune.placement.layer_store import find_store
from gqaprune.placement.model_source import ModelSource
from gqaprune.plan import PruningPlan
from gqaprune.surgery.cut_loading import load_cut_model

from tiny import make_plain, make_tokens


@pytest.fixture(scope="module")
def plan(tiny_folder: Path) -> PruningPlan:
    model = gqaprune.load_model(tiny_folder)
    return gqaprune.prune(model, [make_tokens()], make_plain(rate=0.3, allocation="global"))[0]


def test_layers_on_disk_are_cut_as_in_memory(tiny_folder: Path, tmp_path: Path, plan: PruningPlan) -> None:
    source = ModelSource(str(tiny_folder))
    whole, on_disk = load_cut_model(source, plan), load_cut_model(source, plan, offload=tmp_path / "layers")
    assert find_store(whole).is_in_memory and not find_store(on_disk).is_in_memory
    weights = dict(whole.named_parameters())
    for name, parameter in find_store(on_disk).named_parameters():
        assert torch.equal(parameter, weights.pop(name))
    assert not weights
    dense = load_cut_model(source)
    assert sum(p.numel() for p in whole.parameters()) < sum(p.numel() for p in dense.parameters())


@pytest.mark.parametrize("recomputes", [False, True])
def test_models_are_loaded_to_train(tiny_folder: Path, recomputes: bool) -> None:
    model = load_cut_model(ModelSource(str(tiny_folder)), gradient_checkpointing=recomputes)
    assert model.training and model.is_activation_checkpointing == recomputes
