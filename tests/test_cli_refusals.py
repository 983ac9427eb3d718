"""Commands that stop: a sentence for what the user can mend, and nothing half-written, on a tiny model."""

import json
import shutil
import signal
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import (
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
)

from gqaprune.cli.trainer import check_checkpoint
from gqaprune.models.gates import compute_gate_gradients
from gqaprune.planning.selection import keep_everything

from command import Run
from tiny import make_model, make_tokenizer

DENSE = "lightning_logs/unfinished/perplexity-dense.stage"
"""What a run has finished before it calibrates."""


BAD_INPUT = {
    "rate of 1": (["--pruning.rate", "1.0"], "rate must be in [0, 1)"),
    "rate out of reach": (["--pruning.rate", "0.97"], "the nearest reachable rate is 0."),
    "layers outside the model": (["--pruning.limits.mlp_layers", "[0, 9]"], "satisfy 0 <= first <= end <= 3"),
    "missing corpus": (["--data.calibration.corpora", "[nowhere.txt]"], "no corpus or file 'nowhere.txt'"),
    "empty corpus": (["--data.calibration.corpora", "[empty.txt]"], "'empty.txt' holds no text"),
    "missing training corpus": (["--data.training.corpora", "[nowhere.txt]"], "no corpus or file 'nowhere.txt'"),
    "short corpus": (["--data.calibration.corpora", "[short.txt]"], "5 tokens do not fill one window of 32"),
    "short test corpus": (["--data.evaluation.test", "[short.txt]"], "5 tokens do not fill one window of 32"),
    "training beyond the context": (["--data.training.window", "257"], "data.training.window is 257 tokens, the mode"),
    "evaluation beyond it": (["--data.evaluation.window", "257"], "data.evaluation.window is 257 tokens, the model's"),
    "calibration beyond it": (["--data.calibration.window", "257"], "data.calibration.window is 257 tokens, the mode"),
    "evaluated text": (["--data.calibration.corpora", "[embedded@test]"], "overlaps with data.evaluation.test"),
    "missing model": (["--model.pretrained", "/no/such/model"], "no model at /no/such/model"),
    "folder without a model": (["--model.pretrained", "."], "it has no config.json"),
    "unknown dtype": (["--model.dtype", "int3"], "dtype must be one of"),
    "foreign tokenizer": (["--model.pretrained", "foreign"], "id 257 for '</s>' but the model embeds ids below 100"),
    "NaN weights": (["--model.pretrained", "broken"], "layer 1 (model.layers.1.mlp.up_proj.weight) contain NaN"),
    "no plan": (["--model.plan", "short.txt"], "short.txt is not a pruning plan"),
    "plan of another model": (["--model.plan", "other.json"], "the plan was made for another model (other)"),
    "export over the dense model": (["--export.folder", "foreign"], "has files that are not from an earlier run"),
    "export to a file": (["--export.folder", "short.txt"], "short.txt is a file"),
    "settings of another run": (["--trainer.logger", "false"], "config.yaml already exists, and this run would"),
    "logs below a file": (["--trainer.default_root_dir", "short.txt"], "short.txt is a file"),
    "unknown setting": (["--pruning.no_such", "3"], "there is no setting --pruning.no_such; `gqaprune fit --help`"),
    "not a number": (["--pruning.rate", "lots"], "pruning.rate: must be of type float, got lots"),
    "missing config": (["--config", "gone.yaml"], "File does not exist"),
    "unknown device": (["--trainer.accelerator", "quantum"], "invalid accelerator name"),
    "unknown sensitivity": (["--pruning.sensitivity.method", "magic"], "sensitivity.method must be one of removal"),
    "no split": (["--pruning.split", "2-8"], "neither negative and not both 0, got '2-8'; try 2:8"),
    "split out of reach": (["--pruning.split", "10:0", "--pruning.rate", "0.9"], "or loosen split, min_groups"),
    "split without quotes": (["--config", "split.yaml"], 'pruning.split needs quotes in YAML, such as "2:8"'),
    "two budgets of attention": (["--pruning.split", "2:8", "--pruning.kv_rate", "0.5"], "remove one of them"),
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


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        ("prune", [], "criterion fisher needs the whole model in memory"),
        ("fit", ["--pruning.criterion", "obs"], "recovery.mode full cannot train them: use gqaprune prune, or"),
        ("search", [], "search tries splits on the whole model in memory: set pruning.offload to false"),
        (
            "prune",
            ["--data.calibration.sampled_windows", "4"],
            "data.calibration.sampled_windows 4 needs the whole model",
        ),
        ("prune", ["--export.format", "gguf-f16"], "format gguf-f16 needs the whole model in memory"),
    ],
)
def test_what_layers_on_disk_exclude_is_said_before_any_work(
    run: Run, capsys: pytest.CaptureFixture[str], command: str, arguments: list[str], message: str
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gqaprune.placement.model_source.load_model", lambda *_: pytest.fail("a model was loaded"))
        patch.setattr(
            "gqaprune.placement.model_source.load_offloaded_model", lambda *_: pytest.fail("a model was loaded")
        )
        assert run(command, "--pruning.offload", "true", *arguments) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (
            "prune",
            "that shards over all 1 processes, got SingleDeviceStrategy: set trainer.strategy",
        ),
        ("search", "search tries splits on the whole model in memory: set pruning.sharded to false"),
    ],
)
def test_layers_are_split_over_several_devices_only(
    run: Run, capsys: pytest.CaptureFixture[str], command: str, message: str
) -> None:
    assert run(command, "--pruning.sharded", "true") == 1
    assert message in capsys.readouterr().err


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


