"""Prune the causal LM of any LightningModule before fit: one callback, nothing else changes.

python examples/own_module.py [MODEL]    # a folder or a name on the hub; the embedded SmolLM2-135M by default
"""

import sys

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

import gqaprune
from gqaprune.callbacks import CheckpointExport, TaylorPruning

TEXTS = [f"The {thing} is {colour}. " * 12 for thing in ("sky", "sea", "sun") for colour in ("blue", "deep", "warm")]


class Module(LightningModule):
    """What a project has already."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.model, self.tokenizer = gqaprune.load(name, dtype="float32")  # or AutoModelForCausalLM.from_pretrained

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        """The loss of the language model."""
        loss: torch.Tensor = self.model(**batch).loss
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Built after pruning: it holds the weights that are left."""
        return torch.optim.AdamW(self.parameters(), lr=1e-5)


class Data(LightningDataModule):
    """Likewise."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__()
        self.tokenizer = tokenizer

    def train_dataloader(self) -> DataLoader:
        """Padded batches: what padding hides is in no score."""
        return DataLoader(TEXTS, batch_size=3, collate_fn=self._collate)

    def _collate(self, texts: list[str]) -> dict[str, torch.Tensor]:
        rows = [torch.tensor(self.tokenizer(text)["input_ids"]) for text in texts]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        mask = torch.arange(ids.shape[1]) < torch.tensor([[len(row)] for row in rows])
        return {"input_ids": ids, "attention_mask": mask.long(), "labels": ids.masked_fill(~mask, -100)}


if __name__ == "__main__":
    module = Module(sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m")
    dense = sum(parameter.numel() for parameter in module.parameters())
    pruning = TaylorPruning(rate=0.2, repair={"epochs": 0, "distill_tokens": 0})  # least squares alone: a minute
    trainer = Trainer(max_epochs=1, accelerator="auto", callbacks=[pruning, CheckpointExport("pruned")])
    trainer.fit(module, datamodule=Data(module.tokenizer))
    print(f"{dense:,} parameters before, {sum(p.numel() for p in module.parameters()):,} after; saved in pruned/")
