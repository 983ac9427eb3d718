"""Decoder layers compiled by `torch.compile` for training steps, and for nothing else."""

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
    """Compile the decoder layers of a model, each on its first call; layers of one shape share what is compiled.

    Args:
        is_on: whether to compile; if not, layers run as they are.
    """

    def __init__(self, is_on: bool) -> None:
        self.is_on = is_on
        self._calls: list[tuple[nn.Module, Callable[..., Any]]] = []

    def rehearse(self, device: torch.device) -> None:
        """Compile one operation, if layers are to be compiled, before any work.

        Raises:
            ValueError: if torch cannot compile here, such as without a C++ compiler on a CPU.
        """
        if not self.is_on:
            return
        try:
            torch.compile(torch.sin)(torch.ones(2, device=device))
        except Exception as error:  # of many kinds, by backend
            raise ValueError(f"torch cannot compile here: {first_line(error)}; set model.compile to false") from None

    @contextmanager
    def compiled(self, model: PreTrainedModel) -> Iterator[None]:
        """Run calls of the layers compiled while the context lasts; whatever hooks into them later finds them plain.

        Args:
            model: the causal LM, the same in every call until `reset`.

        Raises:
            ValueError: if a strategy has sharded the weights.
        """
        if self.is_on and not self._calls:
            self._calls = _compile_layers(model)
        for layer, call in self._calls:
            layer._compiled_call_impl = call  # what `nn.Module.compile` sets
        try:
            yield
        finally:
            for layer, _ in self._calls:
                layer._compiled_call_impl = None

    def reset(self) -> None:
        """Forget what was compiled, once layers have other shapes: their programs would count towards the limit."""
        if self._calls:
            self._calls = []
            torch.compiler.reset()


def _compile_layers(model: PreTrainedModel) -> list[tuple[nn.Module, Callable[..., Any]]]:
    if is_sharded(model):
        raise ValueError(
            "model.compile compiles whole layers, which the strategy shards: set it to false, or trainer.strategy "
            "to ddp or auto"
        )
    layers = list(get_layers(model))
    # Layers that kept different counts are different programs; beyond the limit they would run as they are.
    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.config.recompile_limit = max(limit, 2 * len(layers))
    return [(layer, torch.compile(layer._call_impl)) for layer in layers]
