"""A LightningModule and a LightningDataModule of another project, and what tests of them share."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from gqaprune.callbacks import TaylorPruning

from tiny import PLAIN, VOCABULARY, make_model

LENGTHS = (32, 20, 32, 9, 27, 32, 14, 30)


def build() -> PreTrainedModel:
    return make_model(kv_heads=4, ratio=2, channels=32)


def make_rows(seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCABULARY, (length,), generator=generator) for length in LENGTHS]


def pad(rows: list[Tensor], side: str = "right") -> dict[str, Tensor]:
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_side=side)
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side=side)
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


class Their(LightningModule):
    """Builds its causal LM in one of the three places that Lightning has for it."""

    def __init__(self, place: str = "init", build: Callable[[], PreTrainedModel] = build) -> None:
        super().__init__()
        self.place, self.build = place, build
        self.seen: list[Tensor] = []
        if place == "init":
            self.model = build()

    def setup(self, stage: str) -> None:
        if self.place == "setup":
            self.model = self.build()

    def configure_model(self) -> None:
        if self.place == "configure_model" and not hasattr(self, "model"):
            self.model = self.build()

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self.seen.append(batch["input_ids"].clone())
        loss: Tensor = self.model(**batch).loss
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class TheirData(LightningDataModule):
    """Padded batches, shuffled."""

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(make_rows(), batch_size=4, shuffle=True, collate_fn=pad)  # type: ignore[arg-type]


def make_trainer(folder: Path, *callbacks: Any, **settings: Any) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    fixed = {"accelerator": "cpu", "default_root_dir": folder, "max_epochs": 1, "enable_checkpointing": False}
    return Trainer(callbacks=list(callbacks), **{**fixed, **quiet, **settings})


def prune(**settings: Any) -> TaylorPruning:
    return TaylorPruning(**{**PLAIN, "rate": 0.3, **settings})


def count_groups(model: PreTrainedModel) -> list[tuple[int, int]]:
    return [
        (layer.self_attn.q_proj.out_features // 8, layer.self_attn.k_proj.out_features // 8)
        for layer in model.model.layers
    ]
