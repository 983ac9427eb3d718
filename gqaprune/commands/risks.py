"""List the risks of pruning a model before it is pruned, each with its reason and a way out."""

import torch
from transformers import PretrainedConfig

from gqaprune.geometry import Geometry
from gqaprune.models.dtypes import name_dtype, read_dtype
from gqaprune.models.families import get_family
from gqaprune.scoring.outliers import OUTLIER_RATIO, Outliers

FEW_KV_HEADS = 4
"""Number of KV heads up to which one group is so large a share that attention is better left whole."""


def list_risks(
    config: PretrainedConfig, geometry: Geometry, embedding_share: float, dtype: str, outliers: Outliers | None = None
) -> list[str]:
    """List risks in sentences, the gravest first; empty if there are none.

    Args:
        config: config of the model.
        geometry: shapes of the model.
        embedding_share: share of its parameters outside of the decoder layers.
        dtype: requested type, a name of `model.dtype`.
        outliers: units with massive activations; None if they were not searched for.
    """
    risks = []
    made_for = read_dtype(config)
    if dtype == "float16" and made_for != torch.float16:
        name = "float32" if made_for is None else name_dtype(made_for)
        risks.append(
            f"float16 is requested, but the model was trained in {name}: activations above 65,504 overflow and make "
            "scores arbitrary; set model.dtype to bfloat16"
        )
    whole, fewest = get_family(config).whole, min(geometry.kv_heads)
    if "attention" in whole:
        risks.append(f"attention stays whole: {whole['attention']}")
    elif fewest == 1:
        risks.append(
            f"{geometry.kv_heads.count(1)} layers have only one KV head, so their GQA group cannot be removed; "
            f"{'' if 'mlp' in whole else 'channels can, and '}query heads can with pruning.granularity query"
        )
    elif fewest <= FEW_KV_HEADS:
        risks.append(
            f"few KV heads: one of {fewest} is {1 / fewest:.0%} of a layer's attention, so steps are coarse; "
            f"{'' if 'mlp' in whole else 'leave attention whole (pruning.split 0:10, the default) or '}"
            "set pruning.granularity to query"
        )
    if "mlp" in whole:
        risks.append(f"MLPs stay whole: {whole['mlp']}")
    if outliers:
        count = sum(map(len, outliers.values()))
        strongest = max(
            ((key, unit, ratio) for key, ratios in outliers.items() for unit, ratio in ratios.items()),
            key=lambda found: found[2],
        )
        risks.append(
            f"massive activations: the outputs of {count} units are at least {OUTLIER_RATIO:g} times those of their "
            f"block's median unit, {strongest[2]:,.0f} times in {strongest[0]} unit {strongest[1]}; removing them can "
            "break the model, so keep pruning.scoring.protect_outliers on, which is the default"
        )
    if getattr(config, "tie_word_embeddings", False):
        risks.append(
            f"embedding and head share their weights, {embedding_share:.0%} of the parameters, and are not pruned: "
            "pruning.rate is a share of the decoder layers unless pruning.rate_base is all"
        )
    if not geometry.is_uniform:
        risks.append(
            "layers differ in shape: they cannot be pruned to equal counts, so the checkpoint's format is per-layer or "
            "padded"
        )
    kinds = set(getattr(config, "layer_types", None) or ())
    if len(kinds) > 1:
        risks.append(f"layers are of several kinds ({', '.join(sorted(kinds))}) and differ in importance")
    return risks
