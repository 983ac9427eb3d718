"""A size to reach in place of a rate."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer

import gqaprune
from gqaprune import CalibrationSet, prune
from gqaprune.callbacks import TaylorPruning
from gqaprune.datamodules import TextDataModule
from gqaprune.models.architecture import count_parameters
from gqaprune.module import CausalLMModule
from gqaprune.planning.config import PruningConfig
from gqaprune.planning.target import parse_size, resolve_target

from tiny import DATA, PLAIN, make_model, make_plain, make_tokens


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5e9), ("4.7 GiB", 4.7 * 2**30), ("500mb", 5e8), ("1k", 1e3), ("123", 123.0), ("5e9", 5e9), ("2T", 2e12)],
)
def test_sizes_are_read_as_people_write_them(text: str, size: float) -> None:
    assert parse_size(text) == pytest.approx(size)


@pytest.mark.parametrize("text", ["five", "5 apples", "", "-3GB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"pruning.target_size must be a size such as 5GB|must be above 0 and below"):
        resolve_target(make_model(), PruningConfig(target_size=text))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_model_that_is_left_has_the_size_that_was_asked_for(dtype: torch.dtype) -> None:
    dense = count_parameters(make_model(channels=64))
    wanted = int(0.85 * dense)
    batches = CalibrationSet(make_tokens(4, 32).split(2))
    each = torch.finfo(dtype).bits // 8
    for target in ({"target_parameters": float(wanted)}, {"target_size": str(wanted * each)}):
        model = make_model(channels=64).to(dtype)
        plan, _ = prune(model, batches, make_plain(allocation="global", **target))
        left = count_parameters(model)
        assert abs(left - wanted) < 600  # to the nearest step: a group has more
        assert plan.rate == pytest.approx(1 - wanted / dense) and plan.rate_base == "all"


def test_a_size_is_that_of_the_type_that_weights_are_loaded_in(tiny_folder: Path, tmp_path: Path) -> None:
    size = sum(own.nbytes for own in gqaprune.load_model(tiny_folder, "bfloat16").parameters())
    module = CausalLMModule(str(tiny_folder), dtype="bfloat16")
    pruning = TaylorPruning(**{**PLAIN, "allocation": "global", "target_size": str(int(0.9 * size))})
    data = TextDataModule(str(tiny_folder), **DATA)
    Trainer(
        accelerator="cpu",
        limit_train_batches=0,
        limit_val_batches=0,
        logger=False,
        callbacks=[pruning],
        enable_checkpointing=False,
        default_root_dir=tmp_path,
    ).fit(module, datamodule=data)
    left = sum(own.nbytes for own in module.model.parameters())
    assert abs(left / size - 0.9) < 0.02


def test_targets_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match=r"pruning.target_parameters 1e\+09 must be above 0 and below"):
        resolve_target(make_model(), PruningConfig(target_parameters=1e9))
    with pytest.raises(ValueError, match="cannot both be set: remove one of them"):
        PruningConfig(target_parameters=1e9, target_size="5GB")
