"""Windows of tokens by batches: a training loader that knows its place, evaluation in even shares."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from gqaprune.data.windows import Batch
from gqaprune.models.losses import IGNORED


class Windows(Dataset[Batch]):
    """Windows `[windows, tokens]` with their labels; `index` in a batch is a place here."""

    def __init__(self, input_ids: Tensor, labels: Tensor) -> None:
        self.input_ids = input_ids
        self.labels = labels

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitem__(self, index: int) -> Batch:
        return {"input_ids": self.input_ids[index], "labels": self.labels[index], "index": torch.tensor(index)}


class TrainLoader(DataLoader[Batch]):
    """Knows where it is in an epoch, so that a resumed run goes on with the batch that the interrupted one had next."""

    _epoch, _yielded = 0, 0
    _resumed: dict[str, int] = {}  # noqa: RUF012  (never changed)

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        self._epoch, self._yielded = getattr(self.sampler, "epoch", 0), 0  # `overfit_batches` puts in one without
        skipped = self._resumed.get("yielded", 0) if self._resumed.get("epoch") == self._epoch else 0
        for batch in super().__iter__():
            self._yielded += 1
            if self._yielded > skipped:
                yield batch

    def state_dict(self) -> dict[str, int]:
        """The place, as Lightning keeps it in checkpoints."""
        return {"epoch": self._epoch, "yielded": self._yielded}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go on from a place."""
        self._resumed = state_dict


def fill_up(input_ids: Tensor, labels: Tensor, world_size: int) -> tuple[Tensor, Tensor]:
    """Add windows without labels until every rank gets the same number, so that none is counted twice."""
    missing = -len(input_ids) % world_size
    blank = torch.full_like(labels[:1], IGNORED).expand(missing, -1)
    return torch.cat([input_ids, input_ids[:1].expand(missing, -1)]), torch.cat([labels, blank])
