"""A payload in every file that a command reads: it never runs, and the command says a sentence or reads past it."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from payload import Payload

from gqaprune.training.resume import UNFINISHED, RunNote

from command import Run

PICKLES = ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "adapter_model.bin", "vocab.pkl")
CODE = (
    "modeling_llama.py",
    "modeling_gqaprune.py",
    "configuration_llama.py",
    "tokenization_llama.py",
    "custom_generate/generate.py",
    "hubconf.py",
)
AUTO_MAP = {
    "AutoConfig": "configuration_llama.Config",
    "AutoModelForCausalLM": "modeling_llama.Model",
    "AutoTokenizer": ["tokenization_llama.Tokenizer", "tokenization_llama.Tokenizer"],
}


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    """What a payload makes."""
    return tmp_path / "ran"


def write_code(path: Path, marker: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"import os\nos.mkdir({str(marker)!r})\n")


def edit_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.fixture
def model(tiny_folder: Path, tmp_path: Path, marker: Path) -> Path:
    """A model that loads, among pickles and code."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    for name in (*PICKLES, "pytorch_model.bin", "weights.npy"):
        torch.save(Payload(marker), folder / name)
    numpy.savez(folder / "weights.npz", weights=numpy.array([Payload(marker)], dtype=object))
    for name in CODE:
        write_code(folder / name, marker)
    edit_json(folder / "config.json", auto_map=AUTO_MAP, attn_implementation="org/kernel", custom_generate="org/code")
    edit_json(folder / "tokenizer_config.json", auto_map=AUTO_MAP)
    edit_json(folder / "generation_config.json", custom_generate=".", auto_map=AUTO_MAP)
    shutil.rmtree(marker, ignore_errors=True)  # of numpy, which has pickled no more than it
    return folder


def check(code: int, marker: Path, capsys: pytest.CaptureFixture[str]) -> str:
    error = capsys.readouterr().err
    assert not marker.exists() and "Traceback" not in error
    assert code == 0 or "gqaprune: error: " in error
    return error


@pytest.mark.parametrize(
    "arguments",
    [
        ["validate"],
        ["predict", "--data.prompts", "[Once upon a time]", "--model.max_new_tokens", "2"],
        ["prune", "--export.folder", "out"],
        ["fit", "--model.recovery.mode", "distill", "--trainer.max_steps", "1"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_a_model_among_pickles_and_code_is_read_without_them(
    run: Run, model: Path, marker: Path, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    code = run(*arguments, "--model.pretrained", str(model))
    check(code, marker, capsys)
    assert code == 0
    assert not {path.name for path in Path("out").rglob("*")} & {*CODE, *PICKLES}


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors", "config.json", "tokenizer.json"])
def test_a_pickle_in_the_place_of_a_models_file_is_refused(
    run: Run, model: Path, marker: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    if name == "pytorch_model.bin":
        (model / "model.safetensors").unlink()
    else:
        (model / name).write_bytes(pickle.dumps(Payload(marker)))
    code = run("validate", "--model.pretrained", str(model))
    check(code, marker, capsys)
    assert code == 1


def test_code_of_a_model_of_no_known_type_is_not_run(
    run: Run, model: Path, marker: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit_json(model / "config.json", model_type="forged")
    code = run("validate", "--model.pretrained", str(model))
    check(code, marker, capsys)
    assert code == 1


def plant_whole(path: Path, marker: Path) -> None:
    torch.save(Payload(marker), path)


def plant_inside(path: Path, marker: Path) -> None:
    content = {"state_dict": {"a": Payload(marker)}, "pytorch-lightning_version": "2.6.0", "callbacks": {}}
    torch.save(content, path)


def plant_bare(path: Path, marker: Path) -> None:
    path.write_bytes(pickle.dumps({"callbacks": {}, "hyper_parameters": Payload(marker)}))


def plant_settings(path: Path, marker: Path) -> None:
    write_code(Path("forged.py"), marker)  # where Python looks for modules
    settings = {
        "_instantiator": "forged.make",
        "_class_path": "forged.Module",
        "optimizer": {"class_path": "forged.Optimizer"},
        "trust_remote_code": True,
    }
    content = {"state_dict": {}, "pytorch-lightning_version": "2.6.0", "callbacks": {}, "hyper_parameters": settings}
    torch.save(content, path)


@pytest.mark.parametrize("plant", [plant_whole, plant_inside, plant_bare, plant_settings])
@pytest.mark.parametrize("command", ["fit", "validate", "predict", "prune"])
def test_a_checkpoint_runs_nothing(
    run: Run,
    marker: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    plant: Callable[[Path, Path], None],
) -> None:
    monkeypatch.syspath_prepend(os.getcwd())
    plant(Path("forged.ckpt"), marker)
    prompts = ["--data.prompts", "[Once upon a time]"] if command == "predict" else []
    named = [] if command == "prune" else ["--ckpt_path", "forged.ckpt"]
    code = run(command, *named, *prompts)
    check(code, marker, capsys)
    assert (code == 0) == (command == "prune")


@pytest.mark.parametrize("name", ["http://127.0.0.1:9/a.ckpt", "s3://b/a.ckpt", "simplecache::http://127.0.0.1:9/a"])
@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
def test_a_checkpoint_is_not_fetched(run: Run, capsys: pytest.CaptureFixture[str], command: str, name: str) -> None:
    assert run(command, "--ckpt_path", name) == 1
    assert f"a checkpoint must be a file or a folder on this machine, got {name}" in capsys.readouterr().err


def test_nothing_that_a_stopped_run_left_runs_code(
    run: Run, marker: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as broken:
        broken.setattr("gqaprune.module.CausalLMModule.training_step", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run("fit")
    stages = list(UNFINISHED.glob("*.stage"))
    assert stages
    for path in stages:
        path.write_bytes(pickle.dumps(Payload(marker)))
    note = RunNote.load(Path())
    assert note is not None
    for folder in note.checkpoints or (note.folder,):
        Path(folder).mkdir(parents=True, exist_ok=True)
        plant_inside(Path(folder, "epoch=0.ckpt"), marker)
    code = run("fit")
    check(code, marker, capsys)
    assert code == 0


@pytest.mark.parametrize(
    ("option", "name"),
    [
        ("--model.plan", "plan.json"),
        ("--data.prompts", "prompts.jsonl"),
        ("--data.evaluation.validation", "text.parquet"),
        ("--data.evaluation.validation", "text.jsonl"),
        ("--data.evaluation.validation", "text.npz"),
        ("--config", "settings.yaml"),
        ("--pruning.sensitivity.file", "sensitivity.json"),
    ],
)
def test_a_pickle_in_the_place_of_a_setting_is_refused(
    run: Run, marker: Path, capsys: pytest.CaptureFixture[str], option: str, name: str
) -> None:
    Path(name).write_bytes(pickle.dumps(Payload(marker)))
    value = f"[{name}]" if name.startswith("text") else name
    code = run("predict" if "prompts" in option else "validate", option, value)
    check(code, marker, capsys)
    assert code == 1


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.mkdir", "!!python/object/new:os.mkdir"])
def test_a_yaml_tag_runs_nothing(run: Run, marker: Path, capsys: pytest.CaptureFixture[str], tag: str) -> None:
    Path("forged.yaml").write_text(f"model:\n  pretrained: {tag} [{marker}]\n")
    code = run("validate", "--config", "forged.yaml")
    check(code, marker, capsys)
    assert code == 1
