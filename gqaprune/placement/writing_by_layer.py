"""Write the weights of a model whose decoder layers are in memory one at a time."""

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from gqaprune.common.console import track
from gqaprune.models.architecture import get_layers
from gqaprune.placement.layer_store import find_store, get_layer_parameters, get_outside_parameters
from gqaprune.placement.verification import check_tensors

_METADATA = {"format": "pt"}
"""Metadata that transformers expects in a file."""


def write_weights(model: PreTrainedModel, folder: Path) -> None:
    """Write a model's weights like transformers, with a file for each decoder layer.

    Args:
        model: the causal LM.
        folder: folder to write to.

    Raises:
        ValueError: if a written file differs from the model.
    """
    layers = len(get_layers(model))
    places: dict[str, str] = {}

    def write(number: int, parameters: Mapping[str, Tensor]) -> None:
        file = f"model-{number:05}-of-{layers + 1:05}.safetensors"
        tensors = detach_parameters(parameters)
        save_file(tensors, folder / file, _METADATA)
        check_tensors(tensors, dict.fromkeys(tensors, folder / file))  # while the layer is in memory
        places.update(dict.fromkeys(parameters, file))

    write(1, get_outside_parameters(model))
    for index in find_store(model).hold_each(track(range(layers), "saving", "layers")):
        write(index + 2, get_layer_parameters(model, index))
    parameters = list(model.parameters())
    total = {
        "total_parameters": sum(parameter.numel() for parameter in parameters),
        "total_size": sum(parameter.numel() * parameter.itemsize for parameter in parameters),
    }
    content = json.dumps({"metadata": total, "weight_map": places}, indent=2, sort_keys=True)
    (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(f"{content}\n", encoding="utf-8")


def attend_writing(model: PreTrainedModel) -> None:
    """Hold each layer while rank 0 writes it; called by all other ranks."""
    for _ in find_store(model).hold_each(range(len(get_layers(model)))):
        pass


def detach_parameters(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the values of parameters on the CPU, contiguous, as files need them."""
    return {name: parameter.detach().cpu().contiguous() for name, parameter in parameters.items()}
