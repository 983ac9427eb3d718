"""Work counted while a context lasts: operations of matrix products and attention, tokens that pass each layer."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from transformers import PreTrainedModel

from gqaprune.models.architecture import find_blocks
from gqaprune.models.layerwise import watch_inputs

Operation = Callable[..., Any]


class FlopCounter(TorchDispatchMode):
    """Counts; contexts nest, each with a total of its own. Factorisations and solutions are not counted.

    torch's own counter follows modules through their gradients, which `torch.autograd.grad` does not let it.

    Attributes:
        total: operations so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(
        self, operation: Any, types: Any, arguments: Sequence[Any] = (), keywords: Mapping[str, Any] | None = None
    ) -> Any:
        result = operation(*arguments, **(keywords or {}))
        name = operation._overloadpacket
        if name in flop_registry:
            self.total += flop_registry[name](*arguments, **(keywords or {}), out_val=result)
        elif name is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
            self.total += _count_attention(*arguments[:2])
        elif name is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward:
            self.total += _count_attention(*arguments[1:3]) * 5 // 2
        return result


@contextmanager
def count_tokens(model: PreTrainedModel) -> Iterator[list[int]]:
    """Tokens that each decoder layer of a model in memory is run on, to its MLP's output projection."""
    outputs = {block.key.layer: block.output for block in find_blocks(model) if block.key.kind == "mlp"}
    counts = [0] * len(outputs)

    def count(layer: int, x_NC: Tensor) -> None:
        counts[layer] += len(x_NC)

    with watch_inputs(outputs, count):
        yield counts


def _count_attention(query_BHTd: Tensor, key_BHSd: Tensor) -> int:
    """Two products of which causality leaves half."""
    return 2 * query_BHTd.numel() * key_BHSd.shape[2]


def count_forward(model: PreTrainedModel, batches: Sequence[Tensor]) -> int:
    """Operations of one forward pass with its logits."""
    with FlopCounter() as counter, torch.no_grad():
        for batch_BT in batches:
            model(batch_BT, use_cache=False)
    return counter.total
