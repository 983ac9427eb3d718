"""Where a model's decoder layers are while nothing works on them, so that a model larger than memory can be pruned.

`find_store` finds a model's store, which has a layer whole in memory while it is held. `DiskStore` and `ShardedStore`
keep the layers of large models, one in memory at a time; `MemoryStore` stands for a model that needs none of this, so
that code that goes layer by layer is the same for all three.
"""

import weakref
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from enum import Enum
from functools import partial
from itertools import groupby
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from gqaprune.common.console import track
from gqaprune.models.architecture import find_layer, get_layers
from gqaprune.models.families import get_family
from gqaprune.models.layerwise import embed_batches, replace_forward, run_layer


class Placement(Enum):
    """Where decoder layers are while nothing works on them. Out of memory, the value is the setting that does so."""

    MEMORY = "memory"
    DISK = "offload"
    DEVICES = "sharded"


class LayerStore(ABC):
    """The decoder layers of a model, each whole in memory while it is held.

    Args:
        model: the causal LM, which the store does not keep alive.
    """

    placement: ClassVar[Placement]

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = weakref.ref(model)

    @property
    def model(self) -> PreTrainedModel:
        """The causal LM."""
        model = self._model()
        assert model is not None, "a store is used while its model exists"
        return model

    @property
    def is_in_memory(self) -> bool:
        """Whether holding a layer does nothing: all are whole in memory, or a strategy has sharded the model."""
        return self.placement is Placement.MEMORY

    @abstractmethod
    def hold(self, index: int, changes: bool = False) -> AbstractContextManager[None]:
        """Have the weights of a decoder layer whole in memory while the context lasts.

        Where layers are sharded over devices, every rank has to hold the same ones in the same order.

        Args:
            index: of the layer, which must not be held already.
            changes: keep the layer as it is at the end of the context, instead of as it was.
        """

    def hold_each(self, indexes: Iterable[int], changed: Collection[int] = ()) -> Iterator[int]:
        """Go through decoder layers, each held while the loop's body runs; those in `changed` are kept as left."""
        for index in indexes:
            with self.hold(index, changes=index in changed):
                yield index

    @contextmanager
    def hold_running_layers(self) -> Iterator[None]:
        """Make forwards of the model hold each layer while it runs, and again in the backward pass, which reruns it.

        One layer's weights and activations are in memory at a time, beside the hidden states between layers.
        """
        with ExitStack() as restored:
            for index, layer in enumerate(get_layers(self.model)):
                restored.enter_context(replace_forward(layer, partial(self._run_held, index, layer.forward)))
                restored.callback(setattr, layer, "training", layer.training)
                layer.training = False  # in which a layer would recompute by itself, when it is held no longer
            yield

    def _run_held(self, index: int, forward: Any, *arguments: Any, **keywords: Any) -> Any:
        def run(*arguments: Any, **keywords: Any) -> Any:
            with self.hold(index):
                return forward(*arguments, **keywords)

        return checkpoint(run, *arguments, use_reentrant=False, preserve_rng_state=False, **keywords)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Every parameter with its full name, tied ones once; those of a layer while it is held."""
        model = self.model
        names = [name for name, _ in model.named_parameters()]  # in the model's order, which hashes depend on
        for layer, group in groupby(names, lambda name: _find_layer(model, name)):
            with nullcontext() if layer is None else self.hold(layer):
                for name in group:
                    yield name, model.get_parameter(name)

    def move_to(self, device: torch.device) -> None:
        """Move the model to a device; layers out of memory stay there, and are held on that device."""
        model = self.model
        inside = {module for layer in get_layers(model) for module in layer.modules()}
        for module in model.modules():
            if module not in inside:
                module._apply(lambda tensor: tensor.to(device), recurse=False)

    def run_decoder(self, batches: Sequence[Tensor], description: str) -> list[Tensor]:
        """Output of the last decoder layer for each batch: all of them pass one layer before the next is held.

        Args:
            batches: token ids, each `[batch, tokens]`.
            description: what the progress bar says.

        Returns:
            Hidden states, each `[batch, tokens, width]`.
        """
        model = self.model
        streams = embed_batches(model, batches)
        for layer in self.hold_each(track(range(len(get_layers(model))), description, "layers")):
            for stream in streams:
                stream.hidden_BTD = run_layer(model, layer, stream)
        return [stream.hidden_BTD for stream in streams]


class MemoryStore(LayerStore):
    """Layers that are whole in memory, or that a strategy has sharded: held or not, they are the same."""

    placement = Placement.MEMORY

    def hold(self, index: int, changes: bool = False) -> AbstractContextManager[None]:
        """Do nothing."""
        return nullcontext()

    @contextmanager
    def hold_running_layers(self) -> Iterator[None]:
        """Do nothing."""
        yield

    def move_to(self, device: torch.device) -> None:
        """Move the whole model."""
        self.model.to(device)


_STORES: weakref.WeakKeyDictionary[PreTrainedModel, LayerStore] = weakref.WeakKeyDictionary()
"""Model -> its store; models whose layers are in memory have no entry."""


def find_store(model: PreTrainedModel) -> LayerStore:
    """The store of a model's decoder layers; a `MemoryStore` for a model that was given none."""
    return _STORES.get(model) or MemoryStore(model)


def set_store(store: LayerStore) -> None:
    """Make a store the one of its model."""
    _STORES[store.model] = store


def remove_store(model: PreTrainedModel) -> None:
    """Treat a model's decoder layers as whole in memory from now on."""
    _STORES.pop(model, None)


def get_outside_parameters(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """Parameters outside of the decoder layers, by their full names."""
    return {name: parameter for name, parameter in model.named_parameters() if _find_layer(model, name) is None}


def get_layer_parameters(model: PreTrainedModel, index: int) -> dict[str, nn.Parameter]:
    """Parameters of a decoder layer, by their full names."""
    return {name: parameter for name, parameter in model.named_parameters() if _find_layer(model, name) == index}


def _find_layer(model: PreTrainedModel, name: str) -> int | None:
    """Index of the decoder layer that a parameter belongs to; None outside of them."""
    return find_layer(name, get_family(model.config).layers)
