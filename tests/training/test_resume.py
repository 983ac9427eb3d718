"""Runs that are killed: the same command goes on, and ends with the files of a run that nobody killed."""

import dataclasses
import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from gqaprune.cli import main
from gqaprune.common.atomic_files import remove_lock
from gqaprune.training.lightning_internals import TRAINING_STATE
from gqaprune.training.resume import UNFINISHED, RunNote, find_checkpoint, find_run, lock_note

from tiny import DATA, PLAIN, merge_settings


def start(folder: Path, arguments: list[str], place: str, name: str, calls: int, number: int) -> None:
    """Run the command in a folder; at a call of a function after so many, send a signal to this process."""
    os.chdir(folder)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(os.open(folder / "output", os.O_CREAT | os.O_WRONLY | os.O_APPEND), stream.fileno())
    if place:
        module, _, owner = place.partition(":")
        target: Any = sys.modules[module]
        target = getattr(target, owner) if owner else target
        function, done = getattr(target, name), []

        def call(*arguments: Any, **named: Any) -> Any:
            if len(done) == calls:
                os.kill(os.getpid(), number)
            done.append(name)
            return function(*arguments, **named)

        setattr(target, name, call)
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # shells start background jobs that ignore it
    sys.argv = ["gqaprune", *arguments]
    sys.exit(main())


Run = Callable[..., int]
WHERE = {
    "calibration": ("gqaprune.scoring.criteria.gates", "compute_gate_gradients", 3),
    "plan": ("gqaprune.pipeline", "apply_plan_with_repair", 0),
    "repair": ("gqaprune.surgery.repair", "refine_mlp", 2),
    "stage write": ("os", "replace", 5),
    "first steps": ("gqaprune.module:CausalLMModule", "training_step", 2),
    "mid-epoch": ("gqaprune.module:CausalLMModule", "training_step", 5),
    "second epoch": ("gqaprune.module:CausalLMModule", "training_step", 13),
    "checkpoint write": ("torch", "save", 1),
    "export": ("gqaprune.callbacks.export", "save", 0),
}
"""What a run is stopped at: where a function is, its name, how many of its calls come before."""
LATE = ("mid-epoch", "second epoch", "checkpoint write", "export")
"""Those after which there is a checkpoint."""
MODES = {
    "full": [],
    "lora": ["--model.recovery.mode", "lora", "--model.recovery.lora_dropout", "0.2"],
    "distill": ["--model.recovery.mode", "distill"],
    "two rounds": ["--model.recovery.rounds", "2"],
    "accumulated": ["--pruning.scheduling", "{0: 4, 1: 2}"],
    "validated within windows": [
        "--pruning.scheduling",
        "{0: 2}",
        "--trainer.check_val_every_n_epoch",
        "null",
    ],
}


