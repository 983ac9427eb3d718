"""Decoder layers compiled by `torch.compile` for training steps, and for nothing else."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel

from gqaprune.models.architecture import get_layers
from gqaprune.models.wrapping import is_sharded


class CompiledLayers:
    """The decoder layers of a model, each compiled on its first call; layers of one shape share what is compiled.

    Args:
        model: the causal LM. What hooks into its layers outside of `running` finds them as they are.

    Raises:
        ValueError: if a strategy has sharded the weights.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        if is_sharded(model):
            raise ValueError(
                "model.compile compiles whole layers, which the strategy shards: set it to false, or trainer.strategy "
                "to ddp or auto"
            )
        self._layers = list(get_layers(model))
        # Layers that kept different counts are different programs; beyond the limit they would run as they are.
        limit = torch._dynamo.config.recompile_limit
        torch._dynamo.config.recompile_limit = max(limit, 2 * len(self._layers))
        self._calls = [torch.compile(layer._call_impl) for layer in self._layers]

    @contextmanager
    def running(self) -> Iterator[None]:
        """Calls of the layers are compiled while the context lasts."""
        for layer, call in zip(self._layers, self._calls, strict=True):
            layer._compiled_call_impl = call  # what `nn.Module.compile` sets
        try:
            yield
        finally:
            for layer in self._layers:
                layer._compiled_call_impl = None
