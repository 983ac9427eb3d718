"""Decoder layers in pieces, one piece of every tensor on each device, for models that do not fit one device.

A piece is a run of rows, held as a DTensor. To hold a layer gathers it; letting it go leaves the pieces that it had, or
those of what it has become. FSDP2 takes over where training begins (`sharding.py`).
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from transformers import PreTrainedModel

from gqaprune.models.architecture import get_layers
from gqaprune.placement.disk_store import check_files, fill_outside
from gqaprune.placement.layer_store import LayersApart, get_layers_apart, keep_apart, name_layer


class SplitLayers(LayersApart):
    """The pieces of a model's decoder layers.

    Args:
        mesh: devices that they are on, one dimension.
    """

    reason = "sharded splits over devices"
    can_score_gates = True

    def __init__(self, mesh: DeviceMesh) -> None:
        self._mesh = mesh

    @contextmanager
    def hold(self, model: PreTrainedModel, index: int, changes: bool) -> Iterator[None]:
        """Gather a layer, and split it anew if it changes."""
        pieces = self.gather(model, index)
        try:
            yield
            if changes:
                whole = name_layer(model, index)
                pieces = {name: self._split(parameter) for name, parameter in whole.items()}
        finally:
            _put(model, pieces)

    def gather(self, model: PreTrainedModel, index: int) -> dict[str, nn.Parameter]:
        """Make a layer whole on every rank; returns the pieces in whose place it is."""
        pieces: dict[str, nn.Parameter] = {}
        whole = {}
        for name, piece in name_layer(model, index).items():
            if isinstance(piece, DTensor):  # adapters are whole
                pieces[name] = piece
                whole[name] = nn.Parameter(piece.full_tensor(), piece.requires_grad)
        _put(model, whole)
        return pieces

    def _split(self, parameter: nn.Parameter) -> nn.Parameter:
        # A copy: what is a view would keep the whole in memory.
        return self.make_piece(parameter.detach()[self.find_rows(parameter.shape)].clone(), parameter)

    def find_rows(self, shape: torch.Size) -> slice:
        """Rows of a tensor that are this rank's, as `torch.chunk` cuts: the last ranks may have fewer, or none."""
        size = -(-shape[0] // self._mesh.size())
        first = min(self._mesh.get_local_rank() * size, shape[0])
        return slice(first, min(first + size, shape[0]))

    def make_piece(self, own: Tensor, whole: nn.Parameter) -> nn.Parameter:
        """What stands for a parameter on this rank, from its own rows."""
        shape, stride = whole.shape, torch.empty(whole.shape, device="meta").stride()
        piece = DTensor.from_local(own, self._mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)
        return nn.Parameter(piece, whole.requires_grad)


def split_layers(model: PreTrainedModel, files: Mapping[str, Path], mesh: DeviceMesh, device: torch.device) -> None:
    """Give a model whose parameters have no values those of its files; of decoder layers, this rank's pieces.

    Args:
        model: the causal LM, all its parameters on `meta`; its buffers have values.
        files: full name of a parameter -> safetensors file that holds it.
        mesh: devices to split layers over, one dimension.
        device: of this rank.

    Raises:
        ValueError: if shapes differ, or the decoder layers hold what no file does.
    """
    check_files(model, files)
    layers = SplitLayers(mesh)
    keep_apart(model, layers)
    fill_outside(model, files)
    for index in range(len(get_layers(model))):
        wanted, pieces = name_layer(model, index), {}
        for path in {files[name] for name in wanted if name in files}:
            with safe_open(path, "pt") as file:
                for name, parameter in wanted.items():
                    if files.get(name) == path:
                        rows = file.get_slice(name)[layers.find_rows(parameter.shape)]
                        own = rows.to(device, parameter.dtype, copy=True)
                        pieces[name] = layers.make_piece(own, parameter)
        _put(model, pieces)


def make_layers_whole(model: PreTrainedModel) -> Iterator[nn.Module]:
    """Gather each decoder layer in turn, for whoever splits it otherwise before the next one; none is apart then."""
    apart = get_layers_apart(model)
    for index, layer in enumerate(get_layers(model)):
        if isinstance(apart, SplitLayers):
            apart.gather(model, index)
        yield layer
    if isinstance(apart, SplitLayers):
        del model.layers_apart


@contextmanager
def show_whole_shapes(model: PreTrainedModel) -> Iterator[None]:
    """Put something of the whole's shape, type and device in the place of every piece while the context lasts.

    It takes no memory and has no values: for who builds on a layer's parameters without reading them. Modules may get
    other names meanwhile, and parameters may be frozen.
    """
    pieces: list[tuple[nn.Module, str, nn.Parameter]] = []
    if isinstance(get_layers_apart(model), SplitLayers):
        for module in get_layers(model).modules():
            for name, piece in module.named_parameters(recurse=False):
                if isinstance(piece, DTensor):
                    pieces.append((module, name, piece))
                    shown = torch.zeros(1, dtype=piece.dtype, device=piece.device).expand(piece.shape)
                    setattr(module, name, nn.Parameter(shown, piece.requires_grad))
    try:
        yield
    finally:
        for module, name, piece in pieces:
            piece.requires_grad_(module.get_parameter(name).requires_grad)
            setattr(module, name, piece)


def _put(model: PreTrainedModel, parameters: Mapping[str, nn.Parameter]) -> None:
    """Set parameters by their full names, whatever shapes those in their places have."""
    for name, parameter in parameters.items():
        owner, _, own = name.rpartition(".")
        setattr(model.get_submodule(owner), own, parameter)
