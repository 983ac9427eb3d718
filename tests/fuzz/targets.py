"""What is fuzzed: a folder that is made once, files of it that are changed, and the command that reads them."""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from random import Random
from shutil import rmtree

import torch
from mutations import TEMPLATES, mutate_bytes, rewrite_json
from safetensors.torch import load_file, save_file

from gqaprune.checkpoints.save import save
from gqaprune.cli import main
from gqaprune.common.stage_cache import StageCache
from gqaprune.training.resume import RunNote

from cuts import UNEVEN, make_plan, make_pruned
from tiny import CHAT_TEMPLATE, make_model, make_tokenizer

HEAD = 4096
"""Bytes at a file's beginning that are changed where the rest is weights, of which any may be right."""
_QUIET = ["--trainer.enable_progress_bar", "false", "--trainer.accelerator", "cpu", "--trainer.logger", "false"]
_WINDOWS = ["--data.calibration.window", "32", "--data.calibration.windows", "4", "--data.evaluation.window", "32"]
_WINDOWS += ["--data.evaluation.tokens", "128", "--data.calibration.held_out_windows", "2"]
_PRUNE = ["prune", "--model.pretrained", "model", "--export.folder", "out", *_WINDOWS, *_QUIET]


def accept_any(folder: Path) -> str | None:
    """No complaint about what a command left that ended well."""
    return None


@dataclass(frozen=True)
class Target:
    """Files that are changed, and who reads them.

    Args:
        prepare: makes the folder that every case is a copy of.
        change: changes a copy; returns what it changed.
        commands: one of which reads the copy.
        complain: what is wrong with what a command left that ended well, or null.
    """

    prepare: Callable[[Path], None]
    change: Callable[[Path, Random], str]
    commands: tuple[list[str], ...]
    complain: Callable[[Path], str | None] = accept_any


def run(command: list[str]) -> int:
    """Run a command in this process."""
    sys.argv = ["gqaprune", *command]
    return main()


