"""Costs of training steps of recovery, and of text that the model writes."""

from gqaprune.planning.costs.base import (
    SINGLE,
    Cost,
    ModelShape,
    Text,
    add_costs,
    go_back_through_layer,
    multiply,
    run_decoder,
    run_head,
    run_heads,
    run_model,
)
from gqaprune.planning.costs.repair import cost_adapted_step, count_adapters

_UPDATE = 7
"""Numbers that a step of AdamW reads or writes per parameter: of weight, gradient and two moments."""


def cost_recovery_step(
    shape: ModelShape,
    text: Text,
    mode: str,
    rank: int,
    *,
    teacher: ModelShape | None = None,
    gradient_checkpointing: bool = False,
) -> Cost:
    """Cost of one optimizer step of recovery.

    Args:
        shape: shape of the pruned model.
        text: windows of the step, in micro-batches of `batch` windows.
        mode: a mode of recovery.
        rank: rank of LoRA adapters.
        teacher: shape of the dense model, if its predictions are not on disk.
        gradient_checkpointing: whether layers run again in the backward pass.
    """
    if "lora" in mode:
        step = cost_adapted_step(shape, text, rank)
        step += Cost(bytes_moved=float(_UPDATE * SINGLE * count_adapters(shape, rank)))
    else:
        step = cost_full_step(shape, text)
    if gradient_checkpointing:
        step += run_decoder(shape, text)
    if "distill" in mode and teacher is not None:
        step += run_model(teacher, text)
    return step


def cost_full_step(shape: ModelShape, text: Text) -> Cost:
    """Cost of a step that trains all weights: forward, backward by inputs and weights, and AdamW."""
    back = add_costs(go_back_through_layer(shape, index, text) for index in range(len(shape.layers)))
    # The gradient of a weight costs as much as the forward product with it.
    heads = add_costs(run_heads(shape, layer, text) for layer in shape.layers)
    weights = run_model(shape, text) + -1 * heads
    update = Cost(bytes_moved=float(_UPDATE * shape.itemsize * shape.weights))
    return run_model(shape, text) + back + run_head(shape, text) + weights + update


def cost_sampling(shape: ModelShape, documents: Text) -> Cost:
    """Cost of `sample_from_model`: one forward pass per token, with a cache of the tokens before it.

    Args:
        shape: shape of the dense model.
        documents: one window for each document, in batches that are written together.
    """
    steps, written = documents.window - 1, documents.windows * (documents.window - 1)
    read = Text(documents.calls * steps, 1, 1)  # calls in which weights are read
    seen = documents.windows * documents.window * steps / 2
    cost = multiply(read, shape.hidden, shape.vocabulary, shape.itemsize, written)
    for layer in shape.layers:
        for inputs, outputs in (
            (shape.hidden, layer.query + 2 * layer.kv),
            (layer.query, shape.hidden),
            (shape.hidden, 3 * (layer.channels + layer.expert_channels)),
        ):
            cost += multiply(read, inputs, outputs, shape.itemsize, written)
        cost += Cost(flops=4.0 * seen * layer.query, bytes_moved=2.0 * shape.itemsize * seen * layer.kv)
    return cost + Cost(host_bytes=float(SINGLE * written * shape.vocabulary))
