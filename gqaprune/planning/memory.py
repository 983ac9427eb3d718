"""Estimate by formulas the memory that work on a model needs, on one device or several. Nothing is loaded or run."""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PretrainedConfig

from gqaprune.models.architecture import count_layer_parameters, count_parameters, get_layers, read_geometry
from gqaprune.models.families import get_family
from gqaprune.models.loading import build_without_weights
from gqaprune.models.losses import PIECE_LOGITS
from gqaprune.planning.costs.base import DOUBLE, SINGLE, share_of_panels
from gqaprune.surgery.distillation import RANK
from gqaprune.surgery.gram import WORKSPACE, chunk_rows, find_room
from gqaprune.surgery.refinement import STEP_TOKENS, TRAINING_BYTES
from gqaprune.surgery.repair_config import RepairConfig
from gqaprune.training.lora import list_projections
from gqaprune.training.recovery import RecoveryConfig

GIB = 2**30
_STEP_NUMBERS = 8
"""Numbers per token and channel in a step of refinement: four that the backward pass needs, and their gradients."""
PLACES = ("one device", "ddp", "fsdp", "sharded", "offload")
"""Where the model is: on one device; whole on each (DDP); sharded in recovery (FSDP); sharded in pruning as well;
or on disk, with only the layers in use on the device."""


@dataclass(frozen=True)
class ModelSizes:
    """Sizes of a model, on which its memory depends.

    Args:
        family: Hugging Face `model_type`.
        parameters: all parameters, tied ones counted once.
        decoder_parameters: parameters of the decoder layers.
        layers: number of decoder layers.
        hidden_size: width of the residual stream.
        vocabulary: rows of the embedding.
        head_dim: features per attention head.
        query_heads: query heads of all layers.
        kv_heads: KV heads of all layers.
        channels: MLP channels of all layers.
        query_head_range: fewest and most query heads of a layer.
        kv_head_range: fewest and most KV heads of a layer.
        channel_range: fewest and most channels of a layer.
        ratio_range: fewest and most query heads per KV head.
        layer_parameters: parameters of the largest layer.
        mlp_parameters: parameters of the projections of the largest MLP.
        adapter_parameters: parameters of LoRA adapters of the default rank on all projections.
    """

    family: str
    parameters: int
    decoder_parameters: int
    layers: int
    hidden_size: int
    vocabulary: int
    head_dim: int
    query_heads: int
    kv_heads: int
    channels: int
    query_head_range: tuple[int, int]
    kv_head_range: tuple[int, int]
    channel_range: tuple[int, int]
    ratio_range: tuple[int, int]
    layer_parameters: int
    mlp_parameters: int
    adapter_parameters: int


def read_sizes(config: PretrainedConfig, trust_remote_code: bool = False) -> ModelSizes:
    """Read a model's sizes from its config, by building it without weights.

    Raises:
        ValueError: if the family is not supported.
    """
    family, geometry = get_family(config), read_geometry(config)
    model = build_without_weights(config, trust_remote_code)
    linears = [(name, module) for name, module in get_layers(model).named_modules() if isinstance(module, nn.Linear)]
    projections = [module for name, module in linears if name.split(".")[-1] in list_projections(model.config)]
    adapters = sum(linear.in_features + linear.out_features for linear in projections) * RecoveryConfig.lora_rank
    return ModelSizes(
        family=config.model_type,
        parameters=count_parameters(model),
        decoder_parameters=sum(count_layer_parameters(model)),
        layers=geometry.num_layers,
        hidden_size=geometry.hidden_size,
        vocabulary=config.vocab_size,
        head_dim=geometry.head_dim,
        query_heads=sum(geometry.query_heads),
        kv_heads=sum(geometry.kv_heads),
        channels=sum(geometry.channels),
        query_head_range=find_range(geometry.query_heads),
        kv_head_range=find_range(geometry.kv_heads),
        channel_range=find_range(geometry.channels),
        ratio_range=find_range(geometry.ratios),
        layer_parameters=max(count_layer_parameters(model)),
        mlp_parameters=3 * geometry.hidden_size * max(geometry.channels) if family.mlp else 0,
        adapter_parameters=adapters,
    )