@pytest.fixture(scope="module")
def run(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Run `gqaprune fit` in a folder, in a process of its own; returns its exit code."""
    root = tmp_path_factory.mktemp("runs")
    config = {
        "model": {"pretrained": str(tiny_folder), "dtype": "float32"},
        "data": merge_settings(DATA, {"training": {"batch_size": 4}}),
        "pruning": {**PLAIN, "rate": 0.3, "allocation": "global", "repair": {"method": "least_squares", "epochs": 2}},
        "trainer": {"accelerator": "cpu", "max_epochs": 2, "val_check_interval": 3, "enable_progress_bar": False},
    }
    (root / "tiny.yaml").write_text(yaml.safe_dump(config))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["gqaprune.cli.run"])

    def run_command(folder: Path, *arguments: str, at: str = "", number: int = signal.SIGKILL) -> int:
        folder.mkdir(exist_ok=True)
        (folder / "output").unlink(missing_ok=True)
        command = ["fit", "--config", str(root / "tiny.yaml"), *arguments]
        process = context.Process(target=start, args=(folder, command, *WHERE.get(at, ("", "", 0)), number))
        process.start()
        process.join()
        assert process.exitcode is not None
        return process.exitcode

    return run_command


@pytest.fixture(scope="module")
def whole(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """What a run makes that nobody stops; made once for the same arguments."""
    made: dict[tuple[str, ...], dict[str, Any]] = {}

    def make(*arguments: str) -> dict[str, Any]:
        if arguments not in made:
            folder = tmp_path_factory.mktemp("whole")
            assert run(folder, *arguments) == 0, read_output(folder)
            made[arguments] = read_files(folder)
        return made[arguments]

    return make


def read_files(folder: Path) -> dict[str, Any]:
    """What a run has made: weights, plan, and the numbers of its report."""
    (checkpoint,) = folder.glob("lightning_logs/version_*/checkpoint")
    report = json.loads((checkpoint.parent / "report.json").read_text())
    files = {name: (checkpoint / name).read_bytes() for name in ("model.safetensors", "plan.json")}
    return files | {"stages": report["stages"], "repairs": report["repairs"]}


def read_output(folder: Path) -> str:
    return " ".join((folder / "output").read_text().split())


def list_left(folder: Path) -> list[Path]:
    """What only a run that has not ended may leave."""
    return [path for path in folder.rglob("*") if path.suffix in (".tmp", ".lock") or path == folder / UNFINISHED]


@pytest.mark.parametrize("at", WHERE)
def test_killed_runs_end_as_others_do(run: Run, whole: Callable[..., dict[str, Any]], at: str, tmp_path: Path) -> None:
    assert run(tmp_path, at=at) == -signal.SIGKILL
    assert (tmp_path / UNFINISHED).is_dir()
    assert run(tmp_path) == 0, read_output(tmp_path)
    assert (", from lightning_logs" in read_output(tmp_path)) == (at in LATE)
    assert read_files(tmp_path) == whole()
    assert list_left(tmp_path) == []


@pytest.mark.parametrize("at", ["repair", "second epoch"])
@pytest.mark.parametrize("mode", ["lora", "distill", "two rounds"])
def test_every_recovery_goes_on(
    run: Run, whole: Callable[..., dict[str, Any]], mode: str, at: str, tmp_path: Path
) -> None:
    assert run(tmp_path, *MODES[mode], at=at) == -signal.SIGKILL
    assert run(tmp_path, *MODES[mode]) == 0, read_output(tmp_path)
    assert read_files(tmp_path) == whole(*MODES[mode])


@pytest.mark.parametrize("at", ["mid-epoch", "second epoch"])
@pytest.mark.parametrize("mode", ["accumulated", "validated within windows"])
def test_gradients_of_whole_windows_accumulate_where_a_run_goes_on(
    run: Run, whole: Callable[..., dict[str, Any]], mode: str, at: str, tmp_path: Path
) -> None:
    assert run(tmp_path, *MODES[mode], at=at) == -signal.SIGKILL
    assert run(tmp_path, *MODES[mode]) == 0, read_output(tmp_path)
    assert ", from lightning_logs" in read_output(tmp_path)
    assert read_files(tmp_path) == whole(*MODES[mode])


@pytest.mark.parametrize("at", ["calibration", "repair", "mid-epoch"])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_runs_that_are_asked_to_stop_say_how_they_go_on_and_leave_whole_files(
    run: Run, whole: Callable[..., dict[str, Any]], number: int, code: int, at: str, tmp_path: Path
) -> None:
    assert run(tmp_path, at=at, number=number) == code
    assert "Traceback" not in read_output(tmp_path)
    assert read_output(tmp_path).endswith("gqaprune: stopped; run the same command again to resume")
    assert list_left(tmp_path) == ([tmp_path / UNFINISHED])
    assert run(tmp_path) == 0, read_output(tmp_path)
    assert read_files(tmp_path) == whole()


def test_a_changed_rate_keeps_the_scores_and_trains_anew(
    run: Run, whole: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    assert run(tmp_path, at="mid-epoch") == -signal.SIGKILL
    assert run(tmp_path, "--pruning.rate", "0.2") == 0, read_output(tmp_path)
    output = read_output(tmp_path)
    for sentence in (
        "a run that did not end had other settings: pruning.rate was 0.3, is 0.2; training starts again",
        "scores of fisher: is already done, from a run that did not end",
        "plan: done again, because rate was 0.3, is 0.2",
        "repaired blocks: done again, because plan has changed",
    ):
        assert sentence in output
    assert read_files(tmp_path) == whole("--pruning.rate", "0.2")
    assert list_left(tmp_path) == []


def add_checkpoints(folder: Path, **settings: Any) -> list[str]:
    """Arguments of a run that writes checkpoints to `shared` in its folder after each validation."""
    writer = {
        "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
        "init_args": {"dirpath": "shared", **settings},
    }
    (folder / "checkpoints.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": [writer]}}))
    return ["--config", str(folder / "checkpoints.yaml")]


def test_checkpoints_of_other_runs_in_the_same_folder_are_left_alone(run: Run, tmp_path: Path) -> None:
    arguments = add_checkpoints(tmp_path)
    assert run(tmp_path, *arguments, "--pruning.rate", "0.2") == 0, read_output(tmp_path)
    theirs = list(tmp_path.glob("shared/*.ckpt"))
    assert theirs and run(tmp_path, *arguments, at="first steps") == -signal.SIGKILL
    assert run(tmp_path, *arguments) == 0, read_output(tmp_path)
    assert "which has no checkpoint yet" in read_output(tmp_path)
    assert run(tmp_path, *arguments, at="mid-epoch") == -signal.SIGKILL
    for path in theirs:
        os.utime(path)  # as if that run were still going on
    assert run(tmp_path, *arguments) == 0, read_output(tmp_path)
    assert ".ckpt" in read_output(tmp_path).split(" Seed set")[0]
    assert all(path.name not in read_output(tmp_path).split(" Seed set")[0] for path in theirs)


def test_runs_killed_after_their_last_checkpoint_are_measured_and_written_all_the_same(
    run: Run, whole: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    arguments = [
        *add_checkpoints(tmp_path, monitor="ppl/embedded", save_last=True),
        "--trainer.val_check_interval",
        "4",
    ]
    assert run(tmp_path, *arguments, at="export") == -signal.SIGKILL
    assert run(tmp_path, *arguments) == 0, read_output(tmp_path)
    assert ", from " in read_output(tmp_path).split(" Seed set")[0]
    assert "best ppl/embedded" in read_output(tmp_path)
    assert read_files(tmp_path) == whole(*arguments)
    assert [stage["name"] for stage in read_files(tmp_path)["stages"]] == ["dense", "pruned", "recovered"]


def test_checkpoints_of_weights_alone_are_not_gone_on_from(run: Run, tmp_path: Path) -> None:
    arguments = add_checkpoints(tmp_path, save_weights_only=True)
    assert run(tmp_path, *arguments, at="mid-epoch") == -signal.SIGKILL
    assert list(tmp_path.glob("shared/*.ckpt"))
    assert run(tmp_path, *arguments) == 0, read_output(tmp_path)
    assert "which has no checkpoint yet" in read_output(tmp_path)


def test_last_is_the_stopped_runs_checkpoint_whatever_the_settings(run: Run, tmp_path: Path) -> None:
    assert run(tmp_path, at="mid-epoch") == -signal.SIGKILL
    changes = ("--trainer.max_epochs", "3", "--model.warmup_steps", "1")
    assert run(tmp_path, *changes, "--ckpt_path", "last") == 0, read_output(tmp_path)
    output = read_output(tmp_path)
    assert "Warning: Dump of a value" not in output
    (config,) = (yaml.safe_load(path.read_text()) for path in tmp_path.glob("lightning_logs/version_1/config.yaml"))
    assert config["model"]["warmup_steps"] == 1 and config["model"]["plan"]["layers"]
    assert "resuming the run in lightning_logs/version_0, from lightning_logs/version_0/checkpoints" in output
    assert "its settings were different: model.warmup_steps was null, is 1, trainer.max_epochs was 2, is 3" in output


def test_a_run_beside_one_that_goes_on_is_a_run_of_its_own(
    run: Run, whole: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    assert run(tmp_path, at="mid-epoch") == -signal.SIGKILL
    lock = lock_note(tmp_path)
    assert lock is not None
    assert run(tmp_path) == 0, read_output(tmp_path)
    assert "resuming the run" not in read_output(tmp_path)
    assert read_files(tmp_path) == whole()
    assert "if this run is stopped, the same command starts again" in read_output(tmp_path)
    assert (tmp_path / UNFINISHED / "run.json").exists()  # the other's
    remove_lock(lock)
    assert run(tmp_path) == 0, read_output(tmp_path)
    assert ", from lightning_logs/version_0" in read_output(tmp_path)
    assert list_left(tmp_path) == []


def make_note(root: Path, **changes: Any) -> RunNote:
    note = RunNote(
        {"model.pretrained": "a", "trainer.callbacks": []}, str(root / "logs"), (str(root / "shared"),), "me"
    )
    note = dataclasses.replace(note, **changes)
    note.save(root)
    return note


def test_a_note_is_read_back_and_no_other(tmp_path: Path) -> None:
    assert RunNote.load(tmp_path) is None
    note = make_note(tmp_path)
    assert RunNote.load(tmp_path) == note


@pytest.mark.parametrize(
    "content",
    [
        b"", b"[]", b"{}", b"[" * 10**5, b"\xff", b'{"checkpoints": 1}', b'{"checksum": 1, "checksum": 2}',
        b'{"checksum": "", "settings": {}, "folder": "a", "checkpoints": [], "run": "b"}',
    ],
)  # fmt: skip
def test_a_note_that_nobody_wrote_is_refused(tmp_path: Path, content: bytes) -> None:
    make_note(tmp_path)
    (tmp_path / UNFINISHED / "run.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"run\.json is damaged .*: remove it to train from the start"):
        find_run(tmp_path, {}, None, is_first=True)


def test_a_changed_note_is_refused(tmp_path: Path) -> None:
    make_note(tmp_path)
    path = tmp_path / UNFINISHED / "run.json"
    path.write_text(path.read_text().replace('"me"', '"us"'))
    with pytest.raises(ValueError, match="its checksum does not match"):
        find_run(tmp_path, {}, "last", is_first=True)


@pytest.mark.parametrize("asked", [None, "last"])
@pytest.mark.parametrize("name", ["folder", "checkpoints"])
def test_a_note_names_no_folder_outside_of_its_run(tmp_path: Path, name: str, asked: str | None) -> None:
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    elsewhere.mkdir()
    (root / "link").parent.mkdir()
    (root / "link").symlink_to(elsewhere)
    for place in (str(elsewhere), str(root / ".." / "elsewhere"), str(root / "link")):
        note = make_note(root, **{name: place if name == "folder" else (place,)})
        with pytest.raises(ValueError, match="outside of the run's folder"):
            find_run(root, note.settings, asked, is_first=True)
        named = {"trainer.callbacks": [{"init_args": {"dirpath": str(elsewhere)}}]}
        find_run(root, named, asked, is_first=True)


def test_a_checkpoint_that_is_a_link_to_elsewhere_is_not_gone_on_from(tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    content = {"run": "me", TRAINING_STATE: {}, "state_dict": {}}
    torch.save(content, tmp_path / "other.ckpt")
    (tmp_path / "own/epoch=1.ckpt").symlink_to(tmp_path / "other.ckpt")
    assert find_checkpoint([tmp_path / "own"], "me") is None
    torch.save(content, tmp_path / "own/epoch=0.ckpt")
    (tmp_path / "own/last.ckpt").symlink_to("epoch=0.ckpt")
    assert find_checkpoint([tmp_path / "own"], "me") is not None
