"""Estimate the peak memory of each stage on its device: weights, and everything that is in memory with them.

Backward passes, distillation and recovery use the formulas of `planning.memory`. For other stages the largest tensors
that exist at the same time are added up. With `n` tokens per call, `b` bytes per number, hidden size `h` and `C`
channels of the widest MLP, the forward pass of a layer takes `n · b · (2h + 3C)`: its input, the normalised input and
three products of the MLP.
"""

from collections.abc import Callable, Mapping

import torch

from gqaprune.models.losses import PIECE_LOGITS
from gqaprune.planning.costs.base import DOUBLE, SINGLE, Text
from gqaprune.planning.costs.curves import split_held_out, take_judged, take_tokens
from gqaprune.planning.memory import (
    ModelSizes,
    count_factor,
    count_gram,
    count_kept,
    count_piece,
    count_repair,
    estimate_memory,
)
from gqaprune.scoring.criteria.base import PIECE_TOKENS
from gqaprune.scoring.outliers import LOOKED_AT
from gqaprune.scoring.repaired_damage import FITTED_TOKENS
from gqaprune.surgery.gram import chunk_rows, find_room, share_room


def count_forward(sizes: ModelSizes, itemsize: int, tokens: int) -> float:
    """Count the bytes of a layer's forward pass."""
    return float(tokens * itemsize * (2 * sizes.hidden_size + 3 * sizes.channel_range[1]))


def find_matrix_room(memory: float, taken: float) -> int:
    """Return the bytes of matrices that a device may hold, as `find_room` does on the device itself.

    Args:
        memory: bytes of a GPU; infinite for a CPU, whose room is fixed.
        taken: bytes of the GPU that are in use.
    """
    return find_room(torch.device("cpu")) if memory == float("inf") else share_room(memory - taken)


def find_watch_room(sizes: ModelSizes, itemsize: int, text: Text, memory: float) -> int:
    """Return the bytes of matrices that a device may hold while it computes gradients of gates.

    Args:
        sizes: sizes of the model.
        itemsize: bytes of a weight.
        text: calibration text.
        memory: bytes of a GPU; infinite for a CPU.
    """
    heads = sizes.head_dim * (sizes.query_heads + sizes.kv_heads)
    widths = 7 * sizes.hidden_size * sizes.layers + 2 * heads + 3 * sizes.channels  # of all projections, both sides
    kept = _count_passed(text) * itemsize * widths
    return find_matrix_room(memory, itemsize * sizes.parameters + kept)


