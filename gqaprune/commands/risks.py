"""What can go wrong in pruning a model, said beforehand, each with its reason and what to do."""

import torch
from transformers import PretrainedConfig

from gqaprune.models.dtypes import name_dtype, read_dtype
from gqaprune.models.families import get_family
from gqaprune.plan import Geometry
from gqaprune.scoring.outliers import OUTLIER_RATIO, Outliers

FEW_KV_HEADS = 4
"""KV heads of a layer up to which a single group is so much that attention is better left whole."""


def list_risks(
    config: PretrainedConfig, geometry: Geometry, embedding_share: float, dtype: str, outliers: Outliers | None = None
) -> list[str]:
    """Risks in sentences, the gravest first; empty where there are none.

    Args:
        config: of the model.
        geometry: its shapes.
        embedding_share: share of its parameters that lie outside the decoder layers.
        dtype: type asked for, a name of `model.dtype`.
        outliers: units that carry massive activations; None where they were not looked for.
    """
    risks = []
    made_for = read_dtype(config)
    if dtype == "float16" and made_for != torch.float16:
        name = "float32" if made_for is None else name_dtype(made_for)
        risks.append(
            f"float16 is asked for and the model was made for {name}: activations above 65,504 overflow, and scores "
            "made of them are arbitrary; set model.dtype to bfloat16"
        )
    whole, fewest = get_family(config).whole, min(geometry.kv_heads)
    if "attention" in whole:
        risks.append(f"attention stays whole: {whole['attention']}")
    elif fewest == 1:
        risks.append(
            f"{geometry.kv_heads.count(1)} layers have one KV head, whose group cannot go; "
            f"{'' if 'mlp' in whole else 'channels can, and '}query heads can with pruning.granularity query"
        )
    elif fewest <= FEW_KV_HEADS:
        risks.append(
            f"few KV heads: one of {fewest} is {1 / fewest:.0%} of a layer's attention, so that steps are coarse; "
            f"{'' if 'mlp' in whole else 'leave attention whole (pruning.split 0:10, the default) or '}"
            "set pruning.granularity to query"
        )
    if "mlp" in whole:
        risks.append(f"MLPs stay whole: {whole['mlp']}")
    if outliers:
        count = sum(map(len, outliers.values()))
        strongest = max(
            ((key, unit, ratio) for key, own in outliers.items() for unit, ratio in own.items()),
            key=lambda found: found[2],
        )
        risks.append(
            f"massive activations: {count} units write at least {OUTLIER_RATIO:g} times as much as the median unit of "
            f"their block, {strongest[0]} unit {strongest[1]} {strongest[2]:,.0f} times as much; the model can break "
            "without them, and pruning.scoring.protect_outliers, which is on by default, keeps them"
        )
    if getattr(config, "tie_word_embeddings", False):
        risks.append(
            f"embedding and head share their weights, {embedding_share:.0%} of the parameters, which no pruning here "
            "removes: pruning.rate is a share of the decoder layers unless pruning.rate_base is all"
        )
    if not geometry.is_uniform:
        risks.append(
            "layers differ in shape: equal counts in every layer are out of reach, and the checkpoint's format is "
            "per-layer or padded"
        )
    kinds = set(getattr(config, "layer_types", None) or ())
    if len(kinds) > 1:
        risks.append(f"layers differ in kind ({', '.join(sorted(kinds))}): their importance is not alike")
    return risks
