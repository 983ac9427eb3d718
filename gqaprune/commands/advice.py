"""Write a first configuration for a model, as commented YAML."""

import json
from collections.abc import Sequence

from gqaprune.commands.reach import Reach
from gqaprune.commands.risks import FEW_KV_HEADS
from gqaprune.geometry import Geometry
from gqaprune.models.dtypes import DTYPES
from gqaprune.planning.selection import choose_middle_layers

LARGE = 1_000_000_000
"""Number of parameters from which micro-batches are smaller and widths are rounded for a GPU."""
EMBEDDED = "smollm2-135m"
"""The embedded model, for which the embedded text is suggested."""


def write_advice(
    model: str,
    geometry: Geometry,
    parameters: int,
    dtype: str,
    window: int,
    reach: Sequence[Reach],
    risks: Sequence[str],
    has_hub: bool = True,
) -> str:
    """Write YAML for `gqaprune fit` and `prune`; comments show how to prune more attention as a second step.

    Args:
        model: name or folder of the model.
        geometry: shapes of the model.
        parameters: number of all its parameters.
        dtype: type of its weights, a name of `model.dtype`.
        window: length of the model's context in tokens.
        reach: how much can be removed from each kind of block.
        risks: sentences about risks; they become comments.
        has_hub: whether corpora on the hub can be read here.
    """
    of_kind = {own.kind: own for own in reach}
    layers, is_large = geometry.num_layers, parameters >= LARGE
    middle = choose_middle_layers(layers)
    corpus = "wikitext2" if has_hub and model != EMBEDDED else "embedded"
    note = "use text like the text that the model will be used on"
    if not has_hub:
        note = "the hub cannot be reached, so this is Python's help: use a file or folder of your own text instead"
    name = dtype if dtype in DTYPES and dtype != "float16" else "bfloat16"
    if "mlp" in of_kind:
        rate = int(100 * min(0.2 if is_large else 0.25, 0.9 * of_kind["mlp"].reachable)) / 100
    else:  # a whole number of groups, the same in every layer
        groups = min(max(1, min(geometry.kv_heads) // 4), min(geometry.kv_heads) - 1)
        rate = groups * len(_list_inner_layers(layers)) * of_kind["attention"].of_decoder
    lines = [
        f"# {model}: {_count(geometry.query_heads)}Q:{_count(geometry.kv_heads)}KV, {layers} layers, MLP "
        f"{_count(geometry.channels)}; written by gqaprune inspect.",
        *(f"# - {risk}" for risk in risks),
        "# Add a recovery and, for several devices, a strategy: configs/recovery/*.yaml, configs/strategy/*.yaml.",
        "seed_everything: 0",
        "model:",
        f"  pretrained: {json.dumps(model, ensure_ascii=False)}",
        f"  dtype: {name}" + (" # float16 overflows" if name == "bfloat16" else ""),
        "data:",
        "  calibration:",
        f"    corpora: [{corpus}] # {note}",
        "    windows: 128",
        "    sampled_windows: 128 # text that the model writes itself, which covers what the corpus lacks",
        f"    window: {min(512, window)}",
        f"    batch_size: {2 if is_large else 4}",
        f"  training: {{corpora: [{corpus}], window: {min(1024 if is_large else 512, window)}, "
        f"batch_size: {1 if is_large else 4}}}",
        f"  evaluation: {{val: [{corpus}], test: [{corpus}], window: {min(2048, window)}}}",
        "pruning:",
        "  scheduling: {0: 8}",
        f"  rate: {rate:g} # of the decoder layers' parameters",
    ]
    limits = []
    if "mlp" in of_kind:
        mlp = of_kind["mlp"]
        lines += ['  # split: "0:10" # MLP channels only; by default GQA groups are removed as well if they cost less']
        ends = f"[{middle.start}, {middle.stop}]"
        limits += [f"mlp_layers: {ends} # others cost more; {mlp.reachable:.0%} of the decoder can be removed"]
        limits += ["channel_multiple: 128 # widths that are fast on GPUs"] if is_large else []
    else:
        lines += ["  split: free # MLPs of this family are not pruned"]
    if "attention" in of_kind:
        is_second = "mlp" in of_kind
        lines += _list_attention(of_kind["attention"], geometry, is_second)
        if min(geometry.kv_heads) > 1:
            inner = _list_inner_layers(geometry.num_layers)
            limits += [f"{'# ' if is_second else ''}attention_layers: [{inner.start}, {inner.stop}]"]
    if limits:
        lines += ["  limits:", *(f"    {line}" for line in limits)]
    lines += ["trainer:", "  max_epochs: 1"]
    return "\n".join(lines) + "\n"


def _list_attention(own: Reach, geometry: Geometry, is_second: bool) -> list[str]:
    """Return lines that also prune attention, in the middle third of the layers."""
    fewest = min(geometry.kv_heads)
    if fewest == 1:
        return [] if is_second else ["  granularity: query # with one KV head, a GQA group cannot be removed"]
    words = f"one of {fewest} KV heads is {own.of_block:.0%} of a layer's attention"
    lines = [f"  # {words}, {own.of_layer:.1%} of the layer"]
    if is_second:
        lines += [
            "  # Second step, if the first one is good: more attention, far from both ends (attention_layers below):",
            '  # split: "2:8" # exact to one GQA group',
        ]
    if fewest <= FEW_KV_HEADS and geometry.ratios[0] > 2:
        lines += [f"  # granularity: query # {geometry.ratios[0]}:1 → {geometry.ratios[0] - 1}:1, keeps every KV head"]
    return lines


def _list_inner_layers(layers: int) -> range:
    """Return the layers that are far from both ends."""
    return range(layers // 3 + layers // 28, layers - layers // 7)


def _count(numbers: Sequence[int]) -> str:
    low, high = min(numbers), max(numbers)
    return f"{high:,}" if low == high else f"{low:,}–{high:,}"
