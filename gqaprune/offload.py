"""Decoder layers that stay on disk, one in memory at a time, so that a model larger than memory can be pruned.

The layers of such a model have shapes but no values (they are on torch's `meta` device) until `hold_layer` reads them
from the safetensors files they are in. A layer that was changed is written to a folder of the model's own and read from
there later. A model that is whole in memory goes through all functions here as if they were not there.
"""

import json
import shutil
import weakref
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from itertools import groupby
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from gqaprune.architecture import get_layers
from gqaprune.families import get_family
from gqaprune.layerwise import embed_batches, run_layer
from gqaprune.progress import track
from gqaprune.replace import make_temporary_folder

_METADATA = {"format": "pt"}
"""What transformers looks for in a file."""


class LayersOnDisk:
    """Where the weights of a model's decoder layers are.

    Args:
        files: full name of a parameter -> file that holds it; these files are only read.
        folder: what changed layers are kept beside, in a folder that goes with this object.
    """

    def __init__(self, files: Mapping[str, Path], folder: Path) -> None:
        self.files = dict(files)
        self._folder = make_temporary_folder(folder)
        weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)

    def write(self, index: int, parameters: Mapping[str, Tensor]) -> None:
        """Keep a layer as it is now."""
        path = self._folder / f"layer-{index}.safetensors"
        save_file(_detach(parameters), path)
        self.files |= dict.fromkeys(parameters, path)


def offload_layers(model: PreTrainedModel, files: Mapping[str, Path], folder: Path) -> None:
    """Give a model whose parameters have no values those that its files hold, but for the decoder layers.

    Args:
        model: the causal LM, all its parameters on `meta`; its buffers have values.
        files: full name of a parameter -> safetensors file that holds it.
        folder: what changed layers are kept beside.

    Raises:
        ValueError: if shapes differ, or the decoder layers hold what no file does.
    """
    _check_shapes(model, files)
    if buffers := [name for name, _ in get_layers(model).named_buffers()]:
        raise ValueError(f"its layers hold {buffers[0]}, which no file does: such a model is pruned in memory alone")
    model.layers_on_disk = LayersOnDisk(files, folder)
    _fill(model, files, {name: parameter for name, parameter in _name_outside(model).items() if name in files})


