"""Shard decoder layers over devices, with one shard of every tensor on each, for models that do not fit one device.

A shard is a range of rows, kept as a DTensor. Holding a layer gathers it; afterwards it has its earlier shards, or new
shards if it has changed. For training, FSDP2 takes over (`fsdp.py`).
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from transformers import PreTrainedModel

from gqaprune.models.architecture import get_layers
from gqaprune.models.sources import StoredTensor
from gqaprune.placement.disk_store import check_files, read_outside_parameters
from gqaprune.placement.layer_store import (
    LayerStore,
    Placement,
    find_store,
    get_layer_parameters,
    remove_store,
    set_store,
)


class ShardedStore(LayerStore):
    """Decoder layers in shards.

    Args:
        model: the causal LM.
        mesh: devices that the shards are on, one dimension.
    """

    placement = Placement.DEVICES

    def __init__(self, model: PreTrainedModel, mesh: DeviceMesh) -> None:
        super().__init__(model)
        self._mesh = mesh

    @contextmanager
    def hold(self, index: int, changes: bool = False) -> Iterator[None]:
        """Gather a layer within the context, and shard it anew at the end if it changes."""
        model, shards = self.model, self.gather(index)
        try:
            yield
            if changes:
                whole = get_layer_parameters(model, index)
                shards = {name: self._shard(parameter) for name, parameter in whole.items()}
        finally:
            _set_parameters(model, shards)

    def gather(self, index: int) -> dict[str, nn.Parameter]:
        """Make a layer whole on every rank; return the shards that it replaces."""
        shards: dict[str, nn.Parameter] = {}
        whole = {}
        for name, parameter in get_layer_parameters(self.model, index).items():
            if isinstance(parameter, DTensor):  # adapters are whole
                shards[name] = parameter
                whole[name] = nn.Parameter(parameter.full_tensor(), parameter.requires_grad)
        _set_parameters(self.model, whole)
        return shards

    def _shard(self, parameter: nn.Parameter) -> nn.Parameter:
        # A copy, because a view would keep the whole tensor in memory.
        return self.make_shard(parameter.detach()[self.find_rows(parameter.shape)].clone(), parameter)

    def find_rows(self, shape: torch.Size) -> slice:
        """Find this rank's rows of a tensor, as in `torch.chunk`: the last ranks may have fewer, or none."""
        size = -(-shape[0] // self._mesh.size())
        first = min(self._mesh.get_local_rank() * size, shape[0])
        return slice(first, min(first + size, shape[0]))

    def make_shard(self, rows: Tensor, whole: nn.Parameter) -> nn.Parameter:
        """Make a parameter's shard on this rank from this rank's rows."""
        shape, stride = whole.shape, torch.empty(whole.shape, device="meta").stride()
        shard = DTensor.from_local(rows, self._mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)
        return nn.Parameter(shard, whole.requires_grad)


def shard_layers(
    model: PreTrainedModel, stored: Mapping[str, StoredTensor], mesh: DeviceMesh, device: torch.device
) -> None:
    """Read the values of a model without values from its files; of decoder layers, only this rank's shards.

    Args:
        model: the causal LM, all its parameters on `meta`; its buffers have values.
        stored: full name of a parameter -> its place.
        mesh: devices to shard layers over, one dimension.
        device: device of this rank.

    Raises:
        ValueError: if shapes differ, or the decoder layers have buffers.
    """
    check_files(model, stored)
    store = ShardedStore(model, mesh)
    set_store(store)
    read_outside_parameters(model, stored)
    for index in range(len(get_layers(model))):
        wanted, shards = get_layer_parameters(model, index), {}
        places = {name: stored[name] for name in wanted if name in stored}
        for path in {place.file for place in places.values()}:
            with safe_open(path, "pt") as file:
                for name, place in places.items():
                    if place.file == path:
                        parameter = wanted[name]
                        rows = file.get_slice(place.name)[store.find_rows(parameter.shape)]
                        shards[name] = store.make_shard(rows.to(device, parameter.dtype, copy=True), parameter)
        _set_parameters(model, shards)


def gather_layers(model: PreTrainedModel) -> Iterator[nn.Module]:
    """Gather each decoder layer in turn, for a caller that shards it in another way before asking for the next.

    After the last one, the model's `ShardedStore` is removed.
    """
    store = find_store(model)
    for index, layer in enumerate(get_layers(model)):
        if isinstance(store, ShardedStore):
            store.gather(index)
        yield layer
    if isinstance(store, ShardedStore):
        remove_store(model)


@contextmanager
def show_whole_shapes(model: PreTrainedModel) -> Iterator[None]:
    """Replace every shard by a parameter with the whole shape, type and device within the context.

    These parameters take no memory and have no values, for code that uses a layer's parameters without reading them.
    Within the context, modules may be renamed and parameters frozen.
    """
    shards: list[tuple[nn.Module, str, nn.Parameter]] = []
    if isinstance(find_store(model), ShardedStore):
        for module in get_layers(model).modules():
            for name, parameter in module.named_parameters(recurse=False):
                if isinstance(parameter, DTensor):
                    shards.append((module, name, parameter))
                    shown = torch.zeros(1, dtype=parameter.dtype, device=parameter.device).expand(parameter.shape)
                    setattr(module, name, nn.Parameter(shown, parameter.requires_grad))
    try:
        yield
    finally:
        for module, name, shard in shards:
            shard.requires_grad_(module.get_parameter(name).requires_grad)
            setattr(module, name, shard)


def _set_parameters(model: PreTrainedModel, parameters: Mapping[str, nn.Parameter]) -> None:
    """Set parameters by their full names, also with other shapes than the current ones."""
    for full_name, parameter in parameters.items():
        module, _, name = full_name.rpartition(".")
        setattr(model.get_submodule(module), name, parameter)
