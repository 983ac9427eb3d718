"""Unit gates: a factor of 1 on every unit's output, whose gradient is the unit's exact first-order Taylor term.

For a unit that leaves its block through columns C of W with input x, the derivative of the loss by its gate is
`Σ_t x_tC · ∂L/∂x_tC = Σ_{ij∈C} W_ij · ∂L/∂W_ij`: the summed Taylor term of those columns, without computing any weight
gradient. Gates are applied by a forward-pre-hook, which works with gradient checkpointing and sharding.

Axes in tensor names: B samples, U units, T tokens, C columns, c columns of one unit.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from gqaprune.models.architecture import Block
from gqaprune.models.layerwise import run_decoder
from gqaprune.models.losses import differentiate_losses
from gqaprune.plan import BlockKey

Gates = Mapping[BlockKey, Tensor]


@contextmanager
def apply_gates(blocks: Sequence[Block], gates_BU: Gates) -> Iterator[None]:
    """Multiply the units of blocks by gates within the context.

    Args:
        blocks: blocks of one model.
        gates_BU: factors of each block, `[batch, units]` or `[1, units]`; blocks without an entry are not changed.
    """
    with _hook_gates(blocks, gates_BU, _multiply_gate):
        yield


def compute_gate_gradients(
    model: PreTrainedModel, blocks: Sequence[Block], input_ids: Tensor
) -> tuple[dict[BlockKey, Tensor], Tensor]:
    """Compute the gradient of every sample's loss by every gate, with one forward and one backward pass.

    Parameters must not require gradients (`freeze_parameters`), or their gradients are computed as well.

    Args:
        model: the causal LM, in eval mode.
        blocks: blocks to gate.
        input_ids: tokens `[batch, tokens]`.

    Returns:
        Gradients by block, float32 `[batch, units]`, and the mean loss of each sample in nats per token, `[batch]`.
    """
    gates_BU = {
        block.key: torch.ones(len(input_ids), block.units, device=input_ids.device, requires_grad=True)
        for block in blocks
    }
    with _hook_gates(blocks, gates_BU, _OpenGate.apply):
        hidden_BTD = run_decoder(model, input_ids)
        # Samples are independent, so the gradient of the sum consists of each sample's gradient.
        losses_B, gradient_BTD = differentiate_losses(model, hidden_BTD, input_ids)
        gradients = torch.autograd.grad([hidden_BTD], list(gates_BU.values()), [gradient_BTD])
    return dict(zip(gates_BU, gradients, strict=True)), losses_B


@contextmanager
def freeze_parameters(model: nn.Module) -> Iterator[None]:
    """Set eval mode and turn off parameter gradients within the context; restore both, also on parameters cut in it.

    A model that recomputes activations in backward passes (`activation_checkpointing_enable`) also does so here.
    """
    required = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    was_training = model.training
    model.eval()
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):  # it recomputes only in training mode; its children do not
            module.training = module.gradient_checkpointing
    model.requires_grad_(False)
    try:
        yield
    finally:
        model.train(was_training)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(required[name])


@contextmanager
def _hook_gates(
    blocks: Sequence[Block], gates_BU: Gates, pass_gate: Callable[[Tensor, Tensor], Tensor]
) -> Iterator[None]:
    """Send the input of each block's output projection, `[batch, tokens, units, columns]`, through a gate."""

    def make_hook(units: int, gate_BU: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            (x,) = inputs
            x_BTC = x if x.ndim == 3 else x.unflatten(0, (len(gate_BU), -1))  # beside experts, samples are flattened
            return (pass_gate(x_BTC.unflatten(-1, (units, -1)), gate_BU).view_as(x),)

        return hook

    with ExitStack() as hooks:
        for block in blocks:
            if block.key in gates_BU:
                hook = make_hook(block.units, gates_BU[block.key])
                hooks.callback(block.output.register_forward_pre_hook(hook).remove)
        yield


def _multiply_gate(x_BTUc: Tensor, gate_BU: Tensor) -> Tensor:
    return (x_BTUc * gate_BU[:, None, :, None]).to(x_BTUc.dtype)


class _OpenGate(torch.autograd.Function):
    """A gate of 1: passes its input through; its gradient is `Σ x · g` over tokens and columns, in float32.

    A product with ones would cost another pass over the activations and a copy of them.
    """

    @staticmethod
    def forward(ctx: Any, x_BTUc: Tensor, gate_BU: Tensor) -> Tensor:
        """Return the input unchanged."""
        ctx.save_for_backward(x_BTUc)
        return x_BTUc.view_as(x_BTUc)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradient unchanged, and its products with the input."""
        (x_BTUc,), (gradient_BTUc,) = ctx.saved_tensors, gradients
        return gradient_BTUc, (x_BTUc.float() * gradient_BTUc.float()).sum((1, 3))
