"""Decoder layers that are kept apart, one of them whole in memory at a time, so that larger models can be pruned.

`offload.py` keeps them on disk, `splitting.py` in pieces over devices: `hold_layer` makes one whole for a while. A
model that is whole in memory goes through all functions here as if they were not there.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from gqaprune.common.console import track
from gqaprune.models.architecture import find_layer, get_layers
from gqaprune.models.families import get_family
from gqaprune.models.layerwise import embed_batches, replace_forward, run_layer

_METADATA = {"format": "pt"}
"""What transformers looks for in a file."""


class LayersApart(ABC):
    """Where a model's decoder layers are while they are not held; `keep_apart` gives a model one."""

    reason: ClassVar[str]
    """Which setting keeps them there, after "needs the whole model in memory, which"."""
    can_score_gates: ClassVar[bool]
    """Whether a layer is there fast enough to be made whole twice for every micro-batch."""

    @abstractmethod
    def hold(self, model: PreTrainedModel, index: int, changes: bool) -> AbstractContextManager[None]:
        """Have a layer whole in memory while the context lasts, as `hold_layer` says it."""


def keep_apart(model: PreTrainedModel, apart: LayersApart) -> None:
    """Give a model the place where its layers are from now on."""
    model.layers_apart = apart


def get_layers_apart(model: PreTrainedModel) -> LayersApart | None:
    """Where a model's layers are; None where they are whole in memory, or strategies take care of them."""
    return getattr(model, "layers_apart", None)


def are_layers_apart(model: PreTrainedModel) -> bool:
    """Whether a model's decoder layers are kept apart."""
    return get_layers_apart(model) is not None


@contextmanager
def hold_layer(model: PreTrainedModel, index: int, changes: bool = False) -> Iterator[None]:
    """Have the weights of a decoder layer whole in memory while the context lasts.

    Where layers are split over devices, every rank has to hold the same ones in the same order.

    Args:
        model: the causal LM; one that is whole in memory is left as it is.
        index: of the layer, which must not be held already.
        changes: keep the layer as it is at the end of the context, instead of as it was.
    """
    apart = get_layers_apart(model)
    with nullcontext() if apart is None else apart.hold(model, index, changes):
        yield


def hold_each(model: PreTrainedModel, indexes: Iterable[int], changed: Collection[int] = ()) -> Iterator[int]:
    """Go through decoder layers, each held while the loop's body runs; those in `changed` are kept as left."""
    for index in indexes:
        with hold_layer(model, index, changes=index in changed):
            yield index


@contextmanager
def hold_layers_that_run(model: PreTrainedModel) -> Iterator[None]:
    """Forwards of the model hold each layer while it runs, and again in the backward pass, which runs it anew.

    So one layer's weights and activations are in memory at a time, beside the hidden states between layers.
    """
    with ExitStack() as restored:
        if are_layers_apart(model):
            for index, layer in enumerate(get_layers(model)):
                restored.enter_context(replace_forward(layer, partial(_run_held, model, index, layer.forward)))
                restored.callback(setattr, layer, "training", layer.training)
                layer.training = False  # in which a layer would recompute by itself, when it is held no longer
        yield


def _run_held(model: PreTrainedModel, index: int, forward: Any, *arguments: Any, **keywords: Any) -> Any:
    def run(*arguments: Any, **keywords: Any) -> Any:
        with hold_layer(model, index):
            return forward(*arguments, **keywords)

    return checkpoint(run, *arguments, use_reentrant=False, preserve_rng_state=False, **keywords)


def named_parameters(model: PreTrainedModel) -> Iterator[tuple[str, nn.Parameter]]:
    """Every parameter with its full name, tied ones once; layers apart are held while theirs are looked at."""
    names = [name for name, _ in model.named_parameters()]  # in the model's order, which hashes depend on
    for layer, group in groupby(names, lambda name: _find_layer(model, name)):
        with nullcontext() if layer is None else hold_layer(model, layer):
            for name in group:
                yield name, model.get_parameter(name)


def move_model(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """Move a model to a device; layers apart stay where they are, and come to that device when they are held."""
    if not are_layers_apart(model):
        return model.to(device)
    inside = {module for layer in get_layers(model) for module in layer.modules()}
    for module in model.modules():
        if module not in inside:
            module._apply(lambda tensor: tensor.to(device), recurse=False)
    return model


def run_decoder_by_layer(model: PreTrainedModel, batches: Sequence[Tensor], description: str) -> list[Tensor]:
    """Output of the last decoder layer for each batch: all of them pass one layer before the next is held.

    Args:
        model: the causal LM.
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
    """Write the weights of a model whose layers are apart as transformers does, each layer's to a file of its own.

    Args:
        model: the causal LM.
        folder: where to.
    """
    layers = len(get_layers(model))
    places: dict[str, str] = {}

    def write(number: int, parameters: Mapping[str, Tensor]) -> None:
        file = f"model-{number:05}-of-{layers + 1:05}.safetensors"
        save_file(detach_parameters(parameters), folder / file, _METADATA)
        places.update(dict.fromkeys(parameters, file))

    write(1, name_outside(model))
    for index in hold_each(model, track(range(layers), "saving", "layers")):
        write(index + 2, name_layer(model, index))
    parameters = list(model.parameters())
    total = {
        "total_parameters": sum(parameter.numel() for parameter in parameters),
        "total_size": sum(parameter.numel() * parameter.itemsize for parameter in parameters),
    }
    content = json.dumps({"metadata": total, "weight_map": places}, indent=2, sort_keys=True)
    (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(f"{content}\n", encoding="utf-8")


def attend_writing(model: PreTrainedModel) -> None:
    """Hold each layer while another rank writes it."""
    for _ in hold_each(model, range(len(get_layers(model)))):
        pass


def detach_parameters(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Values of parameters, as files take them."""
    return {name: parameter.detach().cpu().contiguous() for name, parameter in parameters.items()}


def name_outside(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """Parameters outside of the decoder layers, by their full names."""
    return {name: parameter for name, parameter in model.named_parameters() if _find_layer(model, name) is None}


def name_layer(model: PreTrainedModel, index: int) -> dict[str, nn.Parameter]:
    """Parameters of a decoder layer, by their full names."""
    return {name: parameter for name, parameter in model.named_parameters() if _find_layer(model, name) == index}


def _find_layer(model: PreTrainedModel, name: str) -> int | None:
    """Index of the decoder layer that a parameter belongs to; None outside of them."""
    return find_layer(name, get_family(model.config).layers)
