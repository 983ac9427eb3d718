"""Allocations are entries: one more is all that a new one needs, wherever one is chosen, run, told or refused."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from gqaprune import PruningConfig, prune
from gqaprune.callbacks.pruning import TaylorPruning
from gqaprune.cli import main
from gqaprune.placement.layer_store import Placement
from gqaprune.planning.allocation import ALLOCATIONS, Allocation, AllocationOptions, BlockBudget, Budget, Removed
from gqaprune.planning.allocation.budget import DEFAULT_OPTIONS
from gqaprune.planning.preflight import check_equal_counts, check_goes_by_layer

from command import Run
from tiny import PLAIN, make_model, make_tokens

ROOT = Path(__file__).parents[3]
BATCHES = [make_tokens(2, 24, seed=seed) for seed in range(2)]
SETTINGS: dict[str, Any] = {**PLAIN, "rate": 0.1}
"""Of models with so few layers the default ranges are the whole."""


class Halves:
    """Removes half of the channels of every layer, whatever the budget says, and notes what it was given."""

    def __init__(self) -> None:
        self.options: list[AllocationOptions] = []

    def __call__(
        self, blocks: Sequence[BlockBudget], budget: Budget, options: AllocationOptions = DEFAULT_OPTIONS, /
    ) -> Removed:
        self.options.append(options)
        return {block.key: block.units // 2 if block.key.kind == "mlp" else 0 for block in blocks}


@pytest.fixture
def halves(monkeypatch: pytest.MonkeyPatch) -> Halves:
    """The function of an allocation that is made up, entered as any other: `halves`, and what needs more than it."""
    made_up = Halves()
    for name, flags in (
        ("halves", {"gives_equal_counts": True}),
        ("weighed halves", {"uses_importance": True}),
        ("measured halves", {"uses_damage_curves": True}),
    ):
        monkeypatch.setitem(ALLOCATIONS, name, Allocation(made_up, f"{name} of the channels", **flags))  # type: ignore[arg-type]
    return made_up


def test_entered_allocation_says_what_goes(halves: Halves) -> None:
    plan, _ = prune(make_model("llama"), BATCHES, PruningConfig(**{**SETTINGS, "allocation": "halves"}))
    assert plan.allocation == "halves"
    assert plan.pruned_geometry.channels == (10, 10, 10) and plan.pruned_geometry.kv_heads == plan.geometry.kv_heads
    assert halves.options[-1].importance is None and halves.options[-1].curves is None


def test_entered_allocation_gets_what_its_flags_ask_for(halves: Halves) -> None:
    weighed = PruningConfig(**{**SETTINGS, "allocation": "weighed halves"})
    measured = PruningConfig(**{**SETTINGS, "allocation": "measured halves", "damage": "gated", "damage_levels": 3})
    assert weighed.uses_importance and not weighed.uses_damage_curves
    assert measured.uses_damage_curves and not measured.uses_importance
    prune(make_model("llama"), BATCHES, weighed)
    assert len(halves.options[-1].importance or {}) == 6
    prune(make_model("llama"), BATCHES, measured)
    assert len(halves.options[-1].curves or {}) == 6


@pytest.mark.usefixtures("halves")
def test_entered_allocation_is_refused_and_named_by_its_flags() -> None:
    config = {**SETTINGS, "criterion": "l1", "repair": {"method": "none"}}
    way_out = "set allocation to uniform, global, optimal, halves or measured halves$"
    with pytest.raises(ValueError, match=f"allocation weighed halves needs the whole model .*: {way_out}"):
        check_goes_by_layer(PruningConfig(**{**config, "allocation": "weighed halves"}), Placement.DISK)
    check_goes_by_layer(PruningConfig(**{**config, "allocation": "halves"}), Placement.DISK)
    shapes = make_model("llama").config
    check_equal_counts(shapes, PruningConfig(**{**config, "allocation": "halves"}))
    with pytest.raises(ValueError, match="set allocation: uniform or halves, limits.frozen_layers"):
        check_equal_counts(shapes, PruningConfig(**{**config, "allocation": "measured halves"}))
    with pytest.raises(
        ValueError, match="must be one of uniform, .*, halves, weighed halves, measured halves, got 'x'"
    ):
        TaylorPruning(allocation="x")


@pytest.mark.usefixtures("halves")
def test_commands_run_an_entered_allocation_and_list_it(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("prune", "--pruning.allocation", "halves", "--export.format", "stock") == 0
    plan = json.loads(Path("lightning_logs/version_0/plan.json").read_text())
    assert plan["allocation"] == "halves" and [len(layer["channels"]) for layer in plan["layers"]] == [16, 16, 16]
    monkeypatch.setattr("sys.argv", ["gqaprune", "prune", "--help"])
    assert main() == 0
    assert "or `measured halves` (measured halves of the channels)." in " ".join(capsys.readouterr().out.split())


def test_every_allocation_has_its_row_in_the_documentation() -> None:
    page = (ROOT / "docs/how_it_works.md").read_text(encoding="utf-8")
    assert [name for name in ALLOCATIONS if f"\n| `{name}` |" not in page] == []
