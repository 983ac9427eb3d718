"""Broken and forged checkpoints and plans: one clear sentence each, no traceback, nothing written."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gqaprune.checkpoints.save import save
from gqaprune.cli import main

from cuts import EVEN, UNEVEN, make_plan, make_pruned
from tiny import make_model, make_tokenizer


def edit_json(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(data))


def truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    os.truncate(file, file.stat().st_size // 2)


def lose_a_shard(folder: Path) -> None:
    save(make_pruned("llama", EVEN), None, folder / "new", max_shard_size="20KB")
    for file in (folder / "new").iterdir():
        file.replace(folder / file.name)
    (folder / "new").rmdir()
    (folder / "model.safetensors").unlink()
    next(folder.glob("model-00002*")).unlink()


def leave_a_pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")


def set_config(**values: Any) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "config.json", lambda config: config.update(values))


def set_layer(**values: Any) -> Callable[[Path], None]:
    def change(config: dict[str, Any]) -> None:
        next(iter(config["per_layer_config"].values())).update(values)

    return lambda folder: edit_json(folder / "config.json", change)


def scramble(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text("{") and None


CHECKPOINTS: dict[str, tuple[Any, Callable[[Path], None]]] = {
    "truncated weights": (EVEN, truncate),
    "a shard is missing": (EVEN, lose_a_shard),
    "a pickle instead of weights": (EVEN, leave_a_pickle),
    "more query heads": (EVEN, set_config(num_attention_heads=8)),
    "fewer query heads": (EVEN, set_config(num_attention_heads=2)),
    "no whole ratio": (EVEN, set_config(num_attention_heads=3)),
    "no KV heads": (EVEN, set_config(num_key_value_heads=0)),
    "negative heads": (EVEN, set_config(num_attention_heads=-4)),
    "huge width": (EVEN, set_config(intermediate_size=1000)),
    "more layers": (EVEN, set_config(num_hidden_layers=4)),
    "fewer layers": (EVEN, set_config(num_hidden_layers=2)),
    "biases that the config denies": ("llama-biases", set_config(attention_bias=False, mlp_bias=False)),
    "head_dim": (EVEN, set_config(head_dim=16)),
    "a layer's heads": (UNEVEN, set_layer(num_attention_heads=4)),
    "a layer's width": (UNEVEN, set_layer(intermediate_size=3)),
    "a layer that is not there": (UNEVEN, set_config(per_layer_config={"9": {"intermediate_size": 3}})),
    "layers that are no shapes": (UNEVEN, set_config(per_layer_config=["a"])),
    "a config that is no JSON": (EVEN, scramble("config.json")),
    "another family": (EVEN, set_config(model_type="gpt2")),
    "no family": (EVEN, set_config(model_type="no-such-model")),
    "a tokenizer that is no JSON": (EVEN, scramble("tokenizer.json")),
}


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["gqaprune", *arguments])
    return main()


def check_sentence(error: str) -> None:
    lines = [line for line in error.splitlines() if line.startswith("gqaprune: error:")]
    assert len(lines) == 1 and "Traceback" not in error and 30 < len(lines[0]) < 600, error


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_broken_and_forged_checkpoints_are_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kept, spoil = CHECKPOINTS[name]
    model = make_model(kept) if isinstance(kept, str) else make_pruned("llama", kept)
    save(model, make_tokenizer(), tmp_path / "model")
    spoil(tmp_path / "model")
    assert run(monkeypatch, "export", "--model", str(tmp_path / "model"), "--folder", str(tmp_path / "out")) == 1
    check_sentence(capsys.readouterr().err)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def set_channels(channels: Any) -> Callable[[Path], None]:
    return lambda file: edit_json(file, lambda plan: plan["layers"][1].update(channels=channels))


PLANS: dict[str, Callable[[Path], None]] = {
    "out of range": set_channels([0, 20]),
    "duplicated": set_channels([0, 1, 1]),
    "negative": set_channels([-1, 3]),
    "not numbers": set_channels(["a"]),
    "nothing kept": set_channels([]),
    "of another model": lambda file: edit_json(file, lambda plan: plan["geometry"].update(hidden_size=4096)),
    "of fewer layers": lambda file: edit_json(file, lambda plan: plan["layers"].pop()),
    "no plan": lambda file: file.write_text("[]") and None,
    "no JSON": lambda file: file.write_text("{") and None,
}


@pytest.mark.parametrize("name", PLANS)
def test_forged_plans_are_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make_model("llama")
    save(model, make_tokenizer(), tmp_path / "model")
    file = tmp_path / "plan.json"
    make_plan(model, [[0, 1]] * 3, [list(range(7))] * 3).save(file)
    PLANS[name](file)
    monkeypatch.chdir(tmp_path)
    arguments = ["prune", "--model.pretrained", "model", "--model.plan", "plan.json", "--export.folder", "out"]
    arguments += ["--data.evaluation.window", "32", "--trainer.accelerator", "cpu"]
    assert run(monkeypatch, *arguments) == 1
    check_sentence(capsys.readouterr().err)
    assert {path.name for path in tmp_path.iterdir()} - {"lightning_logs"} == {"model", "plan.json"}
    assert not list(tmp_path.glob("lightning_logs/*/*"))
