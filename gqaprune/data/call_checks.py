"""Check the arguments of library calls: a model that can be pruned, and token ids that it can read."""

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

import torch
from peft import PeftModel
from torch import Tensor
from torch._dynamo.eval_frame import OptimizedModule
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DataParallel, DistributedDataParallel
from transformers import PreTrainedModel

from gqaprune.models.architecture import check_context
from gqaprune.models.losses import IGNORED
from gqaprune.models.wrapping import check_no_adapters, is_sharded, unwrap_model
from gqaprune.placement.layer_store import find_store

T = TypeVar("T")

_INTEGERS = (torch.int64, torch.int32)
"""Types of ids that an embedding accepts."""


def check_model(model: object) -> None:
    """Raise an error unless the model is a bare causal LM with values, on one device, offloaded or sharded.

    Raises:
        ValueError: with the model to pass instead.
    """
    name = type(model).__name__
    if isinstance(model, OptimizedModule):
        raise ValueError("the model is compiled: pass the original model, model._orig_mod")
    if isinstance(model, (DistributedDataParallel, DataParallel)):
        raise ValueError(f"the model is wrapped in {name}: pass the wrapped model, model.module")
    if isinstance(model, PeftModel):
        check_no_adapters(model)
    inner = model.module if isinstance(model, FullyShardedDataParallel) else model
    if not isinstance(inner, PreTrainedModel) or inner.get_output_embeddings() is None:
        raise ValueError(f"the model must be a causal LM of transformers, such as load_model returns, got {name}")
    if isinstance(model, FullyShardedDataParallel) or is_sharded(inner) or not find_store(inner).is_in_memory:
        return
    devices = sorted({str(parameter.device) for parameter in inner.parameters()})
    if "meta" in devices:
        raise ValueError("the model's weights have no values (they are on the meta device): load it with load_model")
    if len(devices) > 1:
        raise ValueError(
            f"the model is spread over {', '.join(devices)}: load it without device_map and move it to one device, or "
            "use load_offloaded_model or load_sharded_model"
        )
    if any(parameter.is_inference() for parameter in inner.parameters()):
        raise ValueError("the model was loaded under torch.inference_mode, which forbids gradients: load it outside")


def list_items(items: Iterable[T], name: str) -> Sequence[T]:
    """Return items that can be iterated over several times: a list as it is, a generator's items in a list.

    Raises:
        ValueError: if it is not iterable, or is a string or a mapping.
    """
    if not isinstance(items, Iterable) or isinstance(items, (str, Mapping)):
        raise ValueError(f"{name} must be a list of batches, got {type(items).__name__}")
    return items if isinstance(items, Sequence) else list(items)


def list_corpora(corpora: Mapping[str, Iterable[T]]) -> dict[str, Sequence[T]]:
    """Return the items of every corpus in a list, by the corpus's name.

    Raises:
        ValueError: if `corpora` is not a mapping, or a corpus is not a list of batches.
    """
    if not isinstance(corpora, Mapping):
        raise ValueError(f"corpora must be a dict of name -> list of batches, got {type(corpora).__name__}")
    return {name: list_items(batches, name) for name, batches in corpora.items()}


def check_windows(model: PreTrainedModel, batches: Sequence[Tensor], name: str) -> None:
    """Raise an error if the model cannot read a batch of windows, or a batch has no token to predict.

    Args:
        model: the causal LM.
        batches: token ids, each `[batch, tokens]`.
        name: name of the batches, for the error.

    Raises:
        ValueError: with the first wrong batch.
    """
    for index, batch in enumerate(batches):
        check_ids(model, batch, f"batch {index} of {name}")
        if len(batch) < 1 or batch.shape[1] < 2:
            raise ValueError(
                f"batch {index} of {name} has {batch.shape[0]} windows of {batch.shape[1]} tokens: pass at least 1 "
                "window of 2 tokens, because the first token is never predicted"
            )
        check_context(unwrap_model(model).config, batch.shape[1], f"a window of {name}")


def check_evaluation(model: PreTrainedModel, batches: Sequence[Mapping[str, Tensor]], name: str) -> None:
    """Raise an error if perplexity cannot be measured on a batch.

    Args:
        model: the causal LM.
        batches: each with `input_ids` and `labels`, `[batch, tokens]`.
        name: name of the corpus.

    Raises:
        ValueError: with the first wrong batch, or if no token has a label.
    """
    parts = ("input_ids", "labels")
    for index, batch in enumerate(batches):
        if not isinstance(batch, Mapping) or not all(isinstance(batch.get(part), Tensor) for part in parts):
            raise ValueError(f"batch {index} of {name} must have input_ids and labels, got {type(batch).__name__}")
    check_windows(model, [batch["input_ids"] for batch in batches], name)
    for index, batch in enumerate(batches):
        ids, labels = (batch[part] for part in parts)
        if labels.shape != ids.shape:
            raise ValueError(
                f"batch {index} of {name} has labels {list(labels.shape)} for input_ids {list(ids.shape)}: pass one "
                "label for each token"
            )
        check_ids(model, labels.where(labels != IGNORED, 0), f"batch {index} of {name}, labels,")
    if not any((batch["labels"][:, 1:] != IGNORED).any() for batch in batches):
        raise ValueError(f"{name} has no token to predict in {len(batches)} batches: perplexity needs at least one")


def check_ids(model: PreTrainedModel, ids: Tensor, name: str) -> None:
    """Raise an error unless `ids` are token ids that the model embeds.

    Args:
        model: the causal LM.
        ids: `[batch, tokens]`.
        name: name of the ids, for the error.

    Raises:
        ValueError: with shape, type or the id that is out of range.
    """
    if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.dtype not in _INTEGERS:
        given = f"{ids.dtype} {list(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
        raise ValueError(f"{name} must be token ids, torch.int64 [batch, tokens], got {given}")
    rows = unwrap_model(model).get_input_embeddings().num_embeddings
    smallest, largest = (int(end) for end in ids.aminmax()) if ids.numel() else (0, 0)
    if smallest < 0 or largest >= rows:
        raise ValueError(
            f"{name} has the token id {smallest if smallest < 0 else largest}, but the model embeds ids from 0 to "
            f"{rows - 1:,}: tokenise the text with the model's own tokenizer"
        )
