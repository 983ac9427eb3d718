"""The command line on a tiny model: what each command does."""

import json
import shutil
import subprocess
import sys
from functools import partial
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from gqaprune.cli import main
from gqaprune.cli.arguments import TOOLS, spell_out
from gqaprune.cli.lightning_cli import PruningCLI
from gqaprune.cli.overview import DESCRIPTIONS
from gqaprune.common.console import console
from gqaprune.data.sampling import sample_from_model
from gqaprune.plan import PruningPlan
from gqaprune.surgery.cut import apply_plan

from command import Run, read_scalars


def test_written_config_repeats_the_run(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("fit") == 0
    monkeypatch.setattr("sys.argv", ["gqaprune", "fit", "--config", "lightning_logs/version_0/config.yaml"])
    assert main() == 0
    first, second = (Path(f"lightning_logs/version_{n}") for n in (0, 1))
    assert (first / "plan.json").read_text() == (second / "plan.json").read_text()
    assert json.loads((first / "report.json").read_text()) == json.loads((second / "report.json").read_text())


def test_prune_cuts_and_saves_without_training(run: Run, tiny_folder: Path) -> None:
    assert (
        run("prune", "--export.folder", "out/pruned", "--data.training.corpora", "[wikitext2]") == 0
    )  # train text is not needed
    dense = AutoModelForCausalLM.from_pretrained(tiny_folder)
    apply_plan(dense, PruningPlan.load("out/pruned/plan.json"))
    pruned = AutoModelForCausalLM.from_pretrained("out/pruned", trust_remote_code=True)
    for name, tensor in dense.state_dict().items():
        assert torch.equal(pruned.state_dict()[name], tensor)
    report = json.loads(Path("lightning_logs/version_0/report.json").read_text())
    assert [stage["name"] for stage in report["stages"]] == ["dense", "pruned"]
    assert len(read_scalars(Path("lightning_logs/version_0"))["ppl/embedded/pruned"]) == 1


def test_layers_on_disk_are_pruned_to_what_pruning_in_memory_gives(run: Run) -> None:
    settings = (
        "--pruning.criterion",
        "obs",
        "--pruning.repair.method",
        "least_squares",
        "--pruning.repair.epochs",
        "1",
        "--pruning.repair.distill_tokens",
        "0",
    )
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


def test_plan_of_one_run_is_reapplied_by_the_next_without_calibration(run: Run) -> None:
    assert run("prune", "--export.folder", "first") == 0
    assert (
        run("prune", "--export.folder", "second", "--model.plan", "first/plan.json", "--data.calibration.corpora", "[]")
        == 0
    )
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
    assert "to remove 30.0%" in Path("pruned/README.md").read_text()


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
    missing = ("--data.training.corpora", "[nowhere.txt]", "--data.evaluation.test", "[gone.txt]")
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
    text = ("--data.calibration.corpora", "[]", "--data.calibration.sampled_windows", "4")
    assert run("search", "--search.coarse_step", "5", *text) == 0
    assert run("prune", "--pruning.repair.method", "least_squares", "--export.folder", "out", *text) == 0
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
        patch.setattr("gqaprune.planning.selection.score_units", lambda *_: pytest.fail("scored again"))
        assert run("search", *arguments) == 0
    assert Path("found/search.json").read_text() == first
    assert run("search", *arguments, "--data.seed", "3") == 1
    assert "found/search.json belongs to another search" in capsys.readouterr().err
    assert run("search", *arguments, "--search.patience", "0") == 1
    assert "search.patience must be at least 1, got 0" in capsys.readouterr().err


def test_sweep_leaves_at_every_rate_what_prune_leaves_and_goes_on_with_what_is_there(
    run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    console.quiet = False
    settings = ("--pruning.damage", "repaired", "--pruning.allocation", "optimal")
    settings += ("--pruning.repair.method", "least_squares")
    assert run("sweep", "--rates", "0.2,0.4", "--folder", "rates", *settings) == 0
    shown = capsys.readouterr().out
    found = json.loads(Path("rates/sweep.json").read_text())
    stages = {row["rate"]: row for row in found["results"]}
    assert stages.keys() == {0.0, 0.2, 0.4} and not Path("rates/stages").exists()
    assert Path("rates/sweep.png").read_bytes().startswith(b"\x89PNG")
    for rate, stage in stages.items():
        assert f"{stage['perplexity']['val/embedded']:.2f}" in shown
        if rate:
            out = f"out-{rate}"
            assert run("prune", "--pruning.rate", str(rate), "--export.folder", out, *settings) == 0
            assert read_weights(Path(out)) == read_weights(Path(f"rates/rate-{rate:g}"))
            newest = max(Path("lightning_logs").glob("version_*"), key=lambda path: int(path.name.split("_")[1]))
            pruned = json.loads((newest / "report.json").read_text())["stages"][1]
            assert pruned["perplexity"] == stage["perplexity"]
    monkeypatch.setattr("gqaprune.planning.selection.score_units", lambda *_: pytest.fail("scored again"))
    assert run("sweep", "--rates", "0.2,0.4", "--folder", "rates", *settings) == 0
    assert json.loads(Path("rates/sweep.json").read_text()) == found
    assert run("sweep", "--rates", "0.2", "--folder", "rates", *settings, "--data.seed", "3") == 1
    assert "rates/sweep.json belongs to a sweep with other settings: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--rates", "0.2,1.2"), "sweep.rates must be different numbers between 0 and 1, got [0.2, 1.2]"),
        (("--rates=0.2,0.2",), "sweep.rates must be different numbers between 0 and 1, got [0.2, 0.2]"),
        (("--rates", "0.2,0.99"), "cannot remove 99.00%"),
    ],
)
def test_rates_that_cannot_be_met_are_refused_before_any_is_tried(
    arguments: tuple[str, ...], sentence: str, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("sweep", "--folder", "rates", *arguments) == 1
    assert sentence in capsys.readouterr().err and not Path("rates/sweep.json").exists()


def read_weights(folder: Path) -> dict[str, list[float]]:
    """Every weight of a checkpoint."""
    return {name: tensor.flatten().tolist() for name, tensor in load_file(folder / "model.safetensors").items()}


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
    assert run("prune", "--pruning.criterion", "l1", "--data.calibration.corpora", "[]", "--export.folder", "out") == 0
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
    assert run("fit", "--pruning.rate", "0", "--data.calibration.corpora", "[]", "--export.folder", "tuned") == 0
    tuned = AutoModelForCausalLM.from_pretrained("tuned")
    dense = AutoModelForCausalLM.from_pretrained(tiny_folder)
    assert {n: t.shape for n, t in tuned.state_dict().items()} == {n: t.shape for n, t in dense.state_dict().items()}
    assert not torch.equal(tuned.lm_head.weight, dense.lm_head.weight)


def test_checkout_runs_the_same_command_by_cli_py_whose_overview_needs_nothing_else() -> None:
    root = Path(__file__).parent.parent
    script = "import runpy, sys\ntry:\n    runpy.run_path('cli.py')\nfinally:\n    print('torch' in sys.modules)"
    command = [sys.executable, "-c", script, "--help"]
    shown = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout
    assert shown.splitlines()[-1] == "False"
    assert all(f"\n  {name:<10}" in shown for name in DESCRIPTIONS)


def test_every_command_is_in_the_overview() -> None:
    assert DESCRIPTIONS.keys() == PruningCLI.subcommands().keys() | TOOLS.keys()


def test_version_is_the_installed_packages(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["gqaprune", "--version"])
    assert main() == 0 and capsys.readouterr().out == f"gqaprune {version('gqaprune')}\n"


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("inspect M --write-config my-file", "inspect M --write_config my-file"),
        ("inspect --json my-model", "inspect --json=true my-model"),
        ("inspect M --json", "inspect M --json=true"),
        ("compare --models a-b --json --png x-y", "compare --models a-b --json=true --png x-y"),
        ("inspect M --json false --outliers=true", "inspect M --json false --outliers=true"),
        ("inspect M --trust-remote-code", "inspect M --trust_remote_code=true"),
        ("fit --model.max-new-tokens=64 --print_config -h", "fit --model.max_new_tokens=64 --print_config -h"),
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