def _save_model(folder: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    save(make_model("llama"), tokenizer, folder / "model")


def _save_pruned(folder: Path) -> None:
    save(make_pruned("llama", UNEVEN), make_tokenizer(), folder / "model")
    make_plan(make_model("llama", kv_heads=3, ratio=2), *UNEVEN).save(folder / "model" / "plan.json")


def _save_plan(folder: Path) -> None:
    _save_model(folder)
    make_plan(make_model("llama"), [[0, 1]] * 3, [list(range(7))] * 3).save(folder / "plan.json")


def _save_shards(folder: Path) -> None:
    save(make_pruned("llama", UNEVEN), make_tokenizer(), folder / "model", max_shard_size="20KB")


def _save_gguf(folder: Path) -> None:
    save(make_model("llama"), make_tokenizer([("t", "h")]), folder / "whole", format="gguf-f16")
    next((folder / "whole").glob("*.gguf")).rename(folder / "model.gguf")


@contextmanager
def _kept_stages() -> Iterator[None]:
    """Let a run leave its stages and its note, as one that is killed does."""
    clear, remove = StageCache.clear, RunNote.remove
    StageCache.clear = lambda self: None  # type: ignore[method-assign]
    RunNote.remove = staticmethod(lambda root, lock: lock.release())  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        StageCache.clear, RunNote.remove = clear, remove  # type: ignore[method-assign]


def _leave_stages(folder: Path) -> None:
    _save_model(folder)
    with _kept_stages():
        assert run(_PRUNE) == 0
    wanted = _hash_weights(folder / "out")
    rmtree(folder / "out")
    for file in folder.iterdir():
        if file.is_file():
            file.unlink()
    (folder / "wanted").write_text(wanted)


def _hash_weights(folder: Path) -> str:
    digest = sha256()
    for name, tensor in sorted(load_file(folder / "model.safetensors").items()):
        digest.update(name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _compare_weights(folder: Path) -> str | None:
    is_same = _hash_weights(folder / "out") == (folder / "wanted").read_text()
    return None if is_same else "the weights differ from those of an undisturbed run"


def _change_json(*names: str) -> Callable[[Path, Random], str]:
    def change(folder: Path, random: Random) -> str:
        name = random.choice(names)
        rewrite_json(folder / name, random)
        return name

    return change


def _change_head(pattern: str) -> Callable[[Path, Random], str]:
    def change(folder: Path, random: Random) -> str:
        file = random.choice(sorted(folder.glob(pattern)))
        file.write_bytes(mutate_bytes(file.read_bytes(), random, HEAD))
        return file.name

    return change


def _change_template(folder: Path, random: Random) -> str:
    text = random.choice((*TEMPLATES, CHAT_TEMPLATE))
    if random.random() < 0.4:
        text = mutate_bytes(text.encode(), random).decode(errors="replace")
    (folder / "model" / "chat_template.jinja").write_text(text, encoding="utf-8")
    return text


def _change_stage(folder: Path, random: Random) -> str:
    file = random.choice(
        sorted(path for path in (folder / "lightning_logs" / "unfinished").iterdir() if path.is_file())
    )
    if file.suffix == ".json":
        rewrite_json(file, random)
    else:
        file.write_bytes(mutate_bytes(file.read_bytes(), random))
    return file.name


def _change_type(folder: Path, random: Random) -> str:
    """Give one tensor another type or shape, or none."""
    file = folder / "model" / "model.safetensors"
    tensors = load_file(file)
    name = random.choice(sorted(tensors))
    types = (torch.float8_e4m3fn, torch.int8, torch.uint8, torch.bool, torch.complex64, torch.float64, torch.int64)
    action = random.choice(("type", "type", "shape", "drop", "nan", "rename"))
    tensor = tensors.pop(name)
    if action == "type":
        tensors[name] = tensor.to(random.choice(types))
    elif action == "shape":
        tensors[name] = random.choice((tensor[:-1], tensor.flatten(), tensor[None], tensor[:0])).contiguous()
    elif action == "nan":
        tensors[name] = tensor * float("nan")
    elif action == "rename":
        tensors[name + random.choice(("_scale_inv", ".x", "\x1b[31m", "[/b]"))] = tensor
    save_file(tensors, file, {"format": "pt"})
    return f"{action} of {name}"


_CONFIGS = ("model/config.json", "model/generation_config.json")
_TOKENIZER = ("model/tokenizer.json", "model/tokenizer_config.json")
_EXPORT = ["export", "--model", "model", "--folder", "out"]
_INSPECT = ["inspect", "model"]
_PREDICT = ["predict", "--model.pretrained", "model", "--data.prompts", "[hello]", "--model.max_new_tokens", "2"]
_PREDICT += [*_WINDOWS, *_QUIET]
TARGETS: Mapping[str, Target] = {
    "plan": Target(_save_plan, _change_json("plan.json"), ([*_PRUNE, "--model.plan", "plan.json"],)),
    "folder's plan": Target(_save_pruned, _change_json("model/plan.json"), (_INSPECT, _PREDICT)),
    "config": Target(_save_model, _change_json(*_CONFIGS), (_INSPECT, _EXPORT)),
    "per-layer config": Target(_save_pruned, _change_json(*_CONFIGS), (_INSPECT, _EXPORT)),
    "tokenizer": Target(_save_model, _change_json(*_TOKENIZER), (_EXPORT, _PREDICT)),
    "template": Target(_save_model, _change_template, ([*_PREDICT, "--data.chat", "true"],)),
    "weights": Target(_save_model, _change_type, (_INSPECT, _EXPORT)),
    "header": Target(_save_model, _change_head("model/model.safetensors"), (_INSPECT, _EXPORT)),
    "GGUF": Target(
        _save_gguf,
        _change_head("model.gguf"),
        (["inspect", "model.gguf"], ["export", "--model", "model.gguf", "--folder", "out"]),
    ),
    "index": Target(_save_shards, _change_json("model/model.safetensors.index.json"), (_INSPECT, _EXPORT)),
    "stages": Target(_leave_stages, _change_stage, (_PRUNE,), _compare_weights),
}
"""What is fuzzed, by name."""
