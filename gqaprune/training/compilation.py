"""Compile decoder layers with `torch.compile`, for training steps only."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from gqaprune.common.errors import first_line
from gqaprune.models.architecture import get_layers
from gqaprune.models.wrapping import is_sharded


class LayerCompiler:
    """Compiles the decoder layers of a model, each on its first call; layers of the same shape share their program.

    Args:
        is_on: whether to compile; if not, layers run as they are.
    """

    def __init__(self, is_on: bool) -> None:
        self.is_on = is_on
        self._calls: list[tuple[nn.Module, Callable[..., Any]]] = []

    def rehearse(self, device: torch.device) -> None:
        """Compile one operation before any work, if compilation is on.

        Raises:
            ValueError: if torch cannot compile here, for example on a CPU without a C++ compiler.
        """
        if not self.is_on:
            return
        try:
            torch.compile(torch.sin)(torch.ones(2, device=device))
        except Exception as error:  # each backend raises its own kind
            raise ValueError(f"torch cannot compile here: {first_line(error)}; set model.compile to false") from None

    @contextmanager
    def compiled(self, model: PreTrainedModel) -> Iterator[None]:
        """Run the layers compiled within the context; outside of it they run as they are.

        Args:
            model: the causal LM, the same in every call until `reset`.

        Raises:
            ValueError: if a strategy has sharded the weights.
        """
        if self.is_on and not self._calls:
            self._calls = _compile_layers(model)
        for layer, call in self._calls:
            layer._compiled_call_impl = call  # `nn.Module.compile` sets the same attribute
        try:
            yield
        finally:
            for layer, _ in self._calls:
                layer._compiled_call_impl = None

    def reset(self) -> None:
        """Forget the compiled programs when layers change shape, because old ones count towards the limit."""
        if self._calls:
            self._calls = []
            torch.compiler.reset()


def _compile_layers(model: PreTrainedModel) -> list[tuple[nn.Module, Callable[..., Any]]]:
    if is_sharded(model):
        raise ValueError(
            "model.compile compiles whole layers, but the strategy shards them: set model.compile to false, or "
            "trainer.strategy to ddp or auto"
        )
    layers = list(get_layers(model))
    # Layers with different counts need different programs; beyond the limit, layers would run uncompiled.
    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.config.recompile_limit = max(limit, 2 * len(layers))
    return [(layer, torch.compile(layer._call_impl)) for layer in layers]
