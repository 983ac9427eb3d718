"""Stages on disk: a run that was stopped anywhere and begun again gives the same bits, and does nothing twice."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import gqaprune.pipeline
import gqaprune.planning.choice
import gqaprune.planning.counts
import gqaprune.surgery.repair
from gqaprune import PruningConfig
from gqaprune.common.console import console
from gqaprune.common.stage_cache import StageCache, StageResult
from gqaprune.pipeline import prune
from gqaprune.placement.model_hash import hash_model
from gqaprune.reporting.report import Report
from gqaprune.scoring.criteria.activations import BrainSurgeon
from gqaprune.scoring.criteria.gates import GateFisher

from tiny import make_model, make_tokens

BATCHES = [make_tokens(2, 24, seed=seed) for seed in range(6)]
TEXT = {"held": [{"input_ids": make_tokens(2, 24, seed=9), "labels": make_tokens(2, 24, seed=9)}]}
CONFIG: dict[str, Any] = {
    "rate": 0.3,
    "allocation": "global",
    "split": "free",
    "limits": {"attention_layers": (0, 3), "mlp_layers": (0, 3)},
    "repair": {"epochs": 2},
}
KINDS: dict[str, dict[str, Any]] = {
    "default": {},
    "sensitivity": {"allocation": "inverse", "limits": {"frozen_layers": 1}},
    "curves and swaps": {"allocation": "optimal", "damage": "gated", "damage_levels": 2, "swaps": {"generations": 2}},
    "two steps": {"steps": 2},
    "cut alone": {"repair": {"method": "none"}},
}
WORK = {
    "fisher": (GateFisher, "score"),
    "obs": (BrainSurgeon, "score"),
    "sensitivity": (gqaprune.planning.counts, "measure_sensitivity"),
    "curves": (gqaprune.planning.counts, "measure_damage_curves"),
    "plan": (gqaprune.planning.choice, "make_plan"),
    "repair": (gqaprune.surgery.repair, "refit_block"),
    "refinement": (gqaprune.surgery.repair, "refine_mlp"),
    "perplexity": (gqaprune.pipeline, "measure_perplexity"),
}
"""What takes long: where it is."""


class StoppedError(Exception):
    """Stands for a kill."""


@contextmanager
def watch(stop: str = "", after: int = 0) -> Iterator[list[str]]:
    """Counts the calls of what takes long; stops at the call of one of them after so many of its own."""
    calls: list[str] = []

    def wrap(name: str, function: Any) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            if name == stop and calls.count(name) == after:
                raise StoppedError
            result = function(*arguments, **named)
            calls.append(name)
            return result

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name, (place, function) in WORK.items():
            patch.setattr(place, function, wrap(name, getattr(place, function)))
        yield calls


def run(folder: Path | None, batches: Any = BATCHES, seed: int = 0, **settings: Any) -> tuple[dict[str, Any], Report]:
    model = make_model(kv_heads=4, seed=seed)
    config = PruningConfig(**{**CONFIG, **settings})
    plan, report = prune(model, batches, config, evaluation=TEXT, stages=StageCache(folder))
    return {**model.state_dict(), "plan": plan}, report


def assert_same(one: tuple[dict[str, Any], Report], other: tuple[dict[str, Any], Report]) -> None:
    assert one[0].pop("plan") == other[0].pop("plan")
    assert one[0].keys() == other[0].keys()
    assert [name for name, tensor in one[0].items() if not torch.equal(tensor, other[0][name])] == []
    assert one[1].to_dict() == other[1].to_dict()


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_stopped_anywhere_goes_on_to_the_same_bits_and_does_nothing_twice(kind: str, tmp_path: Path) -> None:
    with watch() as whole:
        expected = run(None, **KINDS[kind])
    for number, name in enumerate(dict.fromkeys(whole)):
        for after in sorted({0, whole.count(name) // 2, whole.count(name) - 1}):
            folder = tmp_path / f"{number}-{after}"
            with watch(name, after) as before, pytest.raises(StoppedError):
                run(folder, **KINDS[kind])
            with watch() as rest:
                result = run(folder, **KINDS[kind])
            assert_same(result, (dict(expected[0]), expected[1]))
            twice = {name: before.count(name) + rest.count(name) - whole.count(name) for name in dict.fromkeys(whole)}
            # Of one block, the refit is lost when its refinement stops.
            assert all(count == 0 or (key, count, name) == ("repair", 1, "refinement") for key, count in twice.items())


@pytest.mark.parametrize(
    ("changes", "said", "again"),
    [
        (
            {"rate": 0.2},
            ["plan: done again, because rate was 0.3, is 0.2", "blocks: done again, because plan has changed"],
            set(),
        ),
        (
            {"criterion": "taylor+obs"},
            ["scores of obs: is already done", "plan: done again, because criterion was"],
            set(),
        ),
        (
            {"batches": BATCHES[:5]},
            ["fisher: done again, because calibration text has changed"],
            {"fisher", "obs"},
        ),
        (
            {"seed": 1},
            ["fisher: done again, because model has changed", "perplexity, dense: done again"],
            {"fisher", "obs"},
        ),
        (
            {"scoring": {"obs_ridge": 0.5}},
            ["scores of fisher: is already done", "scores of obs: done again, because obs_ridge was 0.1, is 0.5"],
            {"obs"},
        ),
        (
            {"limits": {"mlp_layers": (0, 2)}},
            ["scores of fisher: done again, because blocks has changed", "perplexity, dense: is already done"],
            {"fisher", "obs"},
        ),
        (
            {"repair": {"pull": 0.25}},
            ["plan: is already done", "blocks: done again, because repair has"],
            set(),
        ),
    ],
    ids=["rate", "criterion", "corpus", "model", "ridge", "layers", "repair"],
)
def test_what_changed_is_said_and_only_what_depends_on_it_is_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], said: list[str], again: set[str]
) -> None:
    monkeypatch.setattr(console, "quiet", False)
    with watch("repair", 3), pytest.raises(StoppedError):
        run(tmp_path)
    with watch() as calls, console.capture() as capture:
        result = run(tmp_path, **changes)
    text = " ".join(capture.get().split())
    assert all(sentence in text for sentence in said), text
    assert {"fisher", "obs"} & set(calls) == again
    assert_same(result, run(None, **changes))


def test_broken_files_are_done_again(tmp_path: Path) -> None:
    with watch("repair", 3), pytest.raises(StoppedError):
        run(tmp_path)
    files = sorted(tmp_path.iterdir())
    assert len(files) >= 7  # dense perplexity, two criteria, plan, three blocks
    for number, path in enumerate(files):
        path.write_bytes(path.read_bytes()[: 7 * number])
    assert_same(run(tmp_path), run(None))


def test_a_flipped_bit_anywhere_in_a_stage_is_said_and_the_stage_is_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "quiet", False)
    result, stages = StageResult({"loss": 0.5}, {"weight": torch.arange(6.0)}), StageCache(tmp_path)
    stages.write("work", {"rate": 0.3}, result)
    path = tmp_path / "work.stage"
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1 :])
        with console.capture() as capture:
            again = stages.recall("work", {"rate": 0.3}, lambda: result)
        assert capture.get() == "work: done again, because its file is damaged\n", place
        assert again is result


def test_a_folder_that_cannot_be_written_is_said_and_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "quiet", False)
    (tmp_path / "file").write_text("in the way")
    stages = StageCache(tmp_path / "file")
    with console.capture() as capture:
        assert stages.recall("work", {}, lambda: StageResult(1)).facts == 1
    assert "work is not kept for a resumed run" in " ".join(capture.get().split())


def test_clearing_leaves_what_is_not_of_a_run(tmp_path: Path) -> None:
    others = {"model.safetensors", ".model.tmp", ".other.host.12.tmp"}
    for name in others:
        (tmp_path / name).write_bytes(b"weights")
    stages = StageCache(tmp_path)
    stages.write("work", {}, StageResult(1))
    (tmp_path / ".work.stage.host.12.tmp").write_bytes(b"what a killed run was writing")
    stages.clear()
    assert {path.name for path in tmp_path.iterdir()} == others


def test_inputs_and_facts_come_back_as_they_went(tmp_path: Path) -> None:
    stages = StageCache(tmp_path).of("part", {"model": "a"})
    facts, tensors = {"b": [1, 0.1, None]}, {"x": torch.tensor([0.1, 1e-300], dtype=torch.float64)}
    stages.write("some work", {"tuple": (1, 2)}, StageResult(facts, tensors))
    assert stages.find(["some work", "other work"], {"tuple": [1, 2]}, "work") == ["some work"]
    assert stages.find(["some work"], {"tuple": [1, 3]}, "work") == []
    assert StageCache(tmp_path).of("part", {"model": "b"}).find(["some work"], {"tuple": [1, 2]}, "work") == []
    read = stages.read("some work")
    assert json.dumps(read.facts) == json.dumps(facts) and torch.equal(read.tensors["x"], tensors["x"])
    stages.clear()
    assert not tmp_path.exists()


def test_a_model_is_known_again_on_any_number_of_threads_and_not_with_other_weights() -> None:
    model = make_model(channels=40_000)  # large enough for several threads to share a sum
    embedding, threads, keys = model.get_input_embeddings().weight.data, torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            keys.append(hash_model(model))
    finally:
        torch.set_num_threads(threads)
    embedding[[0, 1]] = embedding[[1, 0]]
    keys.append(hash_model(model))
    embedding[0, 0] = embedding[0, 0].nextafter(torch.tensor(9.0))
    keys.append(hash_model(model))
    assert keys[0] == keys[1] == keys[2]
    assert len(set(keys)) == 3
    assert len({*keys, hash_model(model.double()), hash_model(model.bfloat16())}) == 5
