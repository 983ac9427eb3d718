"""`gqaprune inspect`: what a model holds and allows, what can go wrong, and what work on it needs."""

import json as json_format
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import nn
from transformers import PretrainedConfig

from gqaprune.commands.advice import write_advice
from gqaprune.commands.checkup import build_layers_table, check_layers, find_wrong_tensors, read_plan_of
from gqaprune.commands.reach import NAMES, Reach, measure_reach
from gqaprune.commands.risks import list_risks
from gqaprune.common.atomic_files import write_atomically
from gqaprune.data.windows import read_windows
from gqaprune.models.architecture import (
    count_layer_parameters,
    count_parameters,
    find_blocks,
    get_layers,
    read_geometry,
)
from gqaprune.models.families import get_family
from gqaprune.models.loading import DTYPES, build_without_weights, load
from gqaprune.models.losses import PIECE_LOGITS
from gqaprune.models.sources import load_config
from gqaprune.scoring.outliers import Outliers, find_outliers
from gqaprune.surgery.gram import WORKSPACE
from gqaprune.surgery.refinement import TRAINING_BYTES
from gqaprune.training.lora import list_projections
from gqaprune.training.recovery import RecoveryConfig

GIB = 2**30
PLACES = ("one device", "ddp", "fsdp", "sharded", "offload")
"""Where work is done: all on one device; whole on each; recovery split over all; pruning too; only what is in use on
the device."""


