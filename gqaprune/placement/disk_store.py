"""Keep decoder layers on disk, with one in memory at a time, to prune models larger than memory.

The layers of such a model have shapes but no values (they are on torch's `meta` device) until they are held; then they
are read from their safetensors files. A changed layer is written to a temporary folder, and read from there later.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from gqaprune.common.atomic_files import ScratchFolder
from gqaprune.common.disk_errors import explain_disk_errors
from gqaprune.models.architecture import get_layers
from gqaprune.models.sources import StoredTensor
from gqaprune.placement.layer_store import (
    LayerStore,
    Placement,
    get_layer_parameters,
    get_outside_parameters,
    set_store,
)
from gqaprune.placement.writing_by_layer import detach_parameters


class DiskStore(LayerStore):
    """Decoder layers in files.

    Args:
        model: the causal LM.
        stored: full name of a parameter -> its place; these files are only read.
        folder: changed layers are kept beside this path, in a folder that is removed with this object.
    """

    placement = Placement.DISK

    def __init__(self, model: PreTrainedModel, stored: Mapping[str, StoredTensor], folder: Path) -> None:
        super().__init__(model)
        self.stored = dict(stored)
        self._folder = ScratchFolder(folder)

    @contextmanager
    def hold(self, index: int, changes: bool = False) -> Iterator[None]:
        """Read a layer within the context, and write it at the end if it changes."""
        model = self.model
        try:
            _read_parameters(model, self.stored, get_layer_parameters(model, index))
            yield
            if changes:
                self._write(index, get_layer_parameters(model, index))
        finally:
            with torch.inference_mode(False):  # tensors made in that mode could never require gradients
                get_layers(model)[index].to("meta")

    def _write(self, index: int, parameters: Mapping[str, Tensor]) -> None:
        path = self._folder.path / f"layer-{index}.safetensors"
        with explain_disk_errors(path, sum(parameter.nbytes for parameter in parameters.values())):
            save_file(detach_parameters(parameters), path)
        self.stored |= {name: StoredTensor(path, name) for name in parameters}


def offload_layers(model: PreTrainedModel, stored: Mapping[str, StoredTensor], folder: Path) -> None:
    """Give a model without values a `DiskStore` for its decoder layers, and read its other parameters.

    Args:
        model: the causal LM, all its parameters on `meta`; its buffers have values.
        stored: full name of a parameter -> its place.
        folder: changed layers are kept beside this path.

    Raises:
        ValueError: if shapes differ, or the decoder layers have buffers.
    """
    check_files(model, stored)
    set_store(DiskStore(model, stored, folder))
    read_outside_parameters(model, stored)


def check_files(model: PreTrainedModel, stored: Mapping[str, StoredTensor]) -> None:
    """Raise an error if layers cannot be read from files one by one.

    Raises:
        ValueError: if shapes differ, or the decoder layers have buffers.
    """
    _check_shapes(model, stored)
    if buffers := [name for name, _ in get_layers(model).named_buffers()]:
        raise ValueError(
            f"its layers have the buffer {buffers[0]}, which is not in the files, so it can only be pruned in memory: "
            "set pruning.offload and pruning.sharded to false"
        )


def read_outside_parameters(model: PreTrainedModel, stored: Mapping[str, StoredTensor]) -> None:
    """Read the parameters outside of the decoder layers; those that are not in files stay as they are."""
    in_files = {name: parameter for name, parameter in get_outside_parameters(model).items() if name in stored}
    _read_parameters(model, stored, in_files)


def _read_parameters(model: PreTrainedModel, stored: Mapping[str, StoredTensor], wanted: Mapping[str, Tensor]) -> None:
    """Read parameters, by their full names, into the model, on its device and in the parameters' types."""
    first = next(model.parameters())
    device = torch.device("cpu") if first.is_meta else first.device
    tensors = {}
    for path in {stored[name].file for name in wanted}:
        with safe_open(path, "pt") as file:
            for name in wanted:
                if stored[name].file == path:
                    # A copy: if memory is short, pages of a mapped file would be read again for every batch.
                    tensors[name] = file.get_tensor(stored[name].name).to(device, wanted[name].dtype, copy=True)
    model.load_state_dict(tensors, strict=False, assign=True)


def _check_shapes(model: PreTrainedModel, stored: Mapping[str, StoredTensor]) -> None:
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items() if name in stored}
    for path in {place.file for place in stored.values()}:
        with safe_open(path, "pt") as file:
            for name in shapes:
                place = stored[name]
                if place.file == path and (shape := file.get_slice(place.name).get_shape()) != shapes[name]:
                    raise ValueError(f"{name} has shape {shape} in {path.name}, but the config says {shapes[name]}")
