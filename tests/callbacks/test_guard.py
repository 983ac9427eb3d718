"""The guard in a run: silent on sound models, a warning, a stop with its reason, and files that stay."""

import html
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from test_module import make_data, make_trainer
from torch import nn
from transformers import PreTrainedModel

import gqaprune
from gqaprune.callbacks import PerplexityGuard, RunSummary, TaylorPruning
from gqaprune.common.console import console
from gqaprune.data.sampling import sample_from_model
from gqaprune.evaluation.gated_plan import measure_perplexity_or_infinity
from gqaprune.module import CausalLMModule
from gqaprune.plan import PruningPlan
from gqaprune.surgery.cut import apply_plan

from tiny import PLAIN

MILD: dict[str, Any] = {**PLAIN, "rate": 0.02}
HARD: dict[str, Any] = {**PLAIN, "rate": 0.6, "limits": {"attention_layers": (0, 3), "mlp_layers": (0, 3)}}


def fit(folder: Path, run: Path, guard: PerplexityGuard, pruning: dict[str, Any], **settings: Any) -> TaylorPruning:
    callback = TaylorPruning(**pruning)
    trainer = make_trainer(run, callback, guard, RunSummary(), **settings)
    breaks = bool(settings.get("limit_val_batches"))  # by ascent, which does so wherever it runs

    def build(groups: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(groups, 1e-2 if breaks else 1e-6, maximize=breaks)

    module = CausalLMModule(str(folder), optimizer=build)
    trainer.fit(module, datamodule=make_data(folder, training={"batch_size": 4}))
    return callback


def measure(model: nn.Module, folder: Path) -> float:
    assert isinstance(model, PreTrainedModel)
    return measure_perplexity_or_infinity(model, make_data(folder).held_out_batches(), "")


def test_held_out_windows_are_of_the_calibration_corpora_and_not_calibrated_on(learned_folder: Path) -> None:
    data, without = make_data(learned_folder), make_data(learned_folder, calibration={"held_out_windows": 0})
    windows = data.read_calibration_windows()
    assert windows.equal(without.read_calibration_windows()) and without.held_out_batches() == []
    held = torch.cat([batch["input_ids"] for batch in data.held_out_batches()])
    assert len(held) == 8 and not any(one.equal(other) for one in held for other in windows)


@pytest.mark.parametrize(
    ("windows", "wanted", "calibrated", "held_out"),
    [(10, 8, 5, 5), (10, None, 5, 5), (30, None, 22, 8), (30, 4, 4, 8), (12, 8, 6, 6), (12, 2, 2, 8), (1, 4, 1, 0)],
)
def test_held_out_windows_come_first_where_the_corpora_have_too_few_for_both(
    learned_folder: Path,
    tmp_path: Path,
    windows: int,
    wanted: int | None,
    calibrated: int,
    held_out: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (tmp_path / "short.txt").write_text("a line of it\n" * (32 * windows // 13 + 1))
    data = make_data(learned_folder, calibration={"corpora": [str(tmp_path / "short.txt")], "windows": wanted})
    with caplog.at_level("INFO", logger="gqaprune"):
        assert len(data.read_calibration_windows()) == calibrated
    assert sum(len(batch["input_ids"]) for batch in data.held_out_batches()) == held_out
    is_short = held_out < 8 or (wanted is not None and calibrated < wanted)
    sentence = f"only {windows} windows of 32 tokens: {calibrated} are used for calibration ({wanted or 'all'} wanted)"
    assert (sentence in caplog.text) is is_short


SILENT: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "no text": ({**MILD, "criterion": "l1"}, {}, "these settings need no calibration text"),
    "no corpus": (MILD, {"corpora": [], "sampled_windows": 4}, "data.calibration.corpora is empty"),
    "one window": (MILD, {"corpora": ["one.txt"]}, "fill only one window of 32 tokens"),
    "asked": (MILD, {"held_out_windows": 0}, ""),
    "on": (MILD, {}, ""),
}


@pytest.mark.parametrize("name", SILENT)
def test_a_guard_that_has_nothing_to_measure_says_why_it_is_off(
    name: str, learned_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("gqaprune.datamodules.text.sample_from_model", partial(sample_from_model, cache=tmp_path))
    (tmp_path / "one.txt").write_text("a line of a text that is short, and no more")
    pruning, calibration, reason = SILENT[name]
    trainer = make_trainer(tmp_path, TaylorPruning(**pruning), PerplexityGuard(), limit_train_batches=0)
    with caplog.at_level("INFO", logger="gqaprune"):
        trainer.fit(CausalLMModule(str(learned_folder)), datamodule=make_data(learned_folder, calibration=calibration))
    assert ("PerplexityGuard is off" in caplog.text) is bool(reason)
    assert reason in caplog.text


def test_a_guard_of_a_plan_that_was_given_and_one_without_validation_say_what_they_do_not_judge(
    learned_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plan = tmp_path / "plan.json"
    cut = TaylorPruning(**MILD)
    with caplog.at_level("INFO", logger="gqaprune"):
        trainer = make_trainer(tmp_path, cut, PerplexityGuard(), limit_val_batches=0, limit_train_batches=1)
        trainer.fit(module := CausalLMModule(str(learned_folder)), datamodule=make_data(learned_folder))
    assert "PerplexityGuard judges the model after pruning but not during training" in caplog.text
    assert module.plan is not None
    module.plan.save(plan)
    with caplog.at_level("INFO", logger="gqaprune"):
        trainer = make_trainer(tmp_path, TaylorPruning(**MILD), PerplexityGuard(), limit_train_batches=0)
        trainer.fit(CausalLMModule(str(learned_folder), plan=str(plan)), datamodule=make_data(learned_folder))
    assert "PerplexityGuard is off: the plan was given" in caplog.text


def test_a_sound_model_passes_and_the_report_tells_both_perplexities(learned_folder: Path, tmp_path: Path) -> None:
    callback = fit(learned_folder, tmp_path, guard := PerplexityGuard(), MILD)
    assert callback.report is not None and guard.diagnosis is None and not (tmp_path / "guard.json").exists()
    dense, pruned, _ = callback.report.stages
    assert dense.held_out == pytest.approx(measure(gqaprune.load_model(learned_folder), learned_folder), rel=1e-5)
    cut = gqaprune.load_model(learned_folder)
    apply_plan(cut, PruningPlan.load(tmp_path / "plan.json"))
    assert pruned.held_out == pytest.approx(measure(cut, learned_folder), rel=1e-4)


def test_a_broken_model_stops_the_run_with_its_cause_and_keeps_plan_and_scores(
    learned_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"PerplexityGuard: after pruning .* times the dense model's .*pruning\."):
        fit(learned_folder, tmp_path, PerplexityGuard(1.1, 1.2), HARD)
    facts = json.loads((tmp_path / "guard.json").read_text())
    assert facts["stopped"] and facts["perplexity"] > 1.2 * facts["dense"]
    assert facts["diagnosis"]["verdict"]["cause"] in ("attention", "layers", "rate")
    cut = gqaprune.load_model(learned_folder)
    apply_plan(cut, PruningPlan.load(tmp_path / "plan.json"))
    assert facts["perplexity"] == pytest.approx(measure(cut, learned_folder), rel=1e-4)
    assert json.loads((tmp_path / "report.json").read_text())["stages"][1]["held_out"] == facts["perplexity"]
    page = html.unescape((tmp_path / "report.html").read_text())
    assert "✗ The guard stopped the run" in page and '<p class="state">stopped: PerplexityGuard: after pruning' in page
    assert all(finding["sentence"] in page for finding in facts["diagnosis"]["findings"])
    assert (tmp_path / "lightning_logs" / "unfinished" / "scores-of-fisher.stage").exists()


def test_an_absolute_bound_stops_only_where_the_dense_model_is_below_it(learned_folder: Path, tmp_path: Path) -> None:
    report = fit(learned_folder, tmp_path / "a", PerplexityGuard(40.0, 50.0, 1.5), HARD).report
    assert report is not None and report.stages[0].held_out and report.stages[1].held_out
    bound = (report.stages[0].held_out + report.stages[1].held_out) / 2
    with pytest.raises(ValueError, match=f"it stops at perplexity {bound:g}"):
        fit(learned_folder, tmp_path / "b", PerplexityGuard(40.0, 50.0, bound, diagnoses=False), HARD)


def test_a_warning_names_the_cause_and_lets_the_run_go_on(
    learned_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "quiet", False)
    callback = fit(learned_folder, tmp_path, PerplexityGuard(1.1, 50.0), HARD)
    assert callback.report is not None and callback.report.stages[-1].name == "recovered"
    assert "it warns at 1.1 times" in " ".join(capsys.readouterr().out.split())
    assert not json.loads((tmp_path / "guard.json").read_text())["stopped"]


def test_training_that_breaks_the_model_is_stopped_and_blamed(learned_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"PerplexityGuard: at step \d+ .*learning rate"):
        fit(learned_folder, tmp_path, PerplexityGuard(1.5, 2.0), MILD, limit_val_batches=1, num_sanity_val_steps=0)
    assert json.loads((tmp_path / "guard.json").read_text())["diagnosis"]["verdict"]["cause"] == "repair"


class Wrecker(PerplexityGuard):
    """Training that has made the model sure of everything it says."""

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, CausalLMModule)
        with torch.no_grad():
            pl_module.model.lm_head.weight.mul_(100)
        super().on_validation_end(trainer, pl_module)


def test_what_stops_a_run_is_diagnosed_anew_after_a_warning_of_something_else(
    learned_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "quiet", False)
    with pytest.raises(ValueError, match=r"PerplexityGuard: at step \d+ .*learning rate"):
        fit(learned_folder, tmp_path, Wrecker(1.001, 100.0), {**HARD, "rate": 0.2}, limit_val_batches=1)
    assert "too much attention was removed" in " ".join(capsys.readouterr().out.split())  # what was warned of
    assert json.loads((tmp_path / "guard.json").read_text())["diagnosis"]["verdict"]["cause"] == "repair"


def test_a_cut_model_that_is_not_finite_is_told_with_its_place(
    learned_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut_and_break(model: PreTrainedModel, plan: PruningPlan) -> None:
        apply_plan(model, plan)
        with torch.no_grad():
            model.get_parameter("model.layers.1.mlp.up_proj.weight")[0] = float("inf")

    monkeypatch.setattr("gqaprune.surgery.repair.apply_plan", cut_and_break)
    with pytest.raises(ValueError, match="not finite"):
        fit(learned_folder, tmp_path, PerplexityGuard(), MILD)
    text = (tmp_path / "guard.json").read_text()
    facts = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert facts["diagnosis"]["pruned"] is None
    assert "layer 1 (model.layers.1.mlp.up_proj.weight)" in facts["diagnosis"]["verdict"]["sentence"]
    assert not PruningPlan.load(tmp_path / "plan.json").removes_nothing


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"warn_ratio": 1.0}, "1 < warn_ratio"),
        ({"warn_ratio": 5.0, "stop_ratio": 4.0}, "got 5.0 and 4.0"),
        ({"max_perplexity": 1.0}, "try 100"),
    ],
)
def test_bounds_that_make_no_sense_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PerplexityGuard(**settings)
