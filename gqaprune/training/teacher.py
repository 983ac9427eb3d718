"""Keep a teacher's predictions on disk: its likeliest tokens for every training token, computed once.

For each position, the files have the `k` largest log-probabilities and their tokens, 6 bytes each. The probability of
all other tokens together follows, because probabilities add up to 1.

Axes in tensor names: B samples, T tokens, V vocabulary, K likeliest tokens.
"""

import hashlib
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel

from gqaprune.common.atomic_files import write_atomically
from gqaprune.common.cache_folder import find_cache_folder
from gqaprune.common.checked_tensors import pack_tensors, read_tensors
from gqaprune.common.console import track
from gqaprune.common.distributed import get_rank_and_world_size, is_true_anywhere
from gqaprune.models.soft_targets import Predictions, predict_likeliest
from gqaprune.placement.model_hash import hash_model

CACHE_FOLDER = find_cache_folder("teachers")
"""Folder of predictions, with a folder for each teacher, text and setting."""
_WINDOWS_PER_FILE = 64


class CachedTeacher:
    """A teacher's predictions for training windows, in files.

    Args:
        folder: folder of one teacher, text and setting.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def predict(self, index_B: Tensor) -> Predictions:
        """Read predictions for windows by index, float32 and int64 `[batch, tokens - 1, k]`, on the CPU."""
        rows = [self._read(int(index)) for index in index_B]
        return Predictions(torch.stack([row[0] for row in rows]).float(), torch.stack([row[1] for row in rows]).long())

    def _read(self, index: int) -> tuple[Tensor, Tensor]:
        number, row = divmod(index, _WINDOWS_PER_FILE)
        with safe_open(_name_file(self.folder, number), framework="pt") as file:
            return file.get_slice("log_probability")[row], file.get_slice("token")[row]


def cache_teacher(
    teacher: PreTrainedModel,
    windows_NT: Tensor,
    top_k: int,
    temperature: float = 1.0,
    batch_size: int = 1,
    cache: Path = CACHE_FOLDER,
) -> CachedTeacher:
    """Write a teacher's predictions for the windows, unless they are on disk; each rank writes its share of files.

    Args:
        teacher: the dense causal LM, in eval mode, on the device to compute on.
        windows_NT: token ids, int64, the same on every rank.
        top_k: number of likeliest tokens to keep, 1 to the vocabulary's size.
        temperature: divides the logits.
        batch_size: windows per forward pass.
        cache: folder of all predictions; in a process group, every rank must see the same folder.

    Raises:
        ValueError: if `top_k` is out of its bounds, the teacher's logits are not finite, or a rank cannot see the files
            of another.
    """
    check_top_k(top_k, teacher.get_input_embeddings().weight.shape[0])
    text = hashlib.sha256(windows_NT.contiguous().numpy().tobytes()).hexdigest()
    folder = cache / hash_model(teacher, [text, top_k, temperature])
    folder.mkdir(parents=True, exist_ok=True)
    parts, (rank, world_size) = windows_NT.split(_WINDOWS_PER_FILE), get_rank_and_world_size()
    missing = [number for number in range(rank, len(parts), world_size) if not _is_whole(_name_file(folder, number))]
    device, error = next(teacher.parameters()).device, None
    try:
        for number in track(missing, "predictions of the teacher", f"x {_WINDOWS_PER_FILE} windows"):
            ids = parts[number].split(batch_size)
            batches = [predict_likeliest(teacher, own.to(device), top_k, temperature) for own in ids]
            log_probability, token = (torch.cat(tensors).contiguous() for tensors in zip(*batches, strict=True))
            if not torch.isfinite(log_probability).all():
                raise ValueError(
                    f"the teacher's logits are not finite in training windows {number * _WINDOWS_PER_FILE} and later "
                    f"(it computes in {teacher.dtype}): set recovery.teacher_dtype to bfloat16 or float32"
                )
            content = pack_tensors({"log_probability": log_probability.half(), "token": token.int()}, {})
            write_atomically(_name_file(folder, number), content)
    except (OSError, ValueError) as failure:  # a full disk, an overflow
        error = failure
    if is_true_anywhere(error is not None, device):
        raise error or ValueError("the teacher's predictions failed on another rank: see the error of that rank")
    if is_true_anywhere(not all(_name_file(folder, number).exists() for number in range(len(parts))), device):
        raise ValueError(f"{folder} is not shared by all machines: set XDG_CACHE_HOME to a shared folder")
    return CachedTeacher(folder)


def check_top_k(top_k: int, vocabulary: int) -> None:
    """Raise an error if `top_k` is not 1 to the teacher's vocabulary size.

    Raises:
        ValueError: with the bound.
    """
    if not 1 <= top_k <= vocabulary:
        raise ValueError(f"recovery.teacher_top_k must be 1 to {vocabulary}, got {top_k}; try {min(64, vocabulary)}")


def _is_whole(path: Path) -> bool:
    try:
        read_tensors(path)
    except (OSError, ValueError):
        return False
    return True


def _name_file(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.safetensors"