@dataclass(frozen=True)
class ModelSizes:
    """What a model holds.

    Args:
        family: Hugging Face `model_type`.
        parameters: all of them, tied ones once.
        decoder_parameters: of the decoder layers.
        layers: decoder layers.
        hidden_size: width of the residual stream.
        vocabulary: rows of the embedding.
        head_dim: features per attention head.
        query_heads: query heads, of all layers.
        kv_heads: KV heads, of all layers.
        channels: MLP channels, of all layers.
        query_head_range: fewest and most query heads of a layer.
        kv_head_range: fewest and most KV heads of a layer.
        channel_range: fewest and most channels of a layer.
        ratio_range: fewest and most query heads on one KV head.
        layer_parameters: of the largest layer.
        mlp_parameters: projections of the largest MLP.
        adapter_parameters: of LoRA adapters of the default rank on all projections.
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


def inspect(
    model: str,
    dtype: str = "auto",
    devices: int = 8,
    tokens: int = 2048,
    calibration_tokens: int = 65536,
    gradient_checkpointing: bool = False,
    outliers: bool = False,
    write_config: str | None = None,
    json: bool = False,
    trust_remote_code: bool = False,
) -> None:
    """Print what a model holds, which rates it allows, its risks, and the memory that work on it needs.

    Of a pruned checkpoint also what each layer lost, whether it keeps its ratio, and whether its tensors are those of
    its config. Weights are loaded for `outliers` only.

    Args:
        model: a folder, a `.gguf` file, a hub name, or `smollm2-135m`.
        dtype: type that the weights are to have, as `model.dtype`; `auto` is the config's own, else float32.
        devices: that DDP and FSDP spread over.
        tokens: of a micro-batch, all windows together, in training and in calibration.
        calibration_tokens: of all calibration windows together.
        gradient_checkpointing: memory with `model.gradient_checkpointing`.
        outliers: load the weights and look for units that carry massive activations, on the embedded text.
        write_config: file to write a configuration to, that is right for this model to begin with.
        json: print one JSON object instead of tables.
        trust_remote_code: run code that comes with the model. Pruned checkpoints do not need it here.

    Raises:
        ValueError: if there is no such model, or a number is out of its bounds.
    """
    for name, value in (("devices", devices), ("tokens", tokens), ("calibration_tokens", calibration_tokens)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    config = load_config(model, trust_remote_code)
    geometry, sizes = read_geometry(config), read_sizes(config, trust_remote_code)
    kind = (getattr(config, "dtype", None) or torch.float32) if dtype == "auto" else DTYPES[dtype]
    assert isinstance(kind, torch.dtype)
    type_name = str(kind).removeprefix("torch.")
    bytes_needed = estimate_memory(sizes, kind.itemsize, devices, tokens, calibration_tokens, gradient_checkpointing)
    weights = {name: sizes.parameters * of.itemsize for name, of in DTYPES.items() if isinstance(of, torch.dtype)}
    cache = geometry.kv_cache_bytes_per_token(kind.itemsize)
    reach = measure_reach(build_without_weights(config, trust_remote_code))
    found = look_for_outliers(model, trust_remote_code) if outliers else None
    outside = 1 - sizes.decoder_parameters / sizes.parameters
    risks = list_risks(config, geometry, outside, type_name, found)
    plan = read_plan_of(Path(model)) if Path(model).is_dir() else None
    wrong = find_wrong_tensors(Path(model), config, trust_remote_code) if Path(model).is_dir() else {}
    checks = check_layers(config, plan, wrong) if Path(model).is_dir() else []
    if write_config is not None:
        window = getattr(config, "max_position_embeddings", None) or 2048
        own = str(getattr(config, "dtype", None) or "bfloat16").removeprefix("torch.")
        advice = write_advice(model, geometry, sizes.parameters, own, window, reach, risks)
        write_atomically(Path(write_config), advice.encode())
    if json:
        memory = {work: {place: n and n / GIB for place, n in row.items()} for work, row in bytes_needed.items()}
        facts = {"model": model, "dtype": type_name, "devices": devices, "tokens": tokens}
        facts |= {"calibration_tokens": calibration_tokens, "gradient_checkpointing": gradient_checkpointing}
        facts |= {**asdict(sizes), "kv_cache_bytes_per_token": cache}
        facts |= {"reach": [asdict(one) for one in reach], "risks": risks, "weight_bytes": weights}
        facts |= {"layer_checks": [asdict(check) for check in checks], "wrong_outside": wrong.get(None, [])}
        facts |= {"memory_gib": memory}
        print(json_format.dumps(facts, indent=1))
        return
    console = Console()
    console.print(build_sizes_table(model, sizes, weights, cache))
    console.print(build_reach_table(reach))
    for one in reach:
        console.print(one.describe_step())
    if plan is not None or not geometry.is_uniform or wrong:
        console.print(build_layers_table(checks, plan.model if plan is not None else ""))
    for sentence in wrong.get(None, ()):
        console.print(f"[red]wrong[/]: {escape(sentence)}")
    for risk in risks:
        console.print(f"[yellow]risk[/]: {escape(risk)}")
    caption = f"{tokens:,} tokens a micro-batch, {calibration_tokens:,} of calibration, weights in {type_name}"
    caption += ", activations recomputed" if gradient_checkpointing else ""
    console.print(build_memory_table(bytes_needed, devices, caption))
    if write_config is not None:
        console.print(f"configuration  {write_config}", markup=False)


def look_for_outliers(model: str, trust_remote_code: bool = False) -> Outliers:
    """Load a model and find the units that carry massive activations on the embedded text."""
    loaded, tokenizer = load(model, trust_remote_code=trust_remote_code)
    windows = read_windows(tokenizer, ["embedded"], window=512, count=16)
    return find_outliers(loaded, find_blocks(loaded), list(windows.split(2)))


def read_sizes(config: PretrainedConfig, trust_remote_code: bool = False) -> ModelSizes:
    """Count what a model of a config holds, on a model without weights.

    Raises:
        ValueError: if the family is not supported.
    """
    family, geometry = get_family(config), read_geometry(config)
    model = build_without_weights(config, trust_remote_code)
    linears = [(name, module) for name, module in get_layers(model).named_modules() if isinstance(module, nn.Linear)]
    projections = [module for name, module in linears if name.split(".")[-1] in list_projections(model)]
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
    """Bytes per device that each work needs in each place of `PLACES`; None where it is not done.

    With `P` parameters of `b` bytes, `D` those of the largest layer, `E` those outside the decoder, `M` and `C` the
    projections and channels of the largest MLP, `A` those of the adapters, `H` the hidden size, `V` the vocabulary, `t`
    tokens of a micro-batch, `c` of calibration, over `N` devices:

    - activations `a = t · Σ over layers of (b · (4H + 2·query + 2·KV width + 4·channels) + 8H)`: what one backward pass
      keeps; of recovery's logits `l = 2b · V · t + 8V · min(t, 2²⁴ / V)`, with their gradient, and a piece in float32
    - scoring `b·P + max(s + 8V · min(t, 2²⁴ / V), b · H · c/n + s / layers + min(W, 24 · C²))`. Backward passes keep
      `s`, which is `a` without the inputs of projections, whose weights have no gradient, `b · 4H` a layer and token:
      of 1,024 tokens or one window at most, less where a micro-batch is several windows. Forward passes keep the
      hidden states of all windows; `n` is `N`, or 1 on one device; `W` bytes, `WORKSPACE`, are the most that Gram
      matrices and the work on them take on the device
    - repair `b · (P + D) + 4 · b · H · c/n + max(18 · M, b · Q · c/n) + min(W, 40 · C · (C + H))`: two streams of
      hidden states, inputs and targets of one MLP, its float32 copies and optimizer or, before, what attention gave,
      `Q` wide, and second moments with their factor. Inputs and targets, half of the second term, lie in the host's
      memory where a GPU has less room
    - recovery: full `4b·P + a + l` (weights, gradients, two moments of AdamW), LoRA `b·P + 16·A + a + l`,
      distillation full, `b·P` of the teacher and `t · V · b` of its logits
    - DDP adds a copy of the gradients, `b·P` or `4·A`
    - FSDP divides all but activations and logits by `N` and gathers `b · (3D + 2E)` at a time, twice with a teacher;
      scoring and repair come before it and need what they need under DDP
    - gradient checkpointing keeps the hidden states between layers and one layer's activations, `b · H · t · layers +
      a / layers`, instead of `a`, and alike for `s`
    - sharded pruning keeps `b · ((P − E)/N + 2D + E)` instead of `b·P`, and what gradient checkpointing keeps; recovery
      is FSDP's
    - offload keeps two layers and what lies outside the decoder, `b · (2D + E)`, instead of `b·P`, and makes no
      backward passes; no recovery
    """
    b, t, h = itemsize, tokens, sizes.hidden_size
    weights, layer = b * sizes.parameters, b * sizes.layer_parameters
    outside = weights - b * sizes.decoder_parameters
    heads = sizes.head_dim * (sizes.query_heads + sizes.kv_heads)
    scored = t * (b * (2 * heads + 4 * sizes.channels) + sizes.layers * 8 * h)
    trained = scored + t * sizes.layers * b * 4 * h
    recomputed = [b * h * t * sizes.layers + activations / sizes.layers for activations in (scored, trained)]
    scoring_keeps, recovery_keeps = recomputed if gradient_checkpointing else (scored, trained)
    piece = 8 * min(t * sizes.vocabulary, PIECE_LOGITS)
    recovery_keeps += 2 * b * t * sizes.vocabulary + piece
    channels = sizes.channel_range[1]
    gram = min(WORKSPACE, 24 * channels**2)

    def repair(share: float) -> float:
        own = calibration_tokens * share
        moments = min(WORKSPACE, 40 * channels * (channels + h))
        attended = own * b * sizes.head_dim * max(sizes.query_head_range)
        return layer + 4 * own * b * h + max(TRAINING_BYTES * sizes.mlp_parameters, attended) + moments

    def score(share: float, kept: float | None = scoring_keeps) -> float:
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
    # State that stays, gradients that DDP copies, how many models are gathered, what else a micro-batch needs.
    recoveries = {
        "full": (4 * weights, weights, 1, 0),
        "lora": (weights + 16 * sizes.adapter_parameters, 4 * sizes.adapter_parameters, 1, 0),
        "distill": (5 * weights, weights, 2, t * sizes.vocabulary * b),
    }
    for mode, (state, copied, models, taught) in recoveries.items():
        fsdp = state / devices + models * (3 * layer + 2 * outside) + recovery_keeps + taught
        needed[f"recovery, {mode}"] = {
            "one device": state + recovery_keeps + taught,
            "ddp": state + copied + recovery_keeps + taught,
            "fsdp": fsdp,
            "sharded": fsdp,
            "offload": None,
        }
    return needed


def build_sizes_table(model: str, sizes: ModelSizes, weights: Mapping[str, int], cache: int) -> Table:
    """One row per quantity."""
    table = Table(title=f"{model}: {sizes.family}", title_justify="left", show_header=False)
    table.add_column("", no_wrap=True)
    table.add_column("", justify="right", no_wrap=True)
    for label, value in (
        ("parameters", f"{sizes.parameters:,}"),
        ("decoder parameters", f"{sizes.decoder_parameters:,}"),
        ("layers", str(sizes.layers)),
        ("query heads", show_range(sizes.query_head_range)),
        ("KV heads", show_range(sizes.kv_head_range)),
        ("query heads per KV head", show_range(sizes.ratio_range)),
        ("head_dim", str(sizes.head_dim)),
        ("MLP channels", show_range(sizes.channel_range)),
        ("KV-cache bytes/token", f"{cache:,}"),
        *((f"weights in {name}", f"{size / 1e6:,.1f} MB") for name, size in weights.items()),
    ):
        table.add_row(label, value)
    return table


def build_reach_table(reach: Sequence[Reach]) -> Table:
    """One row per kind of block, and one for both."""
    caption = (
        "shares of the decoder layers' parameters, one unit staying in each block; the default leaves the ends whole"
    )
    table = Table(title="rates that are reachable", caption=caption, caption_style="dim", title_justify="left")
    for name in ("", "parameters/unit", "parameters/block", "by default", "in all layers"):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    for one in reach:
        block = one.units * one.unit_parameters
        shares = f"{one.reachable:.1%}", f"{one.reachable_anywhere:.1%}"
        table.add_row(f"{one.kind}: {NAMES[one.kind]}s", f"{one.unit_parameters:,}", f"{block:,}", *shares)
    if len(reach) > 1:
        total = sum(one.reachable for one in reach), sum(one.reachable_anywhere for one in reach)
        table.add_row("both", "", "", *(f"{share:.1%}" for share in total))
    return table


def build_memory_table(
    bytes_needed: Mapping[str, Mapping[str, float | None]], devices: int, caption: str = ""
) -> Table:
    """One row per work, one column per place, in GiB."""
    table = Table(
        title="memory per device, GiB (estimated)", caption=caption, caption_style="dim", title_justify="left"
    )
    table.add_column("", no_wrap=True)
    for place in PLACES:
        table.add_column(
            f"{place}, {devices}" if place in ("ddp", "fsdp", "sharded") else place, justify="right", no_wrap=True
        )
    for work, row in bytes_needed.items():
        table.add_row(work, *("–" if row[place] is None else f"{(row[place] or 0) / GIB:,.2f}" for place in PLACES))
    return table


def find_range(counts: tuple[int, ...]) -> tuple[int, int]:
    """Smallest and largest."""
    return min(counts), max(counts)


def show_range(counts: tuple[int, int]) -> str:
    """Smallest and largest in words, once where they are equal."""
    return f"{counts[0]:,}" if counts[0] == counts[1] else f"{counts[0]:,} – {counts[1]:,}"
