"""What modules of other projects may look like: manual optimization, compiled, adapters, tuples, no data module."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign import Their, TheirData, count_groups, make_rows, make_trainer, pad, prune
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import ModelCheckpoint
from peft import IA3Config, LoraConfig, get_peft_model
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

import gqaprune
from gqaprune.callbacks import CheckpointExport
from gqaprune.callbacks.run_state import get_run
from gqaprune.module import CausalLMModule

LORA = LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False)
IA3 = IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])


class Manual(Their):
    """Optimizes by itself, with two optimizers."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:  # type: ignore[override]
        loss = self.model(**batch).loss
        self.manual_backward(loss)
        for optimizer in self.optimizers():  # type: ignore[union-attr]
            optimizer.step()
            optimizer.zero_grad()

    def configure_optimizers(self) -> Any:
        parameters = list(self.parameters())
        return [torch.optim.AdamW(parameters[::2], 1e-3), torch.optim.SGD(parameters[1::2], 1e-3)]


def test_a_module_may_optimize_manually_and_then_accumulates_by_itself(tmp_path: Path) -> None:
    module = Manual()
    trainer = make_trainer(tmp_path, prune(rate=0.5))
    trainer.fit(module, datamodule=TheirData())
    assert count_groups(module.model) == [(4, 2)] * 3 and trainer.global_step == 4  # 2 batches, 2 optimizers
    with pytest.raises(ValueError, match="Manual optimizes manually, so that pruning.scheduling {0: 4} would have no"):
        make_trainer(tmp_path, prune(scheduling={0: 4})).fit(module, datamodule=TheirData())


def test_a_compiled_model_is_pruned_within_its_wrapper(tmp_path: Path) -> None:
    module = Their()
    module.model = torch.compile(module.model, backend="eager")
    make_trainer(tmp_path, prune(rate=0.5), CheckpointExport(str(tmp_path / "out"))).fit(module, datamodule=TheirData())
    assert count_groups(module.model._orig_mod) == [(4, 2)] * 3
    assert gqaprune.load_model(tmp_path / "out").config.num_key_value_heads == 2


class Adapted(Their):
    """Adds adapters to its model in a hook."""

    def __init__(self, place: str, adapters: Any = LORA) -> None:
        super().__init__()
        self.adapters = adapters
        if place == "init":
            self.model = get_peft_model(self.model, adapters)

    def configure_model(self) -> None:
        if not hasattr(self.model, "peft_config"):
            self.model = get_peft_model(self.model, self.adapters)


def test_adapters_that_follow_pruning_are_trained_and_merged_into_the_checkpoint(tmp_path: Path) -> None:
    module = Adapted("configure_model")
    make_trainer(tmp_path, prune(rate=0.5), CheckpointExport(str(tmp_path / "out"))).fit(module, datamodule=TheirData())
    ids = torch.stack(make_rows()[:1])
    with torch.no_grad():
        saved, trained = gqaprune.load_model(tmp_path / "out")(ids).logits, module.model(ids).logits
    torch.testing.assert_close(saved, trained, rtol=1e-4, atol=1e-4)
    assert (tmp_path / "out" / "adapter" / "adapter_config.json").exists()


def test_adapters_that_cannot_be_pruned_or_merged_are_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has PEFT adapters .*; or add them after pruning, .* in configure_model"):
        make_trainer(tmp_path, prune()).fit(Adapted("init"), datamodule=TheirData())
    module = Adapted("configure_model", IA3)
    with pytest.raises(ValueError, match="adapters, which cannot be merged on saving"):
        make_trainer(tmp_path, prune(), CheckpointExport(str(tmp_path / "out"))).fit(module, datamodule=TheirData())
    assert not module.seen


class Other(TheirData):
    """Text that would lead to another plan."""

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(make_rows(9), batch_size=4, collate_fn=pad)  # type: ignore[arg-type]


@pytest.mark.parametrize("path", ["last", "saved/last.ckpt"])
@pytest.mark.parametrize("kind", ["new", "same", "ours"])
def test_a_run_resumes_with_the_plan_of_its_checkpoint_whatever_the_text_is_now(
    kind: str, path: str, tmp_path: Path
) -> None:
    def start(epochs: int) -> Any:
        saves = ModelCheckpoint(tmp_path / "saved", save_last=True)
        settings = {"enable_checkpointing": True, "max_epochs": epochs}
        return make_trainer(tmp_path, prune(allocation="global"), saves, **settings)

    def build() -> Any:
        return CausalLMModule(Their().model) if kind == "ours" else Their()

    first, trainer = build(), start(1)
    trainer.fit(first, datamodule=TheirData())
    assert trainer.global_step == 2
    plan = (first if kind == "ours" else get_run(trainer).module).plan
    second = first if kind == "same" else build()
    trainer = start(2)
    trainer.fit(second, datamodule=Other(), ckpt_path=path if path == "last" else str(tmp_path / path))
    again = (second if kind == "ours" else get_run(trainer).module).plan
    assert again.layers == plan.layers and count_groups(second.model) == count_groups(first.model)
    assert trainer.global_step == 4


class Unsized(IterableDataset):  # type: ignore[type-arg]
    def __iter__(self) -> Iterator[Tensor]:
        while True:
            yield from make_rows()


class Everything(LightningDataModule):
    """Batches without a length, and validation text of another project."""

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(Unsized(), batch_size=4, collate_fn=pad)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(make_rows(), batch_size=4, collate_fn=pad)  # type: ignore[arg-type]


def test_our_module_trains_on_endless_batches_and_measures_the_perplexity_of_their_text(tmp_path: Path) -> None:
    limits = {"max_steps": 2, "max_epochs": -1, "limit_val_batches": 2, "val_check_interval": 2}
    trainer = make_trainer(tmp_path, prune(calibration_limit=2), **limits)
    trainer.fit(CausalLMModule(Their().model), datamodule=Everything())
    assert trainer.global_step == 2 and trainer.callback_metrics["ppl/0"] > 1
    with pytest.raises(ValueError, match="the training batches have no length, .*: set trainer.max_steps or"):
        make_trainer(tmp_path).fit(CausalLMModule(Their().model), datamodule=Everything())
