"""Read token ids from batches of any project: tensors, or dictionaries from collators, padded or not."""

from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby, islice
from typing import Any

import torch
from torch import Tensor

from gqaprune.data.windows import Batch
from gqaprune.models.losses import IGNORED

_IDS, _MASK = "input_ids", "attention_mask"


def read_given_batches(batches: Iterable[Any], limit: int | None = None) -> list[Tensor]:
    """Read the token ids of batches, without padding.

    A padded batch is divided into batches of rows with equal length, so that tokens hidden by a mask never count in a
    score, a moment or a loss.

    Args:
        batches: token ids `[batch, tokens]` or `[tokens]`, or mappings (also `BatchEncoding`) with `input_ids` and, if
            they are padded, `attention_mask`; or tuples that begin with either. A tensor of 0 and 1 that follows the
            ids in a tuple is their mask if it is 0 for the same token everywhere.
        limit: largest number of batches to read.

    Returns:
        Token ids, int64, each `[batch, tokens]`; a padded batch becomes several. Rows of less than 2 tokens are left
        out, because no token of them is predicted.

    Raises:
        ValueError: if a batch has no token ids, or no batch has a row.
    """
    ids = [rows for index, batch in enumerate(islice(batches, limit)) for rows in _read(batch, index)]
    if not ids:
        raise ValueError("the calibration batches have no row of at least 2 tokens: pass batches of input_ids")
    return ids


def align_batch(batch: Any) -> Batch:
    """Move a batch's padding to the end of its rows, where no token attends to it, and remove its mask.

    Args:
        batch: token ids `[batch, tokens]`, or a mapping with `input_ids`, optional `labels`, by default the ids
            themselves, and optional `attention_mask`; a batch without padding is returned as it is.

    Raises:
        ValueError: if the batch has no token ids, or several parts without names.
    """
    while isinstance(batch, (tuple, list)) and len(batch) == 1:
        batch = batch[0]
    parts: Mapping[str, Any] = {_IDS: batch} if isinstance(batch, Tensor) and batch.ndim == 2 else batch
    if not _is_mapping(parts) or not isinstance(parts.get(_IDS), Tensor):
        raise ValueError(
            "CausalLMModule reads batches that are a tensor of token ids [batch, tokens] or a mapping with input_ids, "
            f"got {_describe(parts)}: return a mapping with input_ids, labels and attention_mask from the collate_fn"
        )
    ids = parts[_IDS]
    labels, mask = parts.get("labels", ids), parts.get(_MASK)
    if mask is None:
        return {**parts, "labels": labels}
    others = {name: value for name, value in parts.items() if name not in (_MASK, "position_ids")}
    if bool(mask.all()):
        return {**others, "labels": labels}
    order = mask.argsort(dim=1, descending=True, stable=True)
    is_text = mask.gather(1, order).bool()
    labels = labels.gather(1, order).masked_fill(~is_text, IGNORED)
    return {**others, _IDS: ids.gather(1, order), "labels": labels}


def _read(batch: Any, index: int) -> Iterator[Tensor]:
    ids, mask = _find_ids(batch, index)
    if mask is None or bool(mask.all()):
        if ids.shape[1] > 1:
            yield ids
        return
    rows = [row[kept] for row, kept in zip(ids, mask, strict=True)]
    for length, same in groupby(sorted(rows, key=len), key=len):  # sorted() keeps the order of rows of equal length
        if length > 1:
            yield torch.stack(list(same))


def _find_ids(batch: Any, index: int) -> tuple[Tensor, Tensor | None]:
    """Return token ids and mask, each `[batch, tokens]`."""
    masks = None
    while isinstance(batch, (tuple, list)) and batch and not _is_row(batch) and not _is_row(batch[0]):
        batch, *others = batch
        masks = others[0] if others and _hides_padding(batch, others[0]) else None
    values, masks = (batch.get(_IDS), batch.get(_MASK)) if _is_mapping(batch) else (batch, masks)
    try:
        ids = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError):
        ids = torch.empty(0)
    if ids.is_floating_point() or ids.ndim not in (1, 2):
        raise ValueError(
            f"calibration batch {index} has no token ids: pass a tensor [batch, tokens] or a mapping with input_ids, "
            f"got {_describe(batch)}"
        )
    ids = torch.atleast_2d(ids).to("cpu", torch.long)
    if masks is None:
        return ids, None
    mask = torch.atleast_2d(torch.as_tensor(masks)).to("cpu", torch.bool)
    if mask.shape != ids.shape:
        raise ValueError(
            f"calibration batch {index} has an attention_mask {list(mask.shape)} for input_ids {list(ids.shape)}: pass "
            "one number for each token"
        )
    return ids, mask


def _is_row(value: Any) -> bool:
    """Return whether a value is a list of token ids."""
    return isinstance(value, (tuple, list)) and bool(value) and isinstance(value[0], int)


def _is_mapping(batch: Any) -> bool:
    """Return whether a batch is a mapping, as `BatchEncoding` is without being a `Mapping`."""
    return isinstance(batch, Mapping) or hasattr(batch, "keys")


def _hides_padding(ids: Any, other: Any) -> bool:
    """Return whether the second part of a tuple is an attention mask: of 0 and 1, and 0 for a single token only."""
    if not isinstance(ids, Tensor) or not isinstance(other, Tensor) or ids.shape != other.shape:
        return False
    is_mask = bool(((other == 0) | (other == 1)).all())
    return is_mask and len(ids[other == 0].unique()) <= 1  # a mask of the loss has 0 for many different tokens


def _describe(batch: Any) -> str:
    if _is_mapping(batch):
        return f"a mapping with {', '.join(map(str, batch.keys()))}"
    if isinstance(batch, Tensor):
        return f"a tensor {list(batch.shape)}"
    is_several = isinstance(batch, (tuple, list))
    return f"a {type(batch).__name__} of {len(batch)}" if is_several else type(batch).__name__