def find_tensors(folder: Path) -> dict[str, Path]:
    """Name -> file of every tensor in a checkpoint's safetensors files.

    Raises:
        ValueError: if there are none.
    """
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if index.is_file():
        paths = sorted({folder / name for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
    elif (folder / SAFE_WEIGHTS_NAME).is_file():
        paths = [folder / SAFE_WEIGHTS_NAME]
    else:
        raise ValueError(f"there is neither {SAFE_WEIGHTS_NAME} nor {SAFE_WEIGHTS_INDEX_NAME}, which hold the weights")
    files: dict[str, Path] = {}
    for path in paths:
        with safe_open(path, "pt") as file:
            files |= dict.fromkeys(file.keys(), path)
    return files


def is_offloaded(model: PreTrainedModel) -> bool:
    """Whether a model's decoder layers are on disk."""
    return hasattr(model, "layers_on_disk")


@contextmanager
def hold_layer(model: PreTrainedModel, index: int, changes: bool = False) -> Iterator[None]:
    """Have the weights of a decoder layer in memory while the context lasts.

    Args:
        model: the causal LM; one that is whole in memory is left as it is.
        index: of the layer, which must not be held already.
        changes: keep the layer as it is at the end of the context, instead of as it was.
    """
    if not is_offloaded(model):
        yield
        return
    store: LayersOnDisk = model.layers_on_disk
    try:
        _fill(model, store.files, _name_layer(model, index))
        yield
        if changes:
            store.write(index, _name_layer(model, index))
    finally:
        with torch.inference_mode(False):  # what is made in that mode could never require gradients again
            get_layers(model)[index].to("meta")


def hold_each(model: PreTrainedModel, indexes: Iterable[int], changed: Collection[int] = ()) -> Iterator[int]:
    """Go through decoder layers, each held while the loop's body runs; those in `changed` are kept as left."""
    for index in indexes:
        with hold_layer(model, index, changes=index in changed):
            yield index


def named_parameters(model: PreTrainedModel) -> Iterator[tuple[str, nn.Parameter]]:
    """Every parameter with its full name, tied ones once; those of offloaded layers while they are looked at."""
    names = [name for name, _ in model.named_parameters()]  # in the model's order, which hashes depend on
    for layer, group in groupby(names, lambda name: _find_layer(model, name)):
        with nullcontext() if layer is None else hold_layer(model, layer):
            for name in group:
                yield name, model.get_parameter(name)


def move_model(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """Move a model to a device; layers on disk stay there, and come to that device when they are held."""
    if not is_offloaded(model):
        return model.to(device)
    inside = {module for layer in get_layers(model) for module in layer.modules()}
    for module in model.modules():
        if module not in inside:
            module._apply(lambda tensor: tensor.to(device), recurse=False)
    return model


def run_decoder_by_layer(model: PreTrainedModel, batches: Sequence[Tensor], description: str) -> list[Tensor]:
    """Output of the last decoder layer for each batch: all of them pass one layer before the next is read.

    Args:
        model: the causal LM, its layers on disk.
        batches: token ids, each `[batch, tokens]`.
        description: what the progress bar says.

    Returns:
        Hidden states, each `[batch, tokens, width]`.
    """
    streams = embed_batches(model, batches)
    for layer in hold_each(model, track(range(len(get_layers(model))), description, "layers")):
        for stream in streams:
            stream.hidden_BTD = run_layer(model, layer, stream)
    return [stream.hidden_BTD for stream in streams]


def write_weights(model: PreTrainedModel, folder: Path) -> None:
    """Write the weights of an offloaded model as transformers does, each layer's to a file of its own.

    Args:
        model: the causal LM, its layers on disk.
        folder: where to.
    """
    layers = len(get_layers(model))
    places: dict[str, str] = {}

    def write(number: int, parameters: Mapping[str, Tensor]) -> None:
        file = f"model-{number:05}-of-{layers + 1:05}.safetensors"
        save_file(_detach(parameters), folder / file, _METADATA)
        places.update(dict.fromkeys(parameters, file))

    write(1, _name_outside(model))
    for index in hold_each(model, track(range(layers), "saving", "layers")):
        write(index + 2, _name_layer(model, index))
    parameters = list(model.parameters())
    total = {
        "total_parameters": sum(parameter.numel() for parameter in parameters),
        "total_size": sum(parameter.nbytes for parameter in parameters),
    }
    content = json.dumps({"metadata": total, "weight_map": places}, indent=2, sort_keys=True)
    (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(f"{content}\n", encoding="utf-8")


def _detach(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: parameter.detach().cpu().contiguous() for name, parameter in parameters.items()}


def _name_outside(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if _find_layer(model, name) is None}


def _name_layer(model: PreTrainedModel, index: int) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if _find_layer(model, name) == index}


def _find_layer(model: PreTrainedModel, name: str) -> int | None:
    """Index of the decoder layer that a parameter belongs to; None outside of them."""
    path = f"{get_family(model.config).layers}."
    return int(name.removeprefix(path).split(".")[0]) if name.startswith(path) else None


def _fill(model: PreTrainedModel, files: Mapping[str, Path], wanted: Mapping[str, Tensor]) -> None:
    """Read some parameters, by their full names, into the model, on its device and in their own types."""
    first = next(model.parameters())
    device = torch.device("cpu") if first.is_meta else first.device
    tensors = {}
    for path in {files[name] for name in wanted}:
        with safe_open(path, "pt") as file:
            for name in wanted:
                if files[name] == path:
                    # Copied: pages of a mapped file would be read anew for every batch where memory is short.
                    tensors[name] = file.get_tensor(name).to(device, wanted[name].dtype, copy=True)
    model.load_state_dict(tensors, strict=False, assign=True)


def _check_shapes(model: PreTrainedModel, files: Mapping[str, Path]) -> None:
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    for path in set(files.values()):
        with safe_open(path, "pt") as file:
            for name in file.keys() & shapes.keys():
                if (found := file.get_slice(name).get_shape()) != shapes[name]:
                    raise ValueError(f"{name} is {found} in {path.name}, its config promises {shapes[name]}")
