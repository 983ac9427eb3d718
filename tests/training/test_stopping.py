"""Two ranks that stop together: for a signal to either, a loss of one, an error or the end of one."""

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ranks import STRATEGIES, Fault, Run, make_folder, read_results

from gqaprune.common.atomic_files import remove_lock
from gqaprune.training.resume import UNFINISHED, lock_note

PATIENCE = 300.0
"""Seconds for what ends by itself, on a busy machine."""
STEP, VALIDATION = (f"gqaprune.module:CausalLMModule.{name}_step" for name in ("training", "validation"))
MEASURE = "gqaprune.training.objective:Objective.measure"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    """What a run makes that nobody stops, by strategy."""
    made: dict[str, dict[str, Any]] = {}

    def make(strategy: str) -> dict[str, Any]:
        if strategy not in made:
            made[strategy] = finish(make_run(tmp_path_factory.mktemp("whole"), strategy))
        return made[strategy]

    return make


def make_run(folder: Path, strategy: str, *arguments: str, fault: Fault | None = None) -> Run:
    make_folder(folder)
    (folder / "output").unlink(missing_ok=True)
    return Run(folder, "fit", *STRATEGIES[strategy], *arguments, fault=fault)


def finish(run: Run) -> dict[str, Any]:
    run.wait(PATIENCE)
    assert run.codes == (0, 0), run.output
    assert not list(run.folder.rglob("stopped-*")) and not (run.folder / UNFINISHED).exists()
    return read_results(run.folder)


@pytest.mark.parametrize(
    ("strategy", "fault", "step"),
    [
        ("ddp", Fault(STEP, calls=4, number=signal.SIGTERM, to=1), 3),
        ("fsdp2", Fault(STEP, calls=13, number=signal.SIGUSR1, to=0), 7),
        ("ddp", Fault(VALIDATION, calls=6, number=signal.SIGINT, to=None), 8),
    ],
    ids=["rank 1 within a window", "launcher after a validation", "all within the last validation"],
)
def test_a_signal_to_any_rank_stops_all_with_a_checkpoint_and_the_same_command_goes_on_from_it(
    strategy: str, fault: Fault, step: int, whole: Callable[[str], dict[str, Any]], tmp_path: Path
) -> None:
    run = make_run(tmp_path, strategy, fault=fault)
    run.wait(PATIENCE)
    assert run.codes == (128 + fault.number,) * 2 and "Traceback" not in run.output
    assert run.output.endswith("gqaprune: stopped; run the same command again to resume")
    (written,) = tmp_path.rglob("stopped-*.ckpt")
    assert written.name.endswith(f"-step={step}.ckpt")
    again = make_run(tmp_path, strategy)
    results = finish(again)
    assert f"from lightning_logs/version_0/checkpoints/{written.name}" in again.output
    assert results == whole(strategy)


@pytest.mark.parametrize(
    "fault",
    [
        Fault("gqaprune.scoring.criteria.gates:compute_gate_gradients", 0, 1, signal.SIGTERM, 1),
        Fault("gqaprune.callbacks.export:save", 0, 0, signal.SIGTERM, 0),
    ],
    ids=["scoring", "export"],
)
def test_a_signal_outside_of_training_ends_all_ranks(fault: Fault, tmp_path: Path) -> None:
    run = make_run(tmp_path, "ddp", fault=fault)
    run.wait(PATIENCE)
    assert run.codes[0] == 128 + signal.SIGTERM and "Traceback" not in run.output
    assert "gqaprune: stopped; run the same command again to resume" in run.output


@pytest.mark.parametrize(
    ("strategy", "fault", "sentence"),
    [
        ("ddp", Fault(STEP, 5, 1, signal.SIGKILL, 1), "rank 1 has ended, and the other ranks with it: it was killed"),
        ("fsdp2", Fault(STEP, 5, 0, signal.SIGKILL, 0), "rank 0 has ended, and the other ranks with it: it was killed"),
        ("ddp", Fault("torch:save"), "rank 0 has ended, and the other ranks with it: "),
        (
            "ddp",
            Fault("gqaprune.module:CausalLMModule.load", rank=1),
            "rank 1 has ended, and the other ranks with it: [",
        ),
    ],
    ids=["rank 1 killed", "rank 0 killed", "disk full", "loading fails"],
)
def test_a_rank_whose_peer_is_gone_says_which_one_and_why(
    strategy: str, fault: Fault, sentence: str, tmp_path: Path
) -> None:
    run = make_run(tmp_path, strategy, fault=fault)
    run.wait(PATIENCE)
    assert f"gqaprune: error: {sentence}" in run.output and "Traceback" not in run.output
    assert all(code != 0 for code in run.codes)


def test_a_loss_that_is_not_finite_on_one_rank_stops_all_before_it_reaches_the_weights(tmp_path: Path) -> None:
    run = make_run(tmp_path, "ddp", fault=Fault(MEASURE, calls=10, rank=1, spoils=True))
    run.wait(PATIENCE)
    sentence = "gqaprune: error: the training loss is nan at step 5, batch 10, on rank 1: lower the learning rate"
    assert run.codes == (1, 1) and run.output.count(sentence) == 2
    (good,) = tmp_path.glob("lightning_logs/version_0/checkpoints/*-step=4.ckpt")
    assert run.output.count(f"resume with --ckpt_path {good.relative_to(tmp_path)}") == 2


def test_all_ranks_begin_anew_beside_a_run_that_has_not_ended(
    whole: Callable[[str], dict[str, Any]], tmp_path: Path
) -> None:
    """Only rank 0 can tell that the other run still goes on: the rest would take its checkpoint."""
    run = make_run(tmp_path, "ddp", fault=Fault(STEP, calls=12, number=signal.SIGKILL))
    run.wait(PATIENCE)
    assert list(tmp_path.rglob("*-step=4.ckpt"))
    lock = lock_note(tmp_path)
    assert lock is not None
    beside = make_run(tmp_path, "ddp")
    beside.wait(PATIENCE)
    remove_lock(lock)
    assert beside.codes == (0, 0) and "resuming the run" not in beside.output
    weights = (tmp_path / "out").glob("*.safetensors")
    assert {path.name: path.read_bytes() for path in weights}.items() <= whole("ddp").items()
