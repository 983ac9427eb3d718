"""What commands write and print, on a tiny model."""

import json
import re
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from transformers import AutoModelForCausalLM

from gqaprune.common.console import console
from gqaprune.plan import PruningPlan

from command import Run, read_scalars

RUN_FILES = (Path(__file__).parent.parent / "docs/run_files.md").read_text(encoding="utf-8")


def test_fit_prunes_recovers_and_writes_everything(run: Run, tiny_folder: Path) -> None:
    assert run("fit") == 0
    folder = Path("lightning_logs/version_0")
    names = {path.name for path in folder.iterdir() if not path.name.startswith("events.out")}
    listed = set(re.findall(r"^\| `([\w.]+)`", RUN_FILES, flags=re.MULTILINE))
    assert names == listed - {"guard.json", "predictions.json"} and {"report.html", "run.log"} < names

    report = json.loads((folder / "report.json").read_text())
    assert [stage["name"] for stage in report["stages"]] == ["dense", "pruned", "recovered"]
    assert report["rate_reached"] == pytest.approx(0.3, abs=0.02)
    assert set(report["stages"][0]["perplexity"]) == {"val/embedded", "test/embedded"}
    assert (folder / "pruning.png").read_bytes().startswith(b"\x89PNG")

    plan = PruningPlan.load(folder / "plan.json")
    assert (plan.model, plan.corpora) == (str(tiny_folder), ("embedded@train",))
    model = AutoModelForCausalLM.from_pretrained(folder / "checkpoint", trust_remote_code=True)
    assert sum(p.numel() for p in model.parameters()) == report["stages"][2]["parameters"]


def test_weights_that_training_leaves_in_bfloat16_are_counted_in_it(run: Run) -> None:
    assert run("fit", "--trainer.precision", "bf16-true") == 0
    (path,) = Path("lightning_logs").glob("version_0/report.json")
    dense, pruned, recovered = json.loads(path.read_text())["stages"]
    assert dense["weight_bytes"] == 4 * dense["parameters"] and pruned["weight_bytes"] == 4 * pruned["parameters"]
    assert recovered["weight_bytes"] == 2 * recovered["parameters"]
    assert 2 * recovered["kv_cache_bytes_per_token"] == pruned["kv_cache_bytes_per_token"]


def test_fit_writes_the_format_that_is_asked_for_and_measures_it_in_8_bits(run: Run) -> None:
    pytest.importorskip("torchao")
    assert run("fit", "--export.format", "padded", "--export.quantization", "int8") == 0
    folder = Path("lightning_logs/version_0")
    stages = {stage["name"]: stage for stage in json.loads((folder / "report.json").read_text())["stages"]}
    assert list(stages) == ["dense", "pruned", "recovered", "recovered, int8"]
    before, after = stages["recovered"], stages["recovered, int8"]
    assert after["perplexity"]["val/embedded"] == pytest.approx(before["perplexity"]["val/embedded"], rel=0.05)
    assert after["perplexity"] != before["perplexity"]
    model = AutoModelForCausalLM.from_pretrained(folder / "checkpoint")
    assert type(model.model.layers[0].mlp.up_proj.weight).__name__ == "Int8Tensor"
    card = (folder / "checkpoint/README.md").read_text()
    assert "| recovered, int8 |" in card and "gqaprune fit --config" in card


