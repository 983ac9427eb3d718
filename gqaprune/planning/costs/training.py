"""Costs of recovery's steps, and of text that the model writes itself."""

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
"""Times that AdamW reads or writes a number of each parameter in a step: weight, gradient and two moments."""


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
        shape: of the pruned model.
        text: windows of the step, `batch` of them a micro-batch.
        mode: a mode of recovery.
        rank: of LoRA adapters.
        teacher: the dense model, if its predictions are not on disk.
        gradient_checkpointing: whether layers run once more in the backward pass.
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
    """Forward, backward to inputs and weights of everything, and AdamW."""
    back = add_costs(go_back_through_layer(shape, index, text) for index in range(len(shape.layers)))
    # A weight's gradient is a product of the same sizes as the layer's own.
    heads = add_costs(run_heads(shape, layer, text) for layer in shape.layers)
    weights = run_model(shape, text) + -1 * heads
    update = Cost(bytes_moved=float(_UPDATE * shape.itemsize * shape.weights))
    return run_model(shape, text) + back + run_head(shape, text) + weights + update


def cost_sampling(shape: ModelShape, documents: Text) -> Cost:
    """Cost of `sample_from_model`: every token is a forward pass of its own, with the cache of those before it.

    Args:
        shape: of the dense model.
        documents: a window for each, `batch` of them side by side.
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
