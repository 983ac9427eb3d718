"""`gqaprune inspect`: what a model holds, and the memory that each kind of work needs, from its config alone."""

import json as json_format
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from gqaprune.architecture import count_layer_parameters, count_parameters, get_layers, read_geometry
from gqaprune.families import get_family
from gqaprune.loading import DTYPES, load_config
from gqaprune.losses import PIECE_LOGITS
from gqaprune.per_layer import get_per_layer_class
from gqaprune.recovery import RecoveryConfig, list_projections

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
    json: bool = False,
    trust_remote_code: bool = False,
) -> None:
    """Print what a model holds and the memory that work on it needs; its weights are not loaded.

    Args:
        model: a folder, a `.gguf` file, a hub name, or `smollm2-135m`.
        dtype: type that the weights are to have, as `model.dtype`; `auto` is the config's own, else float32.
        devices: that DDP and FSDP spread over.
        tokens: of a micro-batch, all windows together, in training and in calibration.
        calibration_tokens: of all calibration windows together.
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
    bytes_needed = estimate_memory(sizes, kind.itemsize, devices, tokens, calibration_tokens)
    weights = {name: sizes.parameters * of.itemsize for name, of in DTYPES.items() if isinstance(of, torch.dtype)}
    cache = geometry.kv_cache_bytes_per_token(kind.itemsize)
    if json:
        memory = {work: {place: n and n / GIB for place, n in row.items()} for work, row in bytes_needed.items()}
        facts = {"model": model, "dtype": str(kind).removeprefix("torch."), "devices": devices, "tokens": tokens}
        facts |= {"calibration_tokens": calibration_tokens, **asdict(sizes), "kv_cache_bytes_per_token": cache}
        print(json_format.dumps(facts | {"weight_bytes": weights, "memory_gib": memory}, indent=1))
        return
    console = Console()
    console.print(build_sizes_table(model, sizes, weights, cache))
    caption = f"{tokens:,} tokens a micro-batch, {calibration_tokens:,} of calibration, weights in {kind}"
    console.print(build_memory_table(bytes_needed, devices, caption.replace("torch.", "")))


def read_sizes(config: PretrainedConfig, trust_remote_code: bool = False) -> ModelSizes:
    """Count what a model of a config holds, on a model without weights.

    Raises:
        ValueError: if the family is not supported.
    """
    family, geometry = get_family(config), read_geometry(config)
    model = _build_without_weights(config, trust_remote_code)
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
        query_head_range=_find_range(geometry.query_heads),
        kv_head_range=_find_range(geometry.kv_heads),
        channel_range=_find_range(geometry.channels),
        ratio_range=_find_range(geometry.ratios),
        layer_parameters=max(count_layer_parameters(model)),
        mlp_parameters=3 * geometry.hidden_size * max(geometry.channels) if family.mlp else 0,
        adapter_parameters=adapters,
    )


def estimate_memory(
    sizes: ModelSizes, itemsize: int, devices: int, tokens: int, calibration_tokens: int
) -> dict[str, dict[str, float | None]]:
    """Bytes per device that each work needs in each place of `PLACES`; None where it is not done.

    With `P` parameters of `b` bytes, `D` those of the largest layer, `E` those outside the decoder, `M` and `C` the
    projections and channels of the largest MLP, `A` those of the adapters, `H` the hidden size, `V` the vocabulary, `t`
    tokens of a micro-batch, `c` of calibration, over `N` devices:

    - activations `a = t · (Σ over layers of b · (4H + 4·query + 4·KV width + 4·channels) + 8H)`: what one backward pass
      keeps; logits `l = (2b + 8) · V` a token, with their gradients in the weights' type and in float32
    - scoring `b·P + a + l · min(t, 2²⁴ / V) + 16 · C²`: it never has more logits than that at once, nor more
      activations than 1,024 tokens or one window have: less where a micro-batch is several windows
    - repair `b · (P + D) + 2 · b · H · c/n + H · (b + 4) · c/n + (20 + b) · M + 32 · C²`, `n` being `N`, or 1 on one
      device: two streams of hidden states, the tokens of one MLP, its float32 copies and optimizer, second moments
    - recovery: full `4b·P + a + l·t` (weights, gradients, two moments of AdamW), LoRA `b·P + 16·A + a + l·t`,
      distillation full, `b·P` of the teacher and `t · V · b` of its logits
    - DDP adds a copy of the gradients, `b·P` or `4·A`
    - FSDP divides all but activations and logits by `N` and gathers `b · (3D + 2E)` at a time, twice with a teacher;
      scoring and repair come before it and need what they need under DDP
    - sharded pruning keeps `b · ((P − E)/N + 2D + E)` instead of `b·P`; a backward pass of its scoring keeps the hidden
      states between layers and one layer's activations, `b · H · t · layers + a / layers`, instead of `a`, and forward
      passes alone those of all windows, `b · H · c/N`; recovery is FSDP's
    - offload keeps two layers and what lies outside the decoder, `b · (2D + E)`, instead of `b·P`; its scoring has no
      backward pass, and keeps the hidden states of all windows, `b · H · c`, instead of `a` and `l`; no recovery
    """
    b, t, h = itemsize, tokens, sizes.hidden_size
    weights, layer = b * sizes.parameters, b * sizes.layer_parameters
    outside = weights - b * sizes.decoder_parameters
    heads = sizes.head_dim * (sizes.query_heads + sizes.kv_heads)
    kept = b * 4 * (sizes.layers * h + heads + sizes.channels) + sizes.layers * 8 * h
    activations, logit = t * kept, 2 * b + 8
    trained = activations + t * sizes.vocabulary * logit
    moments = sizes.channel_range[1] ** 2

    def repair(share: float) -> float:
        own = calibration_tokens * share
        return layer + own * h * (3 * b + 4) + (20 + b) * sizes.mlp_parameters + 32 * moments

    score = activations + min(t * sizes.vocabulary, PIECE_LOGITS) * logit + 16 * moments
    resident = 2 * layer + outside
    split = resident + (weights - outside) / devices
    score_split = (
        score - activations + activations / sizes.layers + b * h * (t * sizes.layers + calibration_tokens / devices)
    )
    needed: dict[str, dict[str, float | None]] = {
        "scoring": {
            "one device": weights + score,
            "ddp": weights + score,
            "fsdp": weights + score,
            "sharded": split + score_split,
            "offload": resident + b * h * calibration_tokens + 16 * moments,
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
    for mode, (state, copied, models, logits) in recoveries.items():
        fsdp = state / devices + models * (3 * layer + 2 * outside) + trained + logits
        needed[f"recovery, {mode}"] = {
            "one device": state + trained + logits,
            "ddp": state + copied + trained + logits,
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
        ("query heads", _show_range(sizes.query_head_range)),
        ("KV heads", _show_range(sizes.kv_head_range)),
        ("query heads per KV head", _show_range(sizes.ratio_range)),
        ("head_dim", str(sizes.head_dim)),
        ("MLP channels", _show_range(sizes.channel_range)),
        ("KV-cache bytes/token", f"{cache:,}"),
        *((f"weights in {name}", f"{size / 1e6:,.1f} MB") for name, size in weights.items()),
    ):
        table.add_row(label, value)
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


def _build_without_weights(config: PretrainedConfig, trust_remote_code: bool) -> PreTrainedModel:
    with torch.device("meta"):
        if config.is_heterogeneous:
            return get_per_layer_class(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)])(config)
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)


def _find_range(counts: tuple[int, ...]) -> tuple[int, int]:
    return min(counts), max(counts)


def _show_range(counts: tuple[int, int]) -> str:
    return f"{counts[0]:,}" if counts[0] == counts[1] else f"{counts[0]:,} – {counts[1]:,}"