def test_formats_are_promised_only_where_they_will_hold_the_model(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("prune", "--export.format", "stock") == 1
    assert "needs equal counts in every layer: set allocation: uniform" in capsys.readouterr().err
    whole = [
        "--pruning.limits.attention_layers",
        "[0, 3]",
        "--pruning.limits.mlp_layers",
        "[0, 3]",
        "--pruning.allocation",
        "uniform",
    ]
    assert run("prune", "--export.format", "stock", *whole) == 0
    (written,) = Path("lightning_logs").glob("*/checkpoint/config.json")
    assert json.loads(written.read_text())["architectures"] == ["LlamaForCausalLM"]


def test_fit_logs_loss_learning_rate_perplexity_plan_and_hparams_to_tensorboard(run: Run) -> None:
    assert run("fit", "--trainer.val_check_interval", "4") == 0
    folder = Path("lightning_logs/version_0")
    scalars = read_scalars(folder)
    dense, pruned, recovered = json.loads((folder / "report.json").read_text())["stages"]
    assert len(scalars["train/loss"]) == 4  # 32 windows / 4 / accumulation 2
    assert {step for step, _ in scalars["learning_rate/matrices"]} == {0, 1, 2, 3}
    for name, stage in (("dense", dense), ("pruned", pruned), ("recovered", recovered)):
        assert scalars[f"ppl/embedded/{name}"][0][1] == pytest.approx(stage["perplexity"]["val/embedded"], rel=1e-5)
        assert scalars[f"ppl_test/embedded/{name}"][0][1] == pytest.approx(
            stage["perplexity"]["test/embedded"], rel=1e-5
        )
    curve = scalars["ppl/embedded"]  # pruned, then every validation
    assert curve[0] == (0, pytest.approx(pruned["perplexity"]["val/embedded"], rel=1e-5))
    assert len(curve) == 3 and curve[-1][1] == pytest.approx(recovered["perplexity"]["val/embedded"], rel=1e-5)
    assert scalars["ppl/final"][-1][1] == pytest.approx(recovered["perplexity"]["val/embedded"], rel=1e-5)

    events = EventAccumulator(str(folder))
    events.Reload()
    assert "pruning" in events.Tags()["images"]
    (text,) = events.Tensors("plan/text_summary")
    assert "layer 2  6Q:2KV →" in text.tensor_proto.string_val[0].decode()
    assert "sensitivity" not in events.Tags()["images"]  # nothing looked at it

    (layout,) = events.Tensors("custom_scalars__config__")
    (category,) = layout_pb2.Layout.FromString(layout.tensor_proto.string_val[0]).category
    (chart,) = category.chart
    shown = {tag for tag in scalars if any(re.search(pattern, tag) for pattern in chart.multiline.tag)}
    stages = {f"ppl/embedded/{name}" for name in ("dense", "pruned", "recovered")}
    assert shown == {"train/loss", "ppl/embedded"} | stages


def test_tensorboard_shows_scores_of_every_block_and_the_sensitivity_that_was_measured(run: Run) -> None:
    assert run("prune", "--pruning.limits.frozen_layers", "1", "--pruning.sensitivity.method", "block_influence") == 0
    events = EventAccumulator(str(Path("lightning_logs/version_0")))
    events.Reload()
    assert {"pruning", "sensitivity"} <= set(events.Tags()["images"])
    units = {"attention": 2, "mlp": 32}
    ranges = {kind: range(3) for kind in units}
    tags = {f"scores_{kind}/layer_{layer:02}": units[kind] for kind in units for layer in ranges[kind]}
    found = {tag: events.Histograms(tag)[0].histogram_value for tag in events.Tags()["histograms"]}
    assert found and found.keys() <= tags.keys()
    outliers = json.loads(Path("lightning_logs/version_0/report.json").read_text())["outliers"]
    assert sum(one.num for one in found.values()) == sum(tags[tag] for tag in found) - len(outliers)
    assert all(one.min >= 0 and one.max > one.min for one in found.values())


def test_run_log_has_command_versions_table_and_what_verbose_shows(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    assert run("prune") == 0
    hidden = "GPU available"
    lines = Path("lightning_logs/version_0/run.log").read_text().splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} [A-Z]+ ", line) for line in lines)
    assert "command: gqaprune prune --config " in lines[0] and "versions: python " in lines[1]
    report = json.loads(Path("lightning_logs/version_0/report.json").read_text())
    dense, pruned = (f"{stage['perplexity']['val/embedded']:.2f}" for stage in report["stages"])
    assert any(re.search(rf"ppl val/embedded +│ +{dense} │ +{pruned} │", line) for line in lines)
    assert not any(hidden in line for line in [*lines, *caplog.messages])

    assert run("prune", "--verbose") == 0
    assert any(hidden in line for line in caplog.messages)
    log = Path("lightning_logs/version_1/run.log").read_text()
    assert hidden in log and "--verbose" in log.splitlines()[0]


def test_page_of_a_run_has_its_table_and_its_samples(run: Run) -> None:
    assert run("fit", "--samples.prompts", "1") == 0
    page = Path("lightning_logs/version_0/report.html").read_text()
    report = json.loads(Path("lightning_logs/version_0/report.json").read_text())
    for stage in report["stages"]:
        assert f"<td>{stage['perplexity']['test/embedded']:.2f}</td>" in page
    assert "gqaprune fit --config" in page and '<p class="state">finished</p>' in page
    assert page.count("<figcaption>step ") >= 2


def test_fit_output_shows_each_layer_the_ratio_the_table_and_the_paths(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    console.quiet = False
    assert run("fit", "--pruning.allocation", "uniform") == 0
    shown = capsys.readouterr().out
    assert "layer 2  6Q:2KV → 3Q:1KV  MLP 32 → " in shown
    assert "GQA ratio: ✅ every layer keeps 3:1" in shown
    assert "asked to remove 30.00% of decoder-layer parameters, removed" in shown
    for word in ("dense", "pruned", "recovered", "KV-cache bytes/token", "ppl test/embedded"):
        assert word in shown
    for name in ("config.yaml", "plan.json", "pruning.png", "report.json", "report.html", "run.log", "checkpoint"):
        assert f"lightning_logs/version_0/{name}" in shown


def test_a_disk_that_takes_no_logs_ends_no_run(
    run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    for where in ("SummaryWriter.add_scalar", "SummaryWriter.add_text", "SummaryWriter.add_figure"):
        monkeypatch.setattr(f"torch.utils.tensorboard.{where}", refuse)
    for where in ("summary.save_figure", "summary.write_page", "guard.write_atomically"):
        monkeypatch.setattr(f"gqaprune.callbacks.{where}", refuse)
    monkeypatch.setattr("gqaprune.reporting.report.Report.save", refuse)
    console.quiet = False
    assert run("fit") == 0
    said = capsys.readouterr().out
    reason = "[Errno 28] No space left on device\n"
    for part in ("pruning.png", "report.json", "report.html", "sample 1"):
        assert f"{part} is left out: {reason}" in said
    assert said.count(f"TensorBoardLogger is incomplete: {reason}") == 1
    assert (Path("lightning_logs/version_0/checkpoint") / "config.json").exists()


def test_a_checkpoint_that_does_not_fit_is_said_in_a_sentence(
    run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lightning.pytorch.strategies.SingleDeviceStrategy.save_checkpoint", refuse)
    assert run("fit", "--trainer.enable_checkpointing", "true") == 1
    pattern = (
        r"gqaprune: error: cannot write .*\.ckpt: No space left on device; it needs [\d,.]+ (bytes|MB), .* are free in"
    )
    assert re.match(pattern, capsys.readouterr().err.splitlines()[-1])
