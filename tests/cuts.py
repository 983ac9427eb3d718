"""Plans and pruned models that tests share."""

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from gqaprune.models.architecture import find_blocks, read_geometry
from gqaprune.models.gates import apply_gates
from gqaprune.plan import KeptUnits, PruningPlan
from gqaprune.surgery.cut import apply_plan
from gqaprune.surgery.repair_config import RepairConfig

from tiny import make_model, make_tokens


def make_plan(
    model: PreTrainedModel,
    groups: list[list[int]],
    channels: list[list[int]],
    queries: list[list[int] | None] | None = None,
) -> PruningPlan:
    heads = [None if q is None else tuple(q) for q in queries or [None] * len(groups)]
    layers = tuple(KeptUnits(tuple(g), tuple(c), q) for g, c, q in zip(groups, channels, heads, strict=True))
    return PruningPlan(read_geometry(model.config), layers)


def gate_logits(model: PreTrainedModel, plan: PruningPlan, tokens: torch.Tensor) -> torch.Tensor:
    """Logits of the dense model with the removed units' gates at 0; query heads are gated if the plan names any."""
    granularity = "group" if all(kept.queries is None for kept in plan.layers) else "query"
    blocks = find_blocks(model, granularity)
    gates = {}
    for block in blocks:
        kept = plan.layers[block.key.layer]
        attention = kept.groups if granularity == "group" else plan.list_queries(block.key.layer)
        gates[block.key] = torch.zeros(1, block.units)
        gates[block.key][:, list(attention if block.key.kind == "attention" else kept.channels)] = 1
    with torch.no_grad(), apply_gates(blocks, gates):
        return model(tokens).logits


def check_surgery_equals_gating(model: PreTrainedModel, plan: PruningPlan, tokens: torch.Tensor) -> None:
    expected = gate_logits(model, plan, tokens)
    apply_plan(model, plan)
    with torch.no_grad():
        # Norms after blocks make roundings of what is nearly nothing large.
        torch.testing.assert_close(model(tokens).logits, expected, atol=5e-3, rtol=0)
    assert read_geometry(model.config) == plan.pruned_geometry


UNEVEN = ([[0], [0, 1, 2], [1, 2]], [[1, 5], list(range(20)), list(range(0, 20, 3))])


EVEN = ([[0, 2], [0, 1], [1, 2]], [list(range(7)), list(range(3, 10)), list(range(13, 20))])


def make_repair(**settings: Any) -> RepairConfig:
    """Least squares towards the block's own output alone, where a test does not ask for more."""
    return RepairConfig(**{"pull": 0.0, "everywhere": False, "epochs": 0, **settings})


def make_pruned(variant: str, kept: tuple[list[list[int]], list[list[int]]], ratio: int = 2) -> PreTrainedModel:
    model = make_model(variant, kv_heads=3, ratio=ratio)
    apply_plan(model, make_plan(model, *kept))
    return model


def narrow(model: PreTrainedModel) -> PreTrainedModel:
    """Cut a model of 3 layers and 600 channels to unequal widths, attention left whole."""
    groups = list(range(model.config.num_key_value_heads))
    widths = [list(range(256)), list(range(3, 600, 2)), list(range(87, 600))]
    apply_plan(model, make_plan(model, [groups] * 3, widths))
    return model


def get_logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(make_tokens()).logits


def drop_query_heads(variant: str, queries: list[list[int] | None]) -> PreTrainedModel:
    """A model of 14 query heads on 2 KV heads with all but its attention whole."""
    model = make_model(variant, kv_heads=2, ratio=7)
    apply_plan(model, make_plan(model, [[0, 1]] * 3, [list(range(20))] * 3, queries))
    return model


def read_names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}
