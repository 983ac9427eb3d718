"""What a run costs is counted in forward passes over its calibration text, so that a pass that comes back shows.

python -m pytest -s tests/test_passes.py    # prints the table
"""

from collections.abc import Iterator
from typing import Any

import pytest

import gqaprune.pipeline
import gqaprune.planning.choice
import gqaprune.surgery.repair
from gqaprune import PruningConfig, prune
from gqaprune.scoring.criteria.activations import BrainSurgeon
from gqaprune.scoring.criteria.gates import GateFisher
from gqaprune.scoring.outliers import LargestOutput
from gqaprune.surgery.layer_damage import LayerDamageMeter

from flops import FlopCounter, count_forward
from tiny import make_model, make_tokens

BATCHES = make_tokens(32, 32).split(2)
STAGES: dict[str, list[tuple[Any, str]]] = {
    "scores: gates": [(GateFisher, "score")],
    "scores: obs": [(BrainSurgeon, "score")],
    "scores: outliers": [(LargestOutput, "score")],
    "scores, all": [(gqaprune.planning.choice, "score_blocks")],
    "curves": [(gqaprune.planning.choice, "measure_curves")],
    "repair: refinement": [(gqaprune.surgery.repair, "refine_mlp")],
    "repair: damage of each layer": [(LayerDamageMeter, name) for name in ("run_whole", "run_repaired", "measure")],
    "cut and repair, all": [(gqaprune.pipeline, "apply_plan_with_repair")],
}
"""Stage -> where its work is done."""


@pytest.fixture(scope="module")
def passes() -> Iterator[dict[str, float]]:
    """Stage of the default, distillation left out, -> forward passes that it costs."""
    model = make_model(kv_heads=3, head_dim=4, channels=96, layers=8)
    forward, counted = count_forward(model, BATCHES), dict.fromkeys(STAGES, 0.0)

    def count(stage: str, function: Any) -> Any:
        def run(*arguments: Any, **named: Any) -> Any:
            with FlopCounter() as counter:
                result = function(*arguments, **named)
            counted[stage] += counter.total / forward
            return result

        return run

    with pytest.MonkeyPatch.context() as patch:
        for stage, places in STAGES.items():
            for place, name in places:
                patch.setattr(place, name, count(stage, getattr(place, name)))
        prune(model, BATCHES, PruningConfig(repair={"distill_tokens": 0, "products": "float32"}))
    yield counted


def test_text_is_passed_no_more_often_than_each_stage_needs(passes: dict[str, float]) -> None:
    print("\n".join(["", *(f"{stage:30}{count:6.2f}" for stage, count in passes.items())]))
    # Forward, backward, and the products of Gram matrices: 0.58 forward passes of so small a model.
    assert passes["scores, all"] < 2.7
    assert passes["scores: obs"] < 0.01 and passes["scores: outliers"] == 0
    # The dense model's layers, the pruned one's, its MLPs as repaired, and Gram matrices.
    refits = passes["cut and repair, all"] - passes["repair: refinement"] - passes["repair: damage of each layer"]
    assert 2 < refits < 2.8
