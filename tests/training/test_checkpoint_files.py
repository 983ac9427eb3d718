import os
import pickle
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from payload import Payload
from torch.distributed import checkpoint as sharded
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import MetadataIndex, StorageMeta

from gqaprune.module import CausalLMModule
from gqaprune.training.checkpoint_files import (
    check_is_local,
    guard_loading,
    guard_restoring,
    load_weights_alone,
    read_checkpoint,
)
from gqaprune.training.lightning_internals import ALWAYS

STATE = {"weight": torch.ones(2, 3), "half": torch.zeros(2, dtype=torch.bfloat16), "step": 3, "betas": (0.9, 0.95)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of shards, as torch and Lightning write it."""
    folder = tmp_path / "shards"
    sharded.save(STATE, checkpoint_id=folder, no_dist=True)
    torch.save({"callbacks": {}}, folder / "meta.pt")
    return folder


def edit_metadata(folder: Path, change: Callable[[Any], object]) -> None:
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    change(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def test_what_torch_writes_of_shards_is_read(folder: Path) -> None:
    assert read_checkpoint(folder) == {"callbacks": {}}


def test_values_that_are_no_tensors_are_read_back_as_plain_data(folder: Path) -> None:
    state = {"weight": torch.zeros(2, 3), "half": torch.ones(2, dtype=torch.bfloat16), "step": 0, "betas": (0.0, 0.0)}

    with load_weights_alone():
        sharded.load(state, checkpoint_id=folder, no_dist=True)

    assert state["step"] == 3 and state["betas"] == (0.9, 0.95) and torch.equal(state["weight"], torch.ones(2, 3))  # type: ignore[arg-type]


def plant_object(folder: Path, marker: Path) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(Payload(marker)))


def plant_storage(folder: Path, marker: Path) -> None:
    edit_metadata(folder, lambda metadata: metadata.storage_data.update({Payload(marker): None}))


def plant_path(folder: Path, marker: Path) -> None:
    edit_metadata(folder, lambda metadata: setattr(metadata, "storage_meta", StorageMeta(Payload(marker))))  # type: ignore[arg-type]


def plant_in_rank(folder: Path, marker: Path) -> None:
    (folder / ".metadata").rename(folder / "__0.metadata")
    (folder / "__0.metadata").write_bytes(pickle.dumps(Payload(marker)))


def plant_in_meta(folder: Path, marker: Path) -> None:
    torch.save({"callbacks": Payload(marker)}, folder / "meta.pt")


@pytest.mark.parametrize("plant", [plant_object, plant_storage, plant_path, plant_in_rank, plant_in_meta])
def test_no_file_of_a_folder_of_shards_runs_code(folder: Path, plant: Callable[[Path, Path], None]) -> None:
    marker = folder / "ran"
    plant(folder, marker)

    with pytest.raises(ValueError, match=r"(posix|nt)\.?\w*mkdir|GLOBAL posix.mkdir"):
        read_checkpoint(folder)

    assert not marker.exists()


def test_what_lies_where_a_tensor_is_does_not_run_code(folder: Path) -> None:
    marker, file = folder / "ran", next(folder.glob("*.distcp"))

    def change(metadata: Any) -> None:
        metadata.state_dict_metadata["weight"] = sharded.metadata.BytesStorageMetadata()
        torch.save(Payload(marker), file)
        info = _StorageInfo(file.name, 0, file.stat().st_size)
        metadata.storage_data[MetadataIndex("weight")] = info

    edit_metadata(folder, change)
    state = {"weight": torch.zeros(2, 3)}

    read_checkpoint(folder)
    with load_weights_alone(), pytest.raises(CheckpointException, match="Weights only load failed"):
        sharded.load(state, checkpoint_id=folder, no_dist=True)

    assert not marker.exists()


@pytest.mark.parametrize("name", ["../other.distcp", "/etc/passwd", "a/b.distcp"])
def test_shards_outside_of_the_folder_are_refused(folder: Path, name: str) -> None:
    def change(metadata: Any) -> None:
        next(iter(metadata.storage_data.values())).relative_path = name

    edit_metadata(folder, change)
    with pytest.raises(ValueError, match="which is not in its folder"):
        read_checkpoint(folder)


@pytest.mark.parametrize(
    "content",
    [b"", b"\x80\x04", b"plain", pickle.dumps([]), pickle.dumps({"storage_data": {}}), pickle.dumps(torch.float32)],
)
def test_what_is_no_metadata_is_refused(folder: Path, content: bytes) -> None:
    (folder / ".metadata").write_bytes(content)
    with pytest.raises(ValueError, match="is not metadata that torch writes beside shards"):
        read_checkpoint(folder)


def test_a_pickle_cannot_change_the_classes_that_it_may_name(folder: Path) -> None:
    # GLOBAL Metadata, then BUILD with a state for its attributes.
    content = b"ctorch.distributed.checkpoint.metadata\nMetadata\n(N(S'planner_data'\nI1\ndtb."
    (folder / ".metadata").write_bytes(content)

    with pytest.raises(ValueError, match="is not metadata that torch writes beside shards"):
        read_checkpoint(folder)


@pytest.mark.parametrize(
    "name",
    [
        "http://host/a.ckpt", "https://host/a.ckpt", "s3://bucket/a", "gs://bucket/a", "hf://org/name/a", "ftp://h/a",
        "file:///a.ckpt", "memory://a", "simplecache::http://host/a", "zip://a.ckpt::http://host/a.zip", "HTTP://h/a",
        "filecache::/a.ckpt", "registry:org/name", "registry://org/name",
    ],
)  # fmt: skip
def test_a_checkpoint_is_on_this_machine(name: str) -> None:
    with pytest.raises(ValueError, match="must be a file or a folder on this machine, got"):
        check_is_local(name)


@pytest.mark.parametrize("name", ["last", "best", "runs/epoch=0-step=1.ckpt", "https.ckpt", "/a:b/c.ckpt", "C:\\a"])
def test_names_of_files_are_taken(name: str) -> None:
    check_is_local(name)


def test_the_environment_is_as_it_was_after_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    with load_weights_alone():
        assert "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD" not in os.environ
    assert os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] == "1"
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


@pytest.mark.parametrize("is_file", [True, False], ids=["file", "URL"])
@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
def test_a_trainer_loads_no_code_whatever_it_is_told(
    command: str, is_file: bool, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker, name = tmp_path / "ran", str(tmp_path / "forged.ckpt")
    torch.save({"state_dict": Payload(marker), "pytorch-lightning_version": "2.6.0"}, name)
    if not is_file:
        monkeypatch.setattr("torch.hub.load_state_dict_from_url", lambda *_, **__: pytest.fail("fetched"))
        name = "https://localhost/forged.ckpt"
    module = CausalLMModule(str(tiny_folder))
    loader = torch.utils.data.DataLoader(torch.zeros(2, 4, dtype=torch.long))  # type: ignore[arg-type]
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)

    with pytest.raises(ValueError, match="could run code" if is_file else "on this machine, got https"):
        getattr(trainer, command)(module, loader, ckpt_path=name, weights_only=False)

    assert not marker.exists()


def test_a_module_is_built_from_files_without_code(tmp_path: Path, tiny_folder: Path) -> None:
    marker, path = tmp_path / "ran", tmp_path / "forged.ckpt"
    torch.save({"state_dict": {}, "hyper_parameters": {"pretrained": Payload(marker)}}, path)
    with pytest.raises(pickle.UnpicklingError):
        CausalLMModule.load_from_checkpoint(path, weights_only=False)
    with pytest.raises(ValueError, match="on this machine, got https"):
        CausalLMModule.load_from_checkpoint("https://localhost/forged.ckpt")
    assert not marker.exists()


def test_a_checkpoint_cannot_ask_for_remote_code(
    tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, asked = CausalLMModule(str(tiny_folder), trust_remote_code=True), []
    monkeypatch.setattr(CausalLMModule, "load", lambda self: asked.append(self.source.trust_remote_code))
    content = {"state_dict": {}, "hyper_parameters": dict(module.hparams), "pytorch-lightning_version": "2.6.0"}
    torch.save(content, tmp_path / "run.ckpt")

    CausalLMModule.load_from_checkpoint(tmp_path / "run.ckpt", strict=False)
    CausalLMModule.load_from_checkpoint(tmp_path / "run.ckpt", strict=False, trust_remote_code=True)

    assert asked == [False, True]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ({}, "it has no epoch"),
        ({"epoch": 0, "global_step": 0, "loops": {}, "state_dict": {}}, "it has no pytorch-lightning_version"),
        ({**dict.fromkeys(ALWAYS, 0)}, "it has no state_dict"),
        ({**dict.fromkeys(ALWAYS, 0), "state_dict": [1]}, "has no weights by name"),
        ({**dict.fromkeys(ALWAYS, 0), "state_dict": {1: 2}}, "has no weights by name"),
    ],
)
def test_what_is_no_checkpoint_is_refused(content: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "forged.ckpt")
    strategy: Any = SimpleNamespace(load_checkpoint=lambda *_, **__: pytest.fail("loaded"))
    guard_loading(strategy)
    with pytest.raises(ValueError, match=sentence):
        strategy.load_checkpoint(tmp_path / "forged.ckpt")


def test_states_of_training_that_do_not_fit_are_one_sentence() -> None:
    def restore(*_: object) -> None:
        raise KeyError("fit_loop")

    names = ("_restore_modules_and_callbacks", "restore_training_state")
    connector = SimpleNamespace(**dict.fromkeys(names, restore))
    trainer = SimpleNamespace(_checkpoint_connector=connector, world_size=1, ckpt_path="last.ckpt")
    for _ in range(2):
        guard_restoring(trainer)
    for name in names:
        with pytest.raises(
            ValueError, match="^cannot resume from last.ckpt: .*KeyError.*--ckpt_path null to train from the start$"
        ):
            getattr(connector, name)("last.ckpt")
