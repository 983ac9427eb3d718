"""Stores of decoder layers, which keep the layers that are not in use, to prune models larger than memory.

`find_store` finds a model's store, which brings a layer into memory while it is held. `DiskStore` and `ShardedStore`
keep the layers of large models, with one in memory at a time; `MemoryStore` is for models in memory, so that code that
works layer by layer is the same for all three.
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
    """Where unused decoder layers are. The value is the setting under `pruning` that keeps them out of memory."""

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
        assert model is not None, "use a store only while its model exists"
        return model

    @property
    def is_in_memory(self) -> bool:
        """Whether holding a layer does nothing, because all are in memory or a strategy has sharded the model."""
        return self.placement is Placement.MEMORY

    @abstractmethod
    def hold(self, index: int, changes: bool = False) -> AbstractContextManager[None]:
        """Bring the weights of a decoder layer into memory, whole, within the context.

        If layers are sharded over devices, every rank must hold the same ones in the same order.

        Args:
            index: index of the layer, which must not be held already.
            changes: keep changes that are made to the layer within the context.
        """

    def hold_each(self, indexes: Iterable[int], changed: Collection[int] = ()) -> Iterator[int]:
        """Iterate over decoder layers, holding each in the loop's body; changes to those in `changed` are kept."""
        for index in indexes:
            with self.hold(index, changes=index in changed):
                yield index

    @contextmanager
    def hold_running_layers(self) -> Iterator[None]:
        """Make forward passes hold each layer while it runs, and again in the backward pass, which recomputes it.

        Only one layer's weights and activations are in memory at a time, and the hidden states between layers.
        """
        with ExitStack() as restored:
            for index, layer in enumerate(get_layers(self.model)):
                restored.enter_context(replace_forward(layer, partial(self._run_held, index, layer.forward)))
                restored.callback(setattr, layer, "training", layer.training)
                layer.training = False  # else a layer could recompute by itself when it is no longer held
            yield

    def _run_held(self, index: int, forward: Any, *arguments: Any, **keywords: Any) -> Any:
        def run(*arguments: Any, **keywords: Any) -> Any:
            with self.hold(index):
                return forward(*arguments, **keywords)

        return checkpoint(run, *arguments, use_reentrant=False, preserve_rng_state=False, **keywords)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield every parameter with its full name, tied ones once; those of a layer are yielded while it is held."""
        model = self.model
        names = [name for name, _ in model.named_parameters()]  # in the model's order, because hashes depend on it
        for layer, group in groupby(names, lambda name: _find_layer(model, name)):
            with nullcontext() if layer is None else self.hold(layer):
                for name in group:
                    yield name, model.get_parameter(name)

    def move_to(self, device: torch.device) -> None:
        """Move the model to a device; layers out of memory stay where they are, and are held on that device."""
        model = self.model
        inside = {module for layer in get_layers(model) for module in layer.modules()}
        for module in model.modules():
            if module not in inside:
                module._apply(lambda tensor: tensor.to(device), recurse=False)

    def run_decoder(self, batches: Sequence[Tensor], description: str) -> list[Tensor]:
        """Run the decoder on batches; all of them pass one layer before the next layer is held.

        Args:
            batches: token ids, each `[batch, tokens]`.
            description: text of the progress bar.

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
    """Layers that are whole in memory, or that a strategy has sharded; holding them does nothing."""

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
    """Find the store of a model's decoder layers; a `MemoryStore` if it has no other."""
    return _STORES.get(model) or MemoryStore(model)


def set_store(store: LayerStore) -> None:
    """Set the store of its model."""
    _STORES[store.model] = store


def remove_store(model: PreTrainedModel) -> None:
    """Remove a model's store, so that its decoder layers count as whole in memory."""
    _STORES.pop(model, None)


def get_outside_parameters(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """Return the parameters outside of the decoder layers, by their full names."""
    return {name: parameter for name, parameter in model.named_parameters() if _find_layer(model, name) is None}


def get_layer_parameters(model: PreTrainedModel, index: int) -> dict[str, nn.Parameter]:
    """Return the parameters of a decoder layer, by their full names."""
    return {name: parameter for name, parameter in model.named_parameters() if _find_layer(model, name) == index}


def _find_layer(model: PreTrainedModel, name: str) -> int | None:
    """Find the index of a parameter's decoder layer; None outside of the layers."""
    return find_layer(name, get_family(model.config).layers)
