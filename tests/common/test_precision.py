"""What is measured does not depend on the precision that a user allows for training, and leaves that as it was."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from gqaprune import PruningConfig, prune
from gqaprune.common.precision import multiply_exactly
from gqaprune.evaluation.perplexity import measure_perplexity
from gqaprune.models.architecture import find_blocks
from gqaprune.placement.model_hash import hash_model
from gqaprune.scoring.scores import score_units

from tiny import make_model, make_tokens

BATCHES = [make_tokens(2, seed=seed) for seed in range(3)]
TEXT = {"text": [{"input_ids": BATCHES[0], "labels": BATCHES[0]}]}
MATMULS = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
SETTINGS: dict[str, Callable[[], Any]] = {
    "nothing": lambda: None,
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "allow_tf32": lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True),
    "cuda": lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32"),
    "mkldnn": lambda: setattr(torch.backends.mkldnn.matmul, "fp32_precision", "bf16"),
    "all": lambda: setattr(torch.backends, "fp32_precision", "tf32"),
}
"""What a user may have set, by old and by new names."""


@pytest.fixture(autouse=True)
def _restore() -> Iterator[None]:
    yield
    torch.backends.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")
    for matmul in MATMULS:
        matmul.fp32_precision = "none"


def read_state() -> list[str]:
    try:
        overall = torch.get_float32_matmul_precision()
    except RuntimeError:
        overall = "mixed"
    return [overall, torch.backends.fp32_precision, *(matmul.fp32_precision for matmul in MATMULS)]


@pytest.mark.parametrize("name", SETTINGS)
def test_products_are_exact_within_and_settings_are_as_before_after_it(name: str) -> None:
    SETTINGS[name]()
    before = read_state()
    with pytest.raises(KeyError), multiply_exactly():
        assert read_state()[2:] == ["ieee", "ieee"]
        raise KeyError
    assert read_state() == before


def test_a_setting_for_all_backends_still_reaches_products_afterwards() -> None:
    torch.backends.fp32_precision = "bf16"
    with multiply_exactly():
        pass
    torch.backends.fp32_precision = "ieee"
    assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"


def test_autocast_is_off_within_and_on_after_it() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        with multiply_exactly():
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16


def measure_all(criterion: str) -> list[Any]:
    model = make_model()
    scores = score_units(model, find_blocks(model), BATCHES, criterion)
    perplexity = measure_perplexity(model, TEXT)
    settings = {"allocation": "inverse", "repair": {"epochs": 1, "products": "float32"}}
    plan, report = prune(model, BATCHES, PruningConfig(0.3, split="free", criterion=criterion, **settings))
    scored = [score_U.tolist() for score_U in scores.values()]
    return [scored, perplexity, plan.to_dict(), hash_model(model), report.stages]


@pytest.mark.parametrize("criterion", ["fisher+obs", "param_first"])
def test_nothing_that_is_measured_or_fitted_depends_on_them(criterion: str) -> None:
    expected = measure_all(criterion)
    SETTINGS["medium"]()
    with torch.autocast("cpu", torch.bfloat16):
        assert measure_all(criterion) == expected
