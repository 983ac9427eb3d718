"""Fixtures: quiet console, fixed seeds, checkpoint folders to read."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers reads it: tests never reach for the hub
if int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")) > 1:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch reads it: the cores have tests of their own

import random
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import settings
from transformers import PreTrainedTokenizerFast

import gqaprune
from gqaprune.cli import main
from gqaprune.common.console import console
from gqaprune.common.cpu import avoid_illegal_instructions
from gqaprune.common.stop_signals import STOPS

from command import Run
from tiny import DATA, PLAIN, VARIANTS, WHOLE_ATTENTION, WHOLE_MLP, make_model, make_tokenizer, train_model

avoid_illegal_instructions()
settings.register_profile("any machine", deadline=None)  # how long an example takes says what else the machine does
settings.load_profile("any machine")


@pytest.fixture(autouse=True)
def _quiet_and_seeded() -> None:
    console.quiet = True
    torch.manual_seed(0)
    random.seed(0)


@pytest.fixture(autouse=True)
def _handlers_of_signals() -> Iterator[None]:
    """Put back what handled signals before a test: Lightning ignores Ctrl-C after the first one."""
    before = {number: signal.getsignal(number) for number in STOPS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(params=list(VARIANTS))
def variant(request: pytest.FixtureRequest) -> str:
    """Every family and variation whose attention can lose units."""
    return str(request.param)


@pytest.fixture(params=[*VARIANTS, *WHOLE_ATTENTION, *WHOLE_MLP])
def any_variant(request: pytest.FixtureRequest) -> str:
    """Every family and variation."""
    return str(request.param)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """The byte tokenizer."""
    return make_tokenizer()


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama checkpoint with tokenizer, to read only."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    make_model("llama", channels=32).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def learned_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama checkpoint that has learned some of the embedded text, to read only."""
    folder = tmp_path_factory.mktemp("models") / "learned"
    torch.manual_seed(0)
    windows = gqaprune.read_windows(make_tokenizer(), ["embedded"], 32, 64)
    train_model(make_model(channels=32, kv_heads=4), windows).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def smollm_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M from its GGUF as a dense checkpoint folder, to read only (loads faster than the GGUF)."""
    folder = tmp_path_factory.mktemp("models") / "smollm2"
    model, tokenizer = gqaprune.load("smollm2-135m", dtype="float32")
    gqaprune.save(model, tokenizer, folder)
    return folder


@pytest.fixture
def run(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a command in an empty folder on the tiny model; returns the exit code."""
    config = {
        "model": {"pretrained": str(tiny_folder), "dtype": "float32"},
        "data": DATA,
        "pruning": {**PLAIN, "scheduling": {0: 2}, "rate": 0.3, "allocation": "global"},
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

    return run_command
