"""The command line on a tiny model: what each command writes and prints, and a sentence for what the user can mend."""

import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.strategies import (
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from transformers import AutoModelForCausalLM

from gqaprune.cli import PruningCLI, check_checkpoint, main, spell_out
from gqaprune.gates import compute_gate_gradients
from gqaprune.plan import PruningPlan
from gqaprune.progress import console
from gqaprune.sampling import sample_from_model
from gqaprune.selection import keep_everything
from gqaprune.surgery import apply_plan

from tiny import DATA, PLAIN, make_model, make_tokenizer

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
Run = Callable[..., int]
DENSE = "lightning_logs/unfinished/perplexity-dense.stage"
"""What a run has finished before it calibrates."""


@pytest.fixture
def run(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """Run a command in an empty folder on the tiny model; returns the exit code."""
    config = {
        "model": {"pretrained": str(tiny_folder), "dtype": "float32"},
        "data": DATA,
        "pruning": {"scheduling": {0: 2}, "rate": 0.3, "allocation": "global", **PLAIN},
        "trainer": {"accelerator": "cpu", "max_epochs": 1, "enable_checkpointing": False, "enable_progress_bar": False},
    }
    folder = tmp_path / "work"
    folder.mkdir()
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.chdir(folder)

    def run_command(command: str, *arguments: str) -> int:
        monkeypatch.setattr("sys.argv", ["gqaprune", command, "--config", str(tmp_path / "tiny.yaml"), *arguments])
        try:
            return main()
        except SystemExit as stop:
            return int(stop.code or 0)

    on_interrupt = signal.getsignal(signal.SIGINT)
    yield run_command
    signal.signal(signal.SIGINT, on_interrupt)  # Lightning ignores it after an interrupt


def read_scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_fit_prunes_recovers_and_writes_everything(run: Run, tiny_folder: Path) -> None:
    assert run("fit") == 0
    folder = Path("lightning_logs/version_0")
    names = {path.name for path in folder.iterdir() if not path.name.startswith("events.out")}
    told = README.split("## What a run writes")[1].split("\n## ")[0]
    listed = set(re.findall(r"^\| `([\w.]+)`", told, flags=re.MULTILINE))
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
    assert "| recovered, int8 |" in card and "gqaprune fit --config" in card and "padded" not in card.split("How it")[0]


def test_formats_are_promised_only_where_they_will_hold_the_model(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("prune", "--export.format", "stock") == 1
    assert "needs equal counts in every layer: set allocation: uniform" in capsys.readouterr().err
    whole = [
        "--pruning.attention_layers",
        "[0, 3]",
        "--pruning.mlp_layers",
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
    assert len(scalars["train/loss"]) == len(scalars["train/learning_rate"]) == 4  # 32 windows / 4 / accumulation 2
    for name, stage in (("dense", dense), ("pruned", pruned), ("recovered", recovered)):
        assert scalars[f"ppl/embedded/{name}"][0][1] == pytest.approx(stage["perplexity"]["val/embedded"], rel=1e-5)
        assert scalars[f"ppl_test/embedded/{name}"][0][1] == pytest.approx(
            stage["perplexity"]["test/embedded"], rel=1e-5
        )
    curve = scalars["ppl/embedded"]  # pruned, then every validation
    assert curve[0] == (0, pytest.approx(pruned["perplexity"]["val/embedded"], rel=1e-5))
    assert len(curve) == 3 and curve[-1][1] == pytest.approx(recovered["perplexity"]["val/embedded"], rel=1e-5)
    assert scalars["hp_metric"][-1][1] == pytest.approx(recovered["perplexity"]["val/embedded"], rel=1e-5)

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
    assert run("prune", "--pruning.frozen_layers", "1", "--pruning.sensitivity", "block_influence") == 0
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


def test_written_config_repeats_the_run(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("fit") == 0
    monkeypatch.setattr("sys.argv", ["gqaprune", "fit", "--config", "lightning_logs/version_0/config.yaml"])
    assert main() == 0
    first, second = (Path(f"lightning_logs/version_{n}") for n in (0, 1))
    assert (first / "plan.json").read_text() == (second / "plan.json").read_text()
    assert json.loads((first / "report.json").read_text()) == json.loads((second / "report.json").read_text())


def test_prune_cuts_and_saves_without_training(run: Run, tiny_folder: Path) -> None:
    assert run("prune", "--export.folder", "out/pruned", "--data.train", "[wikitext2]") == 0  # train text is not needed
    dense = AutoModelForCausalLM.from_pretrained(tiny_folder)
    apply_plan(dense, PruningPlan.load("out/pruned/plan.json"))
    pruned = AutoModelForCausalLM.from_pretrained("out/pruned", trust_remote_code=True)
    for name, tensor in dense.state_dict().items():
        assert torch.equal(pruned.state_dict()[name], tensor)
    report = json.loads(Path("lightning_logs/version_0/report.json").read_text())
    assert [stage["name"] for stage in report["stages"]] == ["dense", "pruned"]
    assert len(read_scalars(Path("lightning_logs/version_0"))["ppl/embedded/pruned"]) == 1


def test_layers_on_disk_are_pruned_to_what_pruning_in_memory_gives(run: Run) -> None:
    settings = ("--pruning.criterion", "obs", "--pruning.repair", "least_squares", "--pruning.repair_epochs", "1")
    for folder, offload in (("memory", "false"), ("disk", "true")):
        assert run("prune", *settings, "--export.folder", folder, "--pruning.offload", offload) == 0
    plan = ("--model.plan", "disk/plan.json", "--model.recovery.mode", "none")
    assert run("fit", *plan, "--export.folder", "plan", "--pruning.offload", "true") == 0  # nothing is trained
    load = partial(AutoModelForCausalLM.from_pretrained, trust_remote_code=True)
    memory, disk, cut = (load(folder).state_dict() for folder in ("memory", "disk", "plan"))
    assert memory.keys() == disk.keys() == cut.keys()
    assert all(torch.equal(disk[name], tensor) for name, tensor in memory.items())
    assert Path("memory/plan.json").read_text() == Path("disk/plan.json").read_text()
    assert {name: tensor.shape for name, tensor in cut.items()} == {name: t.shape for name, t in disk.items()}
    reports = [json.loads(Path(f"lightning_logs/version_{n}/report.json").read_text()) for n in (0, 1)]
    assert reports[0] == reports[1]
    assert len(list(Path("disk").glob("*.safetensors"))) == 4  # three layers, and what is outside of them


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        ("prune", [], "criterion fisher needs the whole model in memory"),
        ("fit", ["--pruning.criterion", "obs"], "recovery.mode full would train: take gqaprune prune, or set"),
        ("search", [], "search tries splits on the whole model in memory: set pruning.offload to false"),
        ("prune", ["--data.sampled_windows", "4"], "data.sampled_windows 4 needs the whole model"),
        ("prune", ["--export.format", "gguf-f16"], "format gguf-f16 needs the whole model in memory"),
    ],
)
def test_what_layers_on_disk_exclude_is_said_before_any_work(
    run: Run, capsys: pytest.CaptureFixture[str], command: str, arguments: list[str], message: str
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gqaprune.module.load_model", lambda *_: pytest.fail("a model was loaded"))
        patch.setattr("gqaprune.module.load_offloaded_model", lambda *_: pytest.fail("a model was loaded"))
        assert run(command, "--pruning.offload", "true", *arguments) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("prune", "over all 1 processes of a ModelParallelStrategy, got SingleDeviceStrategy: set trainer.strategy as"),
        ("search", "search tries splits on the whole model in memory: set pruning.sharded to false"),
    ],
)
def test_layers_are_split_over_several_devices_only(
    run: Run, capsys: pytest.CaptureFixture[str], command: str, message: str
) -> None:
    assert run(command, "--pruning.sharded", "true") == 1
    assert message in capsys.readouterr().err


def test_plan_of_one_run_is_reapplied_by_the_next_without_calibration(run: Run) -> None:
    assert run("prune", "--export.folder", "first") == 0
    assert run("prune", "--export.folder", "second", "--model.plan", "first/plan.json", "--data.calibration", "[]") == 0
    weights = [
        AutoModelForCausalLM.from_pretrained(f, trust_remote_code=True).state_dict() for f in ("first", "second")
    ]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    stages = [json.loads(Path(f"lightning_logs/version_{n}/report.json").read_text())["stages"] for n in (0, 1)]
    # Without calibration there is no text held out of it.
    assert stages[1] == [stage | {"held_out": None} for stage in stages[0][1:]]


def test_training_of_a_pruned_checkpoint_in_its_place_keeps_its_plan(run: Run) -> None:
    assert run("prune", "--export.folder", "pruned") == 0
    made = Path("pruned/plan.json").read_text()
    assert run("fit", "--model.pretrained", "pruned", "--pruning.rate", "0", "--export.folder", "pruned") == 0
    assert Path("pruned/plan.json").read_text() == made
    assert "asked to lose 30.0%" in Path("pruned/README.md").read_text()


REMOTE = """
from transformers import LlamaConfig, LlamaForCausalLM
class MyConfig(LlamaConfig):
    model_type = "llama"
class MyForCausalLM(LlamaForCausalLM):
    config_class = MyConfig
"""


def test_model_with_code_of_its_own_is_padded_where_layers_differ(run: Run, tiny_folder: Path) -> None:
    shutil.copytree(tiny_folder, "remote")
    Path("remote/own.py").write_text(REMOTE)
    config = json.loads(Path("remote/config.json").read_text())
    config["auto_map"] = {"AutoConfig": "own.MyConfig", "AutoModelForCausalLM": "own.MyForCausalLM"}
    Path("remote/config.json").write_text(json.dumps(config))
    settings = ("--model.pretrained", "remote", "--model.trust_remote_code", "true", "--export.folder", "out")
    assert run("prune", *settings) == 0
    model = AutoModelForCausalLM.from_pretrained("out", trust_remote_code=True)
    assert type(model).__name__ == "MyForCausalLM"
    measured = json.loads(Path("lightning_logs/version_0/report.json").read_text())["stages"][-1]["perplexity"]
    assert run("validate", *settings[2:4], "--model.pretrained", "out") == 0
    assert measured and "README.md" in {path.name for path in Path("out").iterdir()}


def test_search_finds_a_split_and_pruning_by_it_gives_the_perplexity_it_promised(
    run: Run, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    console.quiet = False
    before = {path: path.read_bytes() for path in tiny_folder.iterdir()}
    # Neither training nor test text is touched.
    missing = ("--data.train", "[nowhere.txt]", "--data.test", "[gone.txt]")
    assert run("search", "--search.coarse_step", "2", "--search.fine_step", "1", *missing) == 0
    shown = capsys.readouterr().out
    found = json.loads(Path("lightning_logs/search/search.json").read_text())
    perplexity = {trial["split"]: trial["perplexity"] for trial in found["trials"]}
    assert f"--pruning.split {found['best']}\n" in shown and f"{perplexity[found['best']]:.3f} best" in shown
    assert all(f" {split} " in shown for split in perplexity)
    assert Path("lightning_logs/search/search.png").read_bytes().startswith(b"\x89PNG")
    assert {path: path.read_bytes() for path in tiny_folder.iterdir()} == before
    assert not [path for path in Path("lightning_logs/version_0").iterdir() if path.name in ("checkpoint", "plan.json")]

    assert len({value for value in perplexity.values() if value}) > 1
    for split in (found["best"], "10:0", next((split for split in perplexity if not perplexity[split]), "4:6")):
        value = perplexity[split]
        assert run("prune", "--pruning.split", split, "--export.folder", f"out/{split}") == (value is None)
        if value is not None:
            newest = max(Path("lightning_logs").glob("version_*"), key=lambda path: int(path.name.split("_")[1]))
            pruned = json.loads((newest / "report.json").read_text())["stages"][1]
            assert pruned["perplexity"]["val/embedded"] == pytest.approx(value, rel=1e-4)


def test_pruning_and_search_calibrate_on_text_that_the_model_writes(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample = partial(sample_from_model, cache=tmp_path / "samples")
    monkeypatch.setattr("gqaprune.datamodules.text.sample_from_model", sample)
    text = ("--data.calibration", "[]", "--data.sampled_windows", "4")
    assert run("search", "--search.coarse_step", "5", *text) == 0
    assert run("prune", "--pruning.repair", "least_squares", "--export.folder", "out", *text) == 0
    assert PruningPlan.load("lightning_logs/version_1/plan.json").corpora == ("4 sampled windows",)
    assert len(list((tmp_path / "samples").iterdir())) == 1  # written once, read back by the second command
    repairs = json.loads(Path("lightning_logs/version_1/report.json").read_text())["repairs"]
    assert repairs and any(repair["error_after"] < repair["error_before"] for repair in repairs)


def test_search_goes_on_with_what_its_folder_holds_and_refuses_what_is_of_another(
    run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("--search.folder", "found", "--search.coarse_step", "5", "--search.fine_step", "5")
    assert run("search", *arguments) == 0
    first = Path("found/search.json").read_text()
    with monkeypatch.context() as patch:
        patch.setattr("gqaprune.selection.score_units", lambda *_: pytest.fail("scored again"))
        assert run("search", *arguments) == 0
    assert Path("found/search.json").read_text() == first
    assert run("search", *arguments, "--data.seed", "3") == 1
    assert "found/search.json is of another search" in capsys.readouterr().err
    assert run("search", *arguments, "--search.patience", "0") == 1
    assert "search.patience must be at least 1, got 0" in capsys.readouterr().err


def test_split_and_kv_budget_survive_the_written_config(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("prune", "--pruning.split", "4:6", "--export.folder", "first") == 0
    again = ["prune", "--config", "lightning_logs/version_0/config.yaml", "--export.folder", "second"]
    monkeypatch.setattr("sys.argv", ["gqaprune", *again])
    assert main() == 0
    plan, repeated = (PruningPlan.load(Path(folder) / "plan.json") for folder in ("first", "second"))
    assert repeated == plan
    assert run("prune", "--pruning.rate", "0", "--pruning.kv_rate", "0.5", "--export.folder", "third") == 0
    groups_only = PruningPlan.load("third/plan.json")
    assert sum(groups_only.pruned_geometry.kv_heads) == 3 and groups_only.pruned_geometry.channels == (32, 32, 32)


def test_criterion_without_text_needs_no_calibration_corpus(run: Run) -> None:
    assert run("prune", "--pruning.criterion", "l1", "--data.calibration", "[]", "--export.folder", "out") == 0
    plan = PruningPlan.load("out/plan.json")
    assert (plan.criterion, plan.corpora) == ("l1", ()) and not plan.removes_nothing


@pytest.mark.parametrize(("command", "stream"), [("validate", "val"), ("test", "test")])
def test_validate_and_test_report_perplexity_of_a_pruned_checkpoint(run: Run, command: str, stream: str) -> None:
    assert run("fit", "--export.folder", "pruned") == 0
    report = json.loads(Path("lightning_logs/version_0/report.json").read_text())
    assert run(command, "--model.pretrained", "pruned") == 0
    ((_, value),) = read_scalars(Path("lightning_logs/version_1"))["ppl/embedded"]
    assert value == pytest.approx(report["stages"][-1]["perplexity"][f"{stream}/embedded"], rel=1e-5)


def test_validate_does_not_prune(run: Run) -> None:
    assert run("validate") == 0
    (dense,) = read_scalars(Path("lightning_logs/version_0"))["ppl/embedded"]
    assert run("fit") == 0
    report = json.loads(Path("lightning_logs/version_1/report.json").read_text())
    assert dense[1] == pytest.approx(report["stages"][0]["perplexity"]["val/embedded"], rel=1e-5)


def test_rate_zero_trains_the_dense_model(run: Run, tiny_folder: Path) -> None:
    assert run("fit", "--pruning.rate", "0", "--data.calibration", "[]", "--export.folder", "tuned") == 0
    tuned = AutoModelForCausalLM.from_pretrained("tuned")
    dense = AutoModelForCausalLM.from_pretrained(tiny_folder)
    assert {n: t.shape for n, t in tuned.state_dict().items()} == {n: t.shape for n, t in dense.state_dict().items()}
    assert not torch.equal(tuned.lm_head.weight, dense.lm_head.weight)


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


BAD_INPUT = {
    "rate of 1": (["--pruning.rate", "1.0"], "rate must be in [0, 1)"),
    "rate out of reach": (["--pruning.rate", "0.97"], "the nearest reachable rate is 0."),
    "layers outside the model": (["--pruning.mlp_layers", "[0, 9]"], "mlp_layers must satisfy 0 <= first <= end <= 3"),
    "missing corpus": (["--data.calibration", "[nowhere.txt]"], "no corpus or file 'nowhere.txt'"),
    "empty corpus": (["--data.calibration", "[empty.txt]"], "'empty.txt' holds no text"),
    "missing training corpus": (["--data.train", "[nowhere.txt]"], "no corpus or file 'nowhere.txt'"),
    "short corpus": (["--data.calibration", "[short.txt]"], "5 tokens do not fill one window of 32"),
    "short test corpus": (["--data.test", "[short.txt]"], "5 tokens do not fill one window of 32"),
    "evaluated calibration text": (["--data.calibration", "[embedded@test]"], "overlaps with data.test embedded@test"),
    "missing model": (["--model.pretrained", "/no/such/model"], "no model at /no/such/model"),
    "folder without a model": (["--model.pretrained", "."], "it has no config.json"),
    "unknown dtype": (["--model.dtype", "int3"], "dtype must be one of"),
    "foreign tokenizer": (["--model.pretrained", "foreign"], "the tokenizer has 258 tokens but the model embeds 100"),
    "NaN weights": (["--model.pretrained", "broken"], "weights of layer 1 (model.layers.1.mlp.up_proj.weight) hold"),
    "no plan": (["--model.plan", "short.txt"], "short.txt is not a pruning plan"),
    "plan of another model": (["--model.plan", "other.json"], "the plan was made for another model (other)"),
    "export over the dense model": (["--export.folder", "foreign"], "holds files that are not from an earlier run"),
    "export to a file": (["--export.folder", "short.txt"], "short.txt is a file"),
    "settings of another run": (["--trainer.logger", "false"], "config.yaml is there already, and a run without a"),
    "logs below a file": (["--trainer.default_root_dir", "short.txt"], "short.txt is a file"),
    "unknown setting": (["--pruning.no_such", "3"], "arguments: --pruning.no_such 3; `gqaprune fit --help`"),
    "not a number": (["--pruning.rate", "lots"], "\"pruning.rate\": Expected a <class 'float'>. Got value: lots"),
    "missing config": (["--config", "gone.yaml"], "File does not exist"),
    "unknown device": (["--trainer.accelerator", "quantum"], "invalid accelerator name"),
    "unknown sensitivity": (["--pruning.sensitivity", "magic"], "sensitivity must be one of removal, block_removal"),
    "no split": (["--pruning.split", "2-8"], "two numbers, none negative and not both 0, such as 2:8, got '2-8'"),
    "split out of reach": (["--pruning.split", "10:0", "--pruning.rate", "0.9"], "or loosen split, min_groups"),
    "split without quotes": (["--config", "split.yaml"], 'pruning.split needs quotes in YAML, such as "2:8"'),
    "two budgets of attention": (["--pruning.split", "2:8", "--pruning.kv_rate", "0.5"], "set one of them"),
    "unknown criterion": (["--pruning.criterion", "magic"], "criterion must be one of fisher, taylor"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_gets_one_sentence_and_exit_code_1_and_leaves_nothing(
    run: Run, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, sentence = BAD_INPUT[case]
    for name in ("empty.txt", "config.yaml"):
        Path(name).touch()
    Path("short.txt").write_text("short")
    Path("split.yaml").write_text("pruning: {split: 2:8}")
    make_tokenizer().save_pretrained("foreign")
    model = make_model("llama")
    model.resize_token_embeddings(100)
    model.config.pad_token_id = None
    model.save_pretrained("foreign")
    make_tokenizer().save_pretrained("broken")
    model = make_model("llama")
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    model.save_pretrained("broken")
    other = make_model("llama", channels=5)
    replace(keep_everything(other), model="other").save("other.json")
    before = sorted(Path().rglob("*"))
    capsys.readouterr()

    assert run("fit", *arguments) == 1
    error = [line for line in capsys.readouterr().err.splitlines() if line and not line.startswith("Seed set")]
    assert len(error) == 1 and error[0].startswith("gqaprune: error: ") and sentence in error[0]
    logs = Path("lightning_logs")
    assert [path for path in sorted(Path().rglob("*")) if path != logs] == before
    assert not logs.exists() or not list(logs.iterdir())


def test_error_leaves_the_events_of_an_earlier_run_in_a_reused_folder(run: Run) -> None:
    earlier = Path("lightning_logs/version_0/events.out.tfevents.1.earlier.0")
    earlier.parent.mkdir(parents=True)
    earlier.write_bytes(b"an earlier run")
    logger = (
        "--trainer.logger",
        "TensorBoardLogger",
        "--trainer.logger.save_dir",
        ".",
        "--trainer.logger.version",
        "0",
    )
    assert run("fit", "--pruning.rate", "0.97", *logger) == 1
    assert earlier.read_bytes() == b"an earlier run"


def test_checkout_runs_the_same_commands_by_cli_py() -> None:
    root = Path(__file__).parent.parent
    shown = subprocess.run([sys.executable, "cli.py", "--help"], cwd=root, capture_output=True, text=True, check=True)
    assert all(
        f"    {command} " in shown.stdout for command in ("fit", "validate", "test", "predict", "prune", "search")
    )


def test_nan_scores_stop_with_the_block(
    run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(*arguments: Any) -> Any:
        gradients, losses = compute_gate_gradients(*arguments)
        gradients[1, "attention"][0, 1] = float("inf")
        return gradients, losses

    monkeypatch.setattr("gqaprune.criteria.gates.compute_gate_gradients", spoil)
    assert run("fit") == 1
    assert "layer 1 attention: 1 of 2 scores are NaN or infinite (first: unit 1)" in capsys.readouterr().err
    assert list_files() == [DENSE]


def test_interrupt_during_calibration_leaves_nothing_half_written(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def interrupt(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return compute_gate_gradients(*arguments)

    monkeypatch.setattr("gqaprune.criteria.gates.compute_gate_gradients", interrupt)
    assert run("fit", "--export.folder", "out") == 128 + signal.SIGINT
    assert len(calls) == 3
    assert list_files() == [DENSE]


@pytest.mark.parametrize(("command", "sentence"), [("prune", "; the same command goes on from here"), ("validate", "")])
def test_a_stopped_command_says_that_it_goes_on_where_it_does(
    run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: str, sentence: str
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("gqaprune.module.CausalLMModule.load", interrupt)
    assert run(command) == 128 + signal.SIGINT
    assert capsys.readouterr().err.splitlines()[-1] == f"gqaprune: stopped{sentence}"


def list_files() -> list[str]:
    return [str(path) for path in Path().rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    ("reader", "writer", "sentence"),
    [
        (FSDPStrategy, "FSDPStrategy", None),
        (ModelParallelStrategy, "ModelParallelStrategy", None),
        (FSDPStrategy, "ModelParallelStrategy", "FSDPStrategy cannot read what ModelParallelStrategy wrote"),
        (ModelParallelStrategy, "FSDPStrategy", "set trainer.strategy to FSDPStrategy"),
        (SingleDeviceStrategy, "FSDPStrategy", "goes on from single files"),
        (FSDPStrategy, "one file", "goes on from folders"),
        (DeepSpeedStrategy, "one file", "goes on from nothing but files that have to be unpickled"),
        (FSDPStrategy, "DeepSpeedStrategy", "has no meta.pt"),
        (SingleDeviceStrategy, "weights alone", "holds weights alone, without what training goes on with"),
        (SingleDeviceStrategy, "something else", "is cut short, or no checkpoint of Lightning's"),
    ],
)
def test_training_goes_on_under_what_can_read_the_checkpoint(
    tmp_path: Path, reader: type[Strategy], writer: str, sentence: str | None
) -> None:
    path = tmp_path / "epoch=0.ckpt"
    if writer == "one file":
        path.touch()
    elif writer == "weights alone":
        torch.save({"state_dict": {}, "loops": {}}, path)
    elif writer == "something else":
        path.write_text("something else")
    else:
        path.mkdir()
        if writer != "DeepSpeedStrategy":
            torch.save({"strategy": writer, "callbacks": {}}, path / "meta.pt")
    trainer: Any = SimpleNamespace(strategy=reader.__new__(reader))
    with nullcontext() if sentence is None else pytest.raises(ValueError, match=sentence):
        check_checkpoint(path, trainer)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("inspect M --write-config my-file", "inspect M --write_config my-file"),
        ("inspect --json my-model", "inspect --json=true my-model"),
        ("inspect M --json", "inspect M --json=true"),
        ("compare --models a-b --json --png x-y", "compare --models a-b --json=true --png x-y"),
        ("inspect M --json false --outliers=true", "inspect M --json false --outliers=true"),
        ("inspect M --trust-remote-code", "inspect M --trust_remote_code=true"),
        ("fit --data.eval-window=64 --print_config -h", "fit --data.eval_window=64 --print_config -h"),
        ("fit --pruning.offload true", "fit --pruning.offload true"),
        ("", ""),
    ],
)
def test_options_may_be_typed_as_people_do(typed: str, meant: str) -> None:
    assert spell_out(typed.split()) == meant.split()


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict", "prune", "search"])
def test_every_own_setting_has_its_meaning_in_help(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["gqaprune"])
    cli = PruningCLI.__new__(PruningCLI)
    with pytest.raises(SystemExit):
        cli.__init__(args=[command, "--help"])  # type: ignore[misc]
    parser = cli._subcommand_parsers[command]
    groups = {"model", "data", "pruning", "export", "samples", "search"}
    own = [a for a in parser._actions if a.dest.split(".")[0] in groups and "." in a.dest]
    assert ("search.patience" in [a.dest for a in own]) == (command == "search")
    assert len(own) > 30
    assert [action.dest for action in own if not action.help] == []