def estimate_memory(
    sizes: ModelSizes,
    itemsize: int,
    devices: int,
    tokens: int,
    calibration_tokens: int,
    gradient_checkpointing: bool = False,
) -> dict[str, dict[str, float | None]]:
    """Estimate the bytes per device that each kind of work needs in each place of `PLACES`.

    Symbols: `P` parameters of `b` bytes, `D` parameters of the largest layer, `E` parameters outside the decoder, `C`
    channels of the largest MLP, `A` parameters of adapters, `H` hidden size, `V` vocabulary, `t` tokens of a
    micro-batch, `c` calibration tokens, `N` devices, and `n` equal to `N`, or 1 on one device.

    - Activations that one backward pass keeps: `a = t · Σ over layers of (b · (4H + 2·query + 2·KV width + 4·channels)
      + 8H)`. Logits of recovery: `l = 2b · V · t + 8V · min(t, 2²⁴ / V)`, with their gradient and a piece in float32.
    - Scoring: `b·P + max(s + 8V · min(t, 2²⁴ / V) + g, b · H · c/n + s / layers + min(W, 24 · C²))`. Backward passes
      keep `s`, which is `a` without the inputs of projections (`b · 4H` per layer and token), whose weights have no
      gradient; at most 1,024 tokens or one window run at once, less than a micro-batch of several windows. Forward
      passes keep the hidden states of all windows. `W` is `WORKSPACE`, the bytes that Gram matrices and factors take at
      most, and `g = min(3/8 · W, 8 · layers · C²)` the Gram matrices that are summed during backward passes. A GPU with
      more free memory keeps more.
    - Repair: `b·P`, and what `count_repair` counts. Inputs and targets of an MLP, `2 · b · H · c/n`, are in the host's
      memory if a GPU has less space.
    - Distillation in repair: at most `b·P + 16·A·32/rank + a + l`, for adapters of rank 32 with float32 gradients and
      moments; it runs one window at a time.
    - Recovery: full `4b·P + a + l` (weights, gradients, two moments of AdamW); LoRA `b·P + 16·A + a + l`; distillation
      as full, plus `b·P` for the teacher and `t · V · b` for its logits.
    - DDP adds a copy of the gradients, `b·P` or `4·A`.
    - FSDP divides everything but activations and logits by `N`, and gathers `b · (3D + 2E)` at a time, twice with a
      teacher. Scoring and repair run before it and need as much as under DDP.
    - Gradient checkpointing keeps the hidden states between layers and one layer's activations, `b · H · t · layers +
      a / layers`, instead of `a`; the same holds for `s`, and `g` is 0.
    - Sharded pruning keeps `b · ((P − E)/N + 2D + E)` instead of `b·P`, and activations as with gradient checkpointing.
      Recovery is as with FSDP.
    - Offloading keeps two layers and the parameters outside the decoder, `b · (2D + E)`, instead of `b·P`. It runs no
      backward passes and no recovery.

    Args:
        sizes: sizes of the model.
        itemsize: bytes of a weight.
        devices: number of devices.
        tokens: tokens of a micro-batch.
        calibration_tokens: tokens of the calibration text.
        gradient_checkpointing: whether activations are recomputed in backward passes.

    Returns:
        Work -> place -> bytes; None if the work is not possible there.
    """
    b, t, h = itemsize, tokens, sizes.hidden_size
    weights, layer = b * sizes.parameters, b * sizes.layer_parameters
    outside = weights - b * sizes.decoder_parameters
    scored, trained = count_kept(sizes, itemsize, tokens)
    recomputed = [b * h * t * sizes.layers + activations / sizes.layers for activations in (scored, trained)]
    scoring_keeps, recovery_keeps = recomputed if gradient_checkpointing else (scored, trained)
    piece = count_piece(sizes, tokens)
    recovery_keeps += 2 * b * t * sizes.vocabulary + piece
    channels = sizes.channel_range[1]
    gram = min(WORKSPACE, 24 * channels**2)
    watched = 0 if gradient_checkpointing else min(WORKSPACE * 3 // 8, 8 * sizes.layers * channels**2)

    def repair(share: float) -> float:
        return count_repair(sizes, b, calibration_tokens, RepairConfig.holdout, channels, share=share)

    def score(share: float, kept: float | None = scoring_keeps + watched) -> float:
        forward = b * h * calibration_tokens * share + scored / sizes.layers + gram
        return forward if kept is None else max(kept + piece, forward)

    resident = 2 * layer + outside
    split = resident + (weights - outside) / devices
    needed: dict[str, dict[str, float | None]] = {
        "scoring": {
            "one device": weights + score(1),
            "ddp": weights + score(1 / devices),
            "fsdp": weights + score(1 / devices),
            "sharded": split + score(1 / devices, kept=recomputed[0]),
            "offload": resident + score(1, kept=None),
        },
        "repair": {
            "one device": weights + repair(1),
            "ddp": weights + repair(1 / devices),
            "fsdp": weights + repair(1 / devices),
            "sharded": split + repair(1 / devices),
            "offload": resident + repair(1),
        },
    }
    adapters = 16 * sizes.adapter_parameters * RANK // RecoveryConfig.lora_rank
    distilled = weights + adapters + trained + 2 * b * t * sizes.vocabulary + piece
    needed["repair, distillation"] = {"one device": distilled, "ddp": distilled, "fsdp": distilled}
    needed["repair, distillation"] |= {"sharded": None, "offload": None}
    # Bytes of state, of gradients that DDP copies, number of gathered models, bytes of a teacher's logits.
    recoveries = {
        "full": (4 * weights, weights, 1, 0),
        "lora": (weights + 16 * sizes.adapter_parameters, 4 * sizes.adapter_parameters, 1, 0),
        "distill": (5 * weights, weights, 2, t * sizes.vocabulary * b),
    }
    for mode, (state, copied, models, teacher_logits) in recoveries.items():
        fsdp = state / devices + models * (3 * layer + 2 * outside) + recovery_keeps + teacher_logits
        needed[f"recovery, {mode}"] = {
            "one device": state + recovery_keeps + teacher_logits,
            "ddp": state + copied + recovery_keeps + teacher_logits,
            "fsdp": fsdp,
            "sharded": fsdp,
            "offload": None,
        }
    return needed


def count_kept(sizes: ModelSizes, itemsize: int, tokens: int) -> tuple[float, float]:
    """Count the bytes of activations that a backward pass keeps, with frozen projections and with trained ones."""
    heads = sizes.head_dim * (sizes.query_heads + sizes.kv_heads)
    frozen = tokens * (itemsize * (2 * heads + 4 * sizes.channels) + sizes.layers * 8 * sizes.hidden_size)
    return frozen, frozen + tokens * sizes.layers * itemsize * 4 * sizes.hidden_size


def count_gram(size: int) -> float:
    """Count the bytes of a Gram matrix, of which panels hold the lower triangle."""
    return float(DOUBLE * size * size * share_of_panels(size, chunk_rows(size, size)))


def count_factor(size: int) -> float:
    """Count the bytes that a Cholesky factorisation needs besides the matrix: a panel, a copy and the result."""
    return float(3 * DOUBLE * size * _count_chunk(size, size))


def _count_chunk(rows: int, columns: int) -> int:
    """Count the rows of a matrix that are processed together."""
    return next((int(own.stop) for own in chunk_rows(rows, columns)), 0)


def count_repair(
    sizes: ModelSizes,
    itemsize: int,
    tokens: float,
    holdout: float,
    channels: int,
    room: float | None = None,
    share: float = 1.0,
) -> float:
    """Count the bytes that repair needs on a device besides the weights.

    These are two streams of hidden states and the inputs and targets of one MLP, its second moments, and the largest of
    three: the output of attention heads, a refit (factor, solution and weights), and a training step.

    Args:
        sizes: sizes of the model.
        itemsize: bytes of a weight.
        tokens: tokens of the calibration text.
        holdout: share of the tokens that is held out.
        channels: channels, after the cut, of the widest MLP that is refitted.
        room: bytes of matrices that the device holds, the others being elsewhere; by default those of a CPU, which are
            the fewest.
        share: share of the tokens that this device processes.
    """
    room = float(find_room(torch.device("cpu"))) if room is None else room
    hidden, fitted = sizes.hidden_size, tokens * (1 - holdout)
    matrix = hidden * channels
    moments = 2 * count_gram(channels) + 2 * DOUBLE * matrix
    attended = share * tokens * itemsize * sizes.head_dim * max(sizes.query_head_range)
    solved = 2 * DOUBLE * _count_chunk(hidden, channels) * channels
    kept = min(room, moments + count_gram(channels) + 3 * itemsize * matrix)
    step = share * fitted / max(1, fitted // STEP_TOKENS)
    trained = TRAINING_BYTES * 3 * matrix + _STEP_NUMBERS * SINGLE * step * channels
    states = 4 * itemsize * hidden * tokens * share
    moments = min(room, moments)
    return states + max(moments + attended, kept + max(count_factor(channels), solved), moments + trained)


def count_piece(sizes: ModelSizes, tokens: int) -> int:
    """Count the bytes of a piece of logits with its gradient in float32."""
    return 8 * min(tokens * sizes.vocabulary, PIECE_LOGITS)


def find_range(counts: tuple[int, ...]) -> tuple[int, int]:
    """Return the smallest and the largest count."""
    return min(counts), max(counts)