def test_nan_scores_stop_with_the_block(
    run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(*arguments: Any) -> Any:
        gradients, losses = compute_gate_gradients(*arguments)
        gradients[1, "attention"][0, 1] = float("inf")
        return gradients, losses

    monkeypatch.setattr("gqaprune.scoring.criteria.gates.compute_gate_gradients", spoil)
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

    monkeypatch.setattr("gqaprune.scoring.criteria.gates.compute_gate_gradients", interrupt)
    assert run("fit", "--export.folder", "out") == 128 + signal.SIGINT
    assert len(calls) == 3
    assert list_files() == [DENSE]


@pytest.mark.parametrize(
    ("command", "sentence"), [("prune", "; run the same command again to resume"), ("validate", "")]
)
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
        (FSDPStrategy, "ModelParallelStrategy", "set trainer.strategy to ModelParallelStrategy"),
        (ModelParallelStrategy, "FSDPStrategy", "set trainer.strategy to FSDPStrategy"),
        (SingleDeviceStrategy, "FSDPStrategy", "resumes from single files"),
        (FSDPStrategy, "one file", "resumes from folders"),
        (DeepSpeedStrategy, "one file", "can resume only from files that have to be unpickled"),
        (FSDPStrategy, "DeepSpeedStrategy", "has no meta.pt"),
        (SingleDeviceStrategy, "weights alone", "has only weights, so training cannot resume from it"),
        (SingleDeviceStrategy, "something else", "is truncated, or not a Lightning checkpoint"),
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


def test_a_config_that_transformers_does_not_save_is_refused_before_any_work(
    run: Run, tiny_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tiny_folder, "model")
    config = json.loads(Path("model/config.json").read_text())
    Path("model/config.json").write_text(json.dumps(config | {"output_attentions": True}))
    with monkeypatch.context() as patch:
        patch.setattr("gqaprune.placement.model_source.load_model", lambda *_: pytest.fail("a model was loaded"))
        for command in ("fit", "prune"):
            assert run(command, "--model.pretrained", "model") == 1
            assert "refuses to save the model: " in (error := capsys.readouterr().err) and "to 'eager'" in error
    arguments = ["--model.pretrained", "model", "--model.attn_implementation", "eager", "--export.folder", "out"]
    assert run("prune", *arguments) == 0
    assert json.loads(Path("out/config.json").read_text())["output_attentions"]


@pytest.mark.parametrize("command", ["validate", "test"])
def test_windows_beyond_the_context_are_not_scored(run: Run, capsys: pytest.CaptureFixture[str], command: str) -> None:
    assert run(command, "--data.evaluation.window", "257") == 1
    assert "data.evaluation.window is 257 tokens, the model's context 256: set it to 256" in capsys.readouterr().err
    assert run(command, "--data.evaluation.window", "256") == 0


@pytest.mark.parametrize("command", ["prune", "validate"])
def test_what_a_killed_run_was_writing_goes_when_the_next_one_with_its_root_begins(run: Run, command: str) -> None:
    folder, held = Path("lightning_logs/version_7"), Path("lightning_logs/.offloaded.x.scratch/.held")
    for path in (folder / ".checkpoint.gqaprune.tmp/model.safetensors", folder / ".checkpoint.gqaprune.lock", held):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (folder / "report.json").touch()
    assert run(command) == 0
    assert [path.name for path in folder.iterdir()] == ["report.json"] and not held.parent.exists()
