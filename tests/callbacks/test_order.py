"""The export is what training ends with, wherever callbacks stand that average weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import (
    EarlyStopping,
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.cli import SaveConfigCallback
from test_module import fast_optimizer, make_data, make_trainer

from gqaprune import load
from gqaprune.callbacks import CheckpointExport, PerplexityGuard, RunSummary, TaylorPruning
from gqaprune.callbacks.order import order_callbacks
from gqaprune.module import CausalLMModule

from tiny import PLAIN


class Raw(Callback):
    """Keeps the weights that the last step left."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        self.weights = {name: weight.detach().clone() for name, weight in pl_module.model.named_parameters()}


@pytest.mark.parametrize(
    ("averaging", "place"),
    [(StochasticWeightAveraging, 0), (StochasticWeightAveraging, 2), (WeightAveraging, 2), (EMAWeightAveraging, 0)],
)
def test_averaged_weights_are_exported_whatever_the_order(
    averaging: type[Callback], place: int, tiny_folder: Path, tmp_path: Path
) -> None:
    raw, settings = Raw(), {"swa_lrs": 1e-2, "swa_epoch_start": 1} if averaging is StochasticWeightAveraging else {}
    callbacks = [CheckpointExport(str(tmp_path / "out")), TaylorPruning(rate=0.3, **PLAIN)]
    callbacks.insert(place, averaging(**settings))  # type: ignore[arg-type]
    module = CausalLMModule(str(tiny_folder), optimizer=fast_optimizer, dtype="float32")
    trainer = make_trainer(tmp_path, *callbacks, raw, max_epochs=2, limit_train_batches=2)
    trainer.fit(module, datamodule=make_data(tiny_folder))
    exported = load(tmp_path / "out", dtype="float32")[0]
    ended = dict(module.model.named_parameters())
    for name, weight in exported.named_parameters():
        assert torch.equal(weight, ended[name].cpu()), name
    assert any(not torch.equal(weight, raw.weights[name]) for name, weight in exported.named_parameters())
    assert module.plan is not None and not module.plan.removes_nothing


class Own(Callback):
    """Of a class that gqaprune does not know."""


def test_callbacks_come_in_the_order_of_the_work() -> None:
    stop, best, averaging = EarlyStopping("train/loss"), ModelCheckpoint(), EMAWeightAveraging()
    before, after, config = Own(), Own(), SaveConfigCallback.__new__(SaveConfigCallback)
    export, pruning, guard, summary = CheckpointExport(), TaylorPruning(rate=0.3), PerplexityGuard(), RunSummary()
    trainer: Any = Trainer.__new__(Trainer)
    trainer.callbacks = [averaging, before, export, after, pruning, guard, config, summary, stop, best]
    for _ in range(2):
        order_callbacks(trainer)
        ordered = [stop, before, pruning, guard, averaging, export, after, config, summary, best]
        assert trainer.callbacks == ordered
