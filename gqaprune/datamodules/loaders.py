"""Load windows in batches: a training loader that can resume, and equal shares for evaluation."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from gqaprune.data.windows import Batch
from gqaprune.models.losses import IGNORED


class Windows(Dataset[Batch]):
    """Windows `[windows, tokens]` with their labels; `index` in a batch is a window's place here."""

    def __init__(self, input_ids: Tensor, labels: Tensor) -> None:
        self.input_ids = input_ids
        self.labels = labels

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitem__(self, index: int) -> Batch:
        return {"input_ids": self.input_ids[index], "labels": self.labels[index], "index": torch.tensor(index)}


class TrainLoader(DataLoader[Batch]):
    """A loader that saves its place in an epoch, so that a resumed run continues with the next batch."""

    _epoch, _yielded = 0, 0
    _resumed: dict[str, int] = {}  # noqa: RUF012  (never changed)

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        self._epoch, self._yielded = getattr(self.sampler, "epoch", 0), 0  # the sampler of `overfit_batches` has none
        skipped = self._resumed.get("yielded", 0) if self._resumed.get("epoch") == self._epoch else 0
        for batch in super().__iter__():
            self._yielded += 1
            if self._yielded > skipped:
                yield batch

    def state_dict(self) -> dict[str, int]:
        """Return the place in the epoch, for Lightning's checkpoints."""
        return {"epoch": self._epoch, "yielded": self._yielded}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Continue from a saved place."""
        self._resumed = state_dict


def fill_up(input_ids: Tensor, labels: Tensor, world_size: int) -> tuple[Tensor, Tensor]:
    """Add windows without labels until every rank has the same number, so that no window is counted twice."""
    missing = -len(input_ids) % world_size
    blank = torch.full_like(labels[:1], IGNORED).expand(missing, -1)
    return torch.cat([input_ids, input_ids[:1].expand(missing, -1)]), torch.cat([labels, blank])