def peak_perplexity(sizes: ModelSizes, itemsize: int, text: Text) -> float:
    """Peak of perplexity: weights, hidden states, and a layer's forward pass or a piece of the logits."""
    tokens = min(text.batch, text.windows) * text.window
    logits = min(PIECE_LOGITS, tokens * sizes.vocabulary // 2) * _count_loss(itemsize)
    weights = itemsize * sizes.parameters
    return weights + tokens * itemsize * sizes.hidden_size + max(count_forward(sizes, itemsize, tokens), logits)


def peak_gates(sizes: ModelSizes, itemsize: int, text: Text) -> float:
    """Peak of criteria from gates: weights, and the activations that a backward pass keeps with frozen weights."""
    tokens = _count_passed(text)
    kept, _ = count_kept(sizes, itemsize, tokens)
    return itemsize * sizes.parameters + kept + count_piece(sizes, tokens // 2)


def peak_weight_gradients(
    sizes: ModelSizes, itemsize: int, text: Text, held: float = 0.0, by_sample: bool = False
) -> float:
    """Peak of criteria from weight gradients: weights, activations of a backward pass, and partial sums.

    Each gradient is freed as soon as it is used, so gradients do not count.

    Args:
        sizes: sizes of the model.
        itemsize: bytes of a weight.
        text: calibration text.
        held: bytes of partial sums per weight of the decoder, between the windows of a micro-batch.
        by_sample: whether windows run one by one.
    """
    tokens = text.window * (1 if by_sample else min(text.batch, text.windows))
    _, kept = count_kept(sizes, itemsize, tokens)
    held *= by_sample and min(text.batch, text.windows) > 1
    return itemsize * sizes.parameters + kept + count_piece(sizes, tokens // 2) + held * sizes.decoder_parameters


def peak_activations(sizes: ModelSizes, itemsize: int, text: Text) -> float:
    """Peak of criteria from activations: weights, hidden states of all text, a layer's pass, and inputs in float32."""
    tokens = _count_passed(text)
    hidden = text.tokens * itemsize * sizes.hidden_size
    inputs = tokens * sizes.channel_range[1] * SINGLE
    return itemsize * sizes.parameters + hidden + count_forward(sizes, itemsize, tokens) + inputs


def peak_brain_surgeon(sizes: ModelSizes, itemsize: int, text: Text) -> float:
    """Peak of `obs`: weights, hidden states, the widest Gram matrix, and its factorisation or a layer's pass."""
    hidden = text.tokens * itemsize * sizes.hidden_size
    tokens = _count_passed(text)
    channels = sizes.channel_range[1]
    work = max(count_factor(channels), count_forward(sizes, itemsize, tokens) + float(SINGLE * channels * channels))
    return itemsize * sizes.parameters + hidden + count_gram(channels) + work


def peak_watched_gates(sizes: ModelSizes, itemsize: int, text: Text, memory: float = float("inf")) -> float:
    """Peak of gates and `obs` together: the higher of both, with the Gram matrices that are summed in the gates' pass.

    Args:
        sizes: sizes of the model.
        itemsize: bytes of a weight.
        text: calibration text.
        memory: bytes of a GPU, which keeps as many matrices as it has room for; infinite for a CPU.
    """
    widest, query = count_gram(sizes.channel_range[1]), count_gram(sizes.head_dim * sizes.query_head_range[1])
    kept = min(float(find_watch_room(sizes, itemsize, text, memory)), sizes.layers * (widest + query))
    rated = peak_brain_surgeon(sizes, itemsize, text) + max(0.0, kept - widest)
    return max(peak_gates(sizes, itemsize, text) + kept, rated)


def peak_outliers(sizes: ModelSizes, itemsize: int, text: Text) -> float:
    """Peak of the search for outliers: as for criteria from activations, on little text."""
    return peak_activations(sizes, itemsize, take_tokens(text, LOOKED_AT))


def peak_curves(sizes: ModelSizes, itemsize: int, text: Text, holdout: float) -> float:
    """Peak of damage curves: weights, hidden states, a layer's Gram matrices, a factor, and error matrices.

    Copies of hidden states are in the host's memory and do not count.
    """
    fitted, _ = split_held_out(text, holdout)
    tokens = take_tokens(fitted, FITTED_TOKENS).tokens + take_judged(text, holdout).tokens
    channels, query = sizes.channel_range[1], sizes.head_dim * sizes.query_head_range[1]
    grams = count_gram(channels) + 2 * count_gram(query)
    rows = int(chunk_rows(sizes.hidden_size, channels)[0].stop)
    errors = 2 * itemsize * sizes.hidden_size * channels + 3 * DOUBLE * rows * channels
    dense = float(DOUBLE * (4 * query * query + 6 * sizes.hidden_size * query))
    work = max(count_gram(channels) + max(count_factor(channels), errors), dense)
    return itemsize * (sizes.parameters + tokens * sizes.hidden_size) + grams + work


def peak_repair(
    sizes: ModelSizes, itemsize: int, text: Text, holdout: float, channels: int, memory: float = float("inf")
) -> float:
    """Peak of repair: weights, and what `count_repair` counts.

    Args:
        sizes: sizes of the model.
        itemsize: bytes of a weight.
        text: calibration text.
        holdout: share of the batches that are held out.
        channels: channels, after the cut, of the widest MLP that is refitted.
        memory: bytes of a GPU, of which matrices take a part; infinite for a CPU.
    """
    _, judged = split_held_out(text, holdout)
    weights, streams = itemsize * sizes.parameters, 2 * itemsize * sizes.hidden_size * text.tokens
    room = find_matrix_room(memory, weights + streams)
    return weights + count_repair(sizes, itemsize, text.tokens, judged.tokens / text.tokens, channels, room)


def peak_sampling(sizes: ModelSizes, itemsize: int, documents: Text) -> float:
    """Peak of sampling: weights, the KV cache of all documents of a batch, and logits."""
    batch = min(documents.batch, documents.windows)
    cache = 2 * itemsize * sizes.head_dim * sizes.kv_heads * batch * documents.window
    return itemsize * sizes.parameters + cache + batch * sizes.vocabulary * _count_loss(itemsize)


def _count_passed(text: Text) -> int:
    """Count the tokens that criteria from gates and activations run at once."""
    return min(text.batch, text.windows, max(1, PIECE_TOKENS // text.window)) * text.window


def _count_loss(itemsize: int) -> int:
    """Count the bytes of a logit, its log-probability and, if the model is not in float32, a float32 copy."""
    return itemsize + SINGLE + SINGLE * (itemsize < SINGLE)


CRITERIA: Mapping[str, Callable[[ModelSizes, int, Text], float]] = {
    "fisher": peak_gates,
    "taylor": peak_gates,
    "param_first": lambda sizes, itemsize, text: peak_weight_gradients(sizes, itemsize, text),
    "param_second": lambda sizes, itemsize, text: peak_weight_gradients(sizes, itemsize, text, by_sample=True),
    "param_mix": lambda sizes, itemsize, text: peak_weight_gradients(sizes, itemsize, text, 2.0 * SINGLE, True),
    "vectorize": lambda sizes, itemsize, text: peak_weight_gradients(sizes, itemsize, text),
    "wanda": peak_activations,
    "wifv": peak_activations,
    "obs": peak_brain_surgeon,
}
"""Name -> function of (sizes, itemsize, text) to the peak in bytes."""


def list_long_peaks(sizes: ModelSizes, itemsize: int, calibration: Text, training: Text) -> dict[str, float]:
    """List the peaks of distillation in repair and of each recovery mode on one device, from `estimate_memory`.

    Args:
        sizes: sizes of the model.
        itemsize: bytes of a weight.
        calibration: calibration text.
        training: a micro-batch of training text.
    """
    step = training.batch * training.window
    needed = estimate_memory(sizes, itemsize, 1, step, calibration.tokens)
    window = estimate_memory(sizes, itemsize, 1, calibration.window, calibration.tokens)
    needed["repair, distillation"] = window["repair, distillation"]  # it runs one window at a time
    peaks = {name: places["one device"] or 0.0 for name, places in needed.items() if name not in ("scoring", "repair")}
    teacher = peaks["recovery, distill"] - peaks["recovery, full"]
    return peaks | {"recovery, lora+distill": peaks["recovery, lora"] + teacher}
