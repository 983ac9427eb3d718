"""The type that refinement multiplies in is decided once for a run, by rank 0, and said."""

from pathlib import Path
from typing import Any

import pytest
import torch

from gqaprune import PruningConfig, prune
from gqaprune.common.stage_cache import StageCache
from gqaprune.placement.model_hash import hash_model
from gqaprune.surgery import products
from gqaprune.surgery.products import settle_products
from gqaprune.surgery.repair_config import RepairConfig

from tiny import make_model, make_tokens

CPU = torch.device("cpu")
BATCHES = [make_tokens(2, seed=seed) for seed in range(3)]


@pytest.fixture
def is_faster(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """What a try of the processor will say, last."""
    answers = [True]
    monkeypatch.setattr(products, "is_faster_in_bfloat16", lambda: answers[-1])
    return answers


def prune_tiny(stages: StageCache, **repair: Any) -> tuple[str, str]:
    """Hash of the weights, and the type as the report has it."""
    model = make_model()
    _, report = prune(model, BATCHES, PruningConfig(0.3, repair={"epochs": 2, **repair}), stages=stages)
    return hash_model(model), report.settings["repair"]["products"]


def test_the_faster_type_is_chosen_and_what_is_asked_stays(is_faster: list[bool]) -> None:
    for answer, chosen in ((True, "bfloat16"), (False, "float32")):
        is_faster.append(answer)
        assert settle_products(RepairConfig(), CPU).products == chosen
        for asked in ("float32", "bfloat16"):
            assert settle_products(RepairConfig(products=asked), CPU).products == asked


def test_a_resumed_run_multiplies_as_it_began_whatever_a_second_try_says(is_faster: list[bool], tmp_path: Path) -> None:
    whole, name = prune_tiny(StageCache(tmp_path))
    assert name == "bfloat16"
    for stage in tmp_path.glob("*repair*"):
        stage.unlink()  # as of a run that was stopped before them
    is_faster.append(False)
    assert prune_tiny(StageCache(tmp_path)) == (whole, "bfloat16")
    other, name = prune_tiny(StageCache(tmp_path / "another run"))
    assert name == "float32" and other != whole


def test_a_type_that_is_asked_for_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "is_faster_in_bfloat16", lambda: pytest.fail("tried"))
    assert prune_tiny(StageCache(), products="float32")[1] == "float32"
    assert prune_tiny(StageCache(), epochs=0, distill_tokens=0)[1] == "auto"


def test_ranks_but_the_first_take_what_it_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "is_faster_in_bfloat16", lambda: pytest.fail("tried"))
    monkeypatch.setattr(products, "get_rank_and_world_size", lambda: (1, 2))
    monkeypatch.setattr(products, "is_true_anywhere", lambda own, device: True)
    assert settle_products(RepairConfig(), CPU).products == "bfloat16"


def test_another_type_is_refused() -> None:
    with pytest.raises(ValueError, match=r"repair.products must be one of auto, float32, bfloat16, got 'float16'"):
        RepairConfig(products="float16")
