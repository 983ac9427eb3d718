"""Unit gates: a factor of 1 on every unit's output, whose gradient is the unit's exact first-order Taylor term.

For a unit that leaves its block through columns C of W with input x, the derivative of the loss by its gate is
`Σ_t x_tC · ∂L/∂x_tC = Σ_{ij∈C} W_ij · ∂L/∂W_ij`: the summed Taylor term of those columns, with no weight gradient ever
computed. Gates are multiplied in by a forward-pre-hook, which survives gradient checkpointing and sharding.

Axes in tensor names: B samples, U units, T tokens, C columns.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from gqaprune.architecture import Block, BlockKey
from gqaprune.perplexity import sum_token_losses

Gates = Mapping[BlockKey, Tensor]


@contextmanager
def apply_gates(blocks: Sequence[Block], gates_BU: Gates) -> Iterator[None]:
    """Multiply gates onto the units of blocks while the context lasts.

    Args:
        blocks: blocks of one model.
        gates_BU: factors of each block, `[batch, units]` or `[1, units]`; blocks without an entry are left alone.
    """
    with ExitStack() as hooks:
        for block in blocks:
            if block.key in gates_BU:
                hook = _multiply_gate(gates_BU[block.key], block.columns_per_unit)
                handle = block.output.register_forward_pre_hook(hook)
                hooks.callback(handle.remove)
        yield


def compute_gate_gradients(
    model: PreTrainedModel, blocks: Sequence[Block], input_ids: Tensor
) -> tuple[dict[BlockKey, Tensor], Tensor]:
    """Gradient of every sample's loss by every gate, from one forward and one backward pass.

    Parameters must not require gradients (`freeze_parameters`), or their gradients are computed as well.

    Args:
        model: the causal LM, in eval mode.
        blocks: blocks to gate.
        input_ids: tokens `[batch, tokens]`.

    Returns:
        Gradients by block, float32 `[batch, units]`, and the mean loss of each sample in nats per token, `[batch]`.
    """
    device = input_ids.device
    gates_BU = {
        block.key: torch.ones(len(input_ids), block.units, device=device, requires_grad=True) for block in blocks
    }
    with apply_gates(blocks, gates_BU):
        logits = model(input_ids=input_ids, use_cache=False).logits
        losses_B, tokens_B = sum_token_losses(logits, input_ids)
        losses_B = losses_B / tokens_B
        # Samples do not touch each other, so the gradient of the sum holds each sample's own gradient.
        gradients = torch.autograd.grad(losses_B.sum(), list(gates_BU.values()))
    return dict(zip(gates_BU, gradients, strict=True)), losses_B.detach()


@contextmanager
def freeze_parameters(model: nn.Module) -> Iterator[None]:
    """Eval mode and no parameter gradients while the context lasts; restores both, also on parameters cut meanwhile.

    Where gradient checkpointing is on, it stays so: transformers' layers ask for their own training mode. What is in
    them, dropout among it, is in eval mode like all else.
    """
    required = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    was_training = model.training
    model.eval()
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.training = module.gradient_checkpointing
    model.requires_grad_(False)
    try:
        yield
    finally:
        model.train(was_training)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(required[name])


def _multiply_gate(gate_BU: Tensor, columns_per_unit: int) -> Any:
    def multiply(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        (x,) = inputs
        x_BTC = x if x.ndim == 3 else x.unflatten(0, (len(gate_BU), -1))  # MLPs beside experts see no samples
        gate_B1C = gate_BU.repeat_interleave(columns_per_unit, dim=1)[:, None]
        # The gate stays float32: its gradient is then summed over tokens in float32 whatever the activations' type.
        return ((x_BTC * gate_B1C).to(x.dtype).view_as(x),)

    return multiply
