"""A model's store is found by the model alone, goes with it, and nothing is left on the model."""

import gc
import weakref
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from gqaprune import PruningConfig, load_model, load_offloaded_model
from gqaprune.checkpoints.formats import check_written_by_layer
from gqaprune.models.architecture import get_layers
from gqaprune.placement.disk_store import DiskStore
from gqaprune.placement.layer_store import (
    LayerStore,
    MemoryStore,
    Placement,
    find_store,
    get_layer_parameters,
    remove_store,
)
from gqaprune.planning.preflight import check_goes_by_layer

from tiny import make_model, make_tokens


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_model().save_pretrained(tmp_path / "dense")
    return tmp_path


def load_from_disk(folder: Path) -> PreTrainedModel:
    return load_offloaded_model(folder / "dense", folder / "work")


def test_a_store_is_no_attribute_of_its_model(folder: Path) -> None:
    model = load_from_disk(folder)
    assert not find_store(model).is_in_memory
    for module in model.modules():
        assert not any(isinstance(value, LayerStore) for value in vars(module).values())


def test_each_model_has_a_store_of_its_own(folder: Path) -> None:
    first, second = load_from_disk(folder), load_from_disk(folder)
    assert isinstance(find_store(first), DiskStore) and find_store(first) is find_store(first)
    assert find_store(first) is not find_store(second)
    assert find_store(first).model is first
    assert find_store(first).placement is Placement.DISK and not find_store(first).is_in_memory
    remove_store(first)
    assert find_store(first).is_in_memory and not find_store(second).is_in_memory


def test_a_store_does_not_keep_its_model_alive(folder: Path) -> None:
    model = load_from_disk(folder)
    reference, store = weakref.ref(model), find_store(model)
    del model
    gc.collect()
    assert reference() is None
    with pytest.raises(AssertionError, match="while its model exists"):
        next(store.named_parameters())


def test_a_model_in_memory_is_held_as_it_is() -> None:
    model = make_model()
    store, weight = find_store(model), "model.layers.1.mlp.up_proj.weight"
    assert isinstance(store, MemoryStore) and store.placement is Placement.MEMORY and store.is_in_memory
    with store.hold(1), torch.no_grad():
        model.get_parameter(weight).zero_()
    assert not get_layer_parameters(model, 1)[weight].any()
    assert list(store.hold_each(range(3))) == [0, 1, 2]
    forwards = [layer.forward for layer in get_layers(model)]
    with store.hold_running_layers():
        assert [layer.forward for layer in get_layers(model)] == forwards
    assert dict(store.named_parameters()) == dict(model.named_parameters())


def test_the_decoder_runs_to_the_same_bits_layer_by_layer(folder: Path) -> None:
    model, offloaded = load_model(folder / "dense"), load_from_disk(folder)
    batches = [make_tokens(2, 24, seed=seed) for seed in range(2)]
    with torch.no_grad():
        expected, actual = (find_store(each).run_decoder(batches, "") for each in (model, offloaded))
    assert all(torch.equal(*pair) for pair in zip(expected, actual, strict=True))


@pytest.mark.parametrize("placement", list(Placement))
def test_what_needs_the_whole_model_is_refused_by_the_name_of_the_setting(placement: Placement) -> None:
    config, message = (
        PruningConfig(rate=0.1, criterion="param_first"),
        "whole model in memory, ",
    )
    if placement is Placement.MEMORY:
        check_goes_by_layer(config, placement)
        check_written_by_layer("padded", None, placement)
        return
    with pytest.raises(ValueError, match=f"criterion param_first needs the {message}which {placement.value} "):
        check_goes_by_layer(config, placement)
    with pytest.raises(ValueError, match=f"format padded needs the {message}but pruning.{placement.value} "):
        check_written_by_layer("padded", None, placement)


def test_gates_are_scored_on_devices_but_not_from_disk() -> None:
    config = PruningConfig(rate=0.1, criterion="fisher")
    check_goes_by_layer(config, Placement.DEVICES)
    with pytest.raises(ValueError, match="criterion fisher needs the whole model"):
        check_goes_by_layer(config, Placement.DISK)
