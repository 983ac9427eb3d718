"""Runs of two ranks on the tiny model, begun in a moment: their processes are forks of one that has imported all."""

import atexit
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import yaml
from lightning.pytorch.strategies.launchers import subprocess_script

from gqaprune.cli import main

from tiny import PLAIN, make_model, make_tokenizer

STRATEGIES = {"ddp": ["--trainer.strategy", "ddp"], "fsdp2": ["--config", "fsdp2.yaml"]}
SETTINGS: dict[str, Any] = {
    "model": {"pretrained": "model", "dtype": "float32"},
    "data": {
        "calibration": {"windows": 6, "window": 32, "batch_size": 2, "held_out_windows": 0},
        "training": {"window": 32, "tokens": 1024, "batch_size": 1},
        "evaluation": {"window": 32, "tokens": 32 * 6, "batch_size": 1},
    },
    "pruning": {**PLAIN, "scheduling": {0: 2}, "rate": 0.3, "allocation": "global"},
    "export": {"folder": "out"},
    "samples": {"prompts": 0},
    "trainer": {
        "accelerator": "cpu",
        "devices": 2,
        "max_epochs": 1,
        "val_check_interval": 8,
        "enable_progress_bar": False,
    },
}
"""16 micro-batches on each rank, 8 steps; validated twice, and by Lightning before the first."""


@dataclass(frozen=True)
class Fault:
    """What goes wrong in one rank.

    Args:
        place: a function there: module, a colon, perhaps its class, a dot, its name.
        calls: how many of its calls come before.
        rank: which rank.
        number: signal that is sent then; 0 raises an error instead.
        to: rank that it is sent to; None is all.
        spoils: make the loss that the function returns NaN instead.
    """

    place: str
    calls: int = 0
    rank: int = 0
    number: int = 0
    to: int | None = None
    spoils: bool = False

    def arm(self) -> None:
        """Lie in wait, in this process."""
        module, _, path = self.place.partition(":")
        *owners, name = path.split(".")
        target: Any = sys.modules[module]
        for owner in owners:
            target = getattr(target, owner)
        function, done = getattr(target, name), []

        def call(*arguments: Any, **named: Any) -> Any:
            done.append(name)
            if len(done) == self.calls + 1 and self.spoils:
                loss, *others = function(*arguments, **named)
                return loss * float("nan"), *others
            if len(done) == self.calls + 1:
                if not self.number:
                    raise OSError(28, "No space left on device")
                for rank in (0, 1) if self.to is None else (self.to,):
                    os.kill(int(Path(f"pid-{rank}").read_text()), self.number)
            return function(*arguments, **named)

        setattr(target, name, call)


class Run:
    """A run of two ranks in a folder.

    Args:
        folder: with `make_folder`'s files.
        arguments: command and settings.
        fault: what goes wrong.
    """

    def __init__(self, folder: Path, *arguments: str, fault: Fault | None = None) -> None:
        self.folder = folder
        for path in folder.glob("pid-*"):
            path.unlink()
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["gqaprune.cli.run"])
        self.process = context.Process(target=_run_launcher, args=(folder, arguments, fault))
        self.process.start()

    @property
    def output(self) -> str:
        """All that both ranks said, in one line."""
        return " ".join((self.folder / "output").read_text().split())

    def send(self, number: int, rank: int | None) -> None:
        """Send a signal to a rank, 0 is the launcher; or to all."""
        for one in (0, 1) if rank is None else (rank,):
            path = self.folder / f"pid-{one}"
            if path.exists():
                os.kill(int(path.read_text()), number)

    def is_alive(self) -> bool:
        """Whether a process of the run is there."""
        pids = [int(path.read_text()) for path in self.folder.glob("pid-*")]
        return self.process.is_alive() or any(_runs(pid) for pid in pids)

    def wait(self, seconds: float) -> float:
        """Wait for the end of all processes; returns how long that took, infinity where it took longer."""
        start = time.monotonic()
        while self.is_alive():
            if time.monotonic() - start > seconds:
                self.send(signal.SIGKILL, None)
                return float("inf")
            time.sleep(0.05)
        return time.monotonic() - start

    @property
    def codes(self) -> tuple[int | None, int | None]:
        """Exit codes of both ranks; None for one that did not say."""
        path = self.folder / "code-1"
        return self.process.exitcode, int(path.read_text()) if path.exists() else None


def make_folder(folder: Path) -> None:
    """Write model and settings."""
    folder.mkdir(parents=True, exist_ok=True)
    make_model("llama", channels=32).save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    (folder / "run.yaml").write_text(yaml.safe_dump(SETTINGS))
    fsdp2 = Path(__file__).parent.parent / "configs/strategy/fsdp2.yaml"
    (folder / "fsdp2.yaml").write_text(fsdp2.read_text().replace("devices: auto", "devices: 2"))


def read_results(folder: Path) -> dict[str, Any]:
    """What a run has made: weights, plan, and what its report measured."""
    # A run that was stopped before its first step has a report, too, and the one after it a folder of its own.
    *_, report = sorted(folder.glob("lightning_logs/version_*/report.json"))
    files = {path.name: path.read_bytes() for path in (folder / "out").iterdir() if path.suffix == ".safetensors"}
    plan = json.loads((folder / "out/plan.json").read_text())["layers"]  # the rest names the folder
    return files | {"plan": plan, "stages": json.loads(report.read_text())["stages"]}


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _run_launcher(folder: Path, arguments: tuple[str, ...], fault: Fault | None) -> None:
    """Be rank 0, whose launcher starts rank 1 from a fork that waits for it."""
    os.chdir(folder)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(os.open("output", os.O_CREAT | os.O_WRONLY | os.O_APPEND), stream.fileno())
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.default_int_handler)
    reader, writer = os.pipe()
    child = os.fork()
    rank = int(child == 0)
    if rank:
        os.close(writer)
        with os.fdopen(reader) as file:
            environment = file.read()
        if not environment:
            os._exit(0)
        os.environ |= json.loads(environment)
    else:
        os.close(reader)

        class Fork(subprocess.Popen[bytes]):
            def __init__(self, command: Any, env: dict[str, str], cwd: Any) -> None:
                self.pid, self.returncode, self.args = child, None, command
                self.stdin = self.stdout = self.stderr = None
                self._child_created, self._waitpid_lock = True, threading.Lock()
                os.write(writer, json.dumps(env).encode())
                os.close(writer)

        subprocess_script.subprocess = SimpleNamespace(Popen=Fork)
    Path(f"new-{rank}").write_text(str(os.getpid()))
    Path(f"new-{rank}").rename(f"pid-{rank}")
    torch.set_num_threads(1)
    if fault is not None and fault.rank == rank:
        fault.arm()
    command, *settings = arguments
    sys.argv = ["gqaprune", command, "--config", "run.yaml", *settings]
    code = main()
    atexit._run_exitfuncs()  # which processes of multiprocessing leave out
    if rank:
        Path("code-1").write_text(str(code))
    sys.stdout.flush()
    os._exit(code)
