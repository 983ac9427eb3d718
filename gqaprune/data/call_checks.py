"""What a library call is given, checked once at its door: a model that can be worked on, and token ids it can read."""

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
"""Types of ids that an embedding takes."""


def check_model(model: object) -> None:
    """Refuse what is not a causal LM itself, whole and with values, on one device; or sharded by what is known here.

    Raises:
        ValueError: with what to give instead.
    """
    name = type(model).__name__
    if isinstance(model, OptimizedModule):
        raise ValueError("the model is compiled: give the one that torch.compile was given, model._orig_mod")
    if isinstance(model, (DistributedDataParallel, DataParallel)):
        raise ValueError(f"the model is wrapped in {name}: give the one in it, model.module")
    if isinstance(model, PeftModel):
        check_no_adapters(model)
    inner = model.module if isinstance(model, FullyShardedDataParallel) else model
    if not isinstance(inner, PreTrainedModel) or inner.get_output_embeddings() is None:
        raise ValueError(f"the model must be a causal LM of transformers, such as load_model returns, got {name}")
    if isinstance(model, FullyShardedDataParallel) or is_sharded(inner) or not find_store(inner).is_in_memory:
        return
    devices = sorted({str(parameter.device) for parameter in inner.parameters()})
    if "meta" in devices:
        raise ValueError("the model's weights have no values (they are on the meta device): load it, by load_model")
    if len(devices) > 1:
        raise ValueError(
            f"the model is spread over {', '.join(devices)}: load it without device_map and move it to one device, or "
            "use load_offloaded_model or load_sharded_model"
        )
    if any(parameter.is_inference() for parameter in inner.parameters()):
        raise ValueError("the model was made under torch.inference_mode, which forbids gradients: load it outside")


def list_items(items: Iterable[T], name: str) -> Sequence[T]:
    """What can be gone through more than once: a list as it is, what a generator yields in a list.

    Raises:
        ValueError: if it is nothing to go through.
    """
    if not isinstance(items, Iterable) or isinstance(items, (str, Mapping)):
        raise ValueError(f"{name} must be a list of batches, got {type(items).__name__}")
    return items if isinstance(items, Sequence) else list(items)


def list_corpora(corpora: Mapping[str, Iterable[T]]) -> dict[str, Sequence[T]]:
    """The same of every corpus, by its name.

    Raises:
        ValueError: if they have no names, or one is nothing to go through.
    """
    if not isinstance(corpora, Mapping):
        raise ValueError(f"corpora must be lists of batches by their names, got {type(corpora).__name__}")
    return {name: list_items(batches, name) for name, batches in corpora.items()}


def check_windows(model: PreTrainedModel, batches: Sequence[Tensor], name: str) -> None:
    """Refuse batches of windows that a model cannot read, or that hold nothing to predict.

    Args:
        model: the causal LM.
        batches: token ids, each `[batch, tokens]`.
        name: what they are, in an error.

    Raises:
        ValueError: with the first batch that is not as it should be.
    """
    for index, batch in enumerate(batches):
        check_ids(model, batch, f"batch {index} of {name}")
        if len(batch) < 1 or batch.shape[1] < 2:
            raise ValueError(
                f"batch {index} of {name} has {batch.shape[0]} windows of {batch.shape[1]} tokens: give at least 1 "
                "window of 2 tokens, as nothing predicts the first"
            )
        check_context(unwrap_model(model).config, batch.shape[1], f"a window of {name}")


def check_evaluation(model: PreTrainedModel, batches: Sequence[Mapping[str, Tensor]], name: str) -> None:
    """Refuse batches that a perplexity cannot be measured on.

    Args:
        model: the causal LM.
        batches: each with `input_ids` and `labels`, `[batch, tokens]`.
        name: of the corpus.

    Raises:
        ValueError: with the first batch that is not as it should be, or if no token has a label.
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
                f"batch {index} of {name} has labels {list(labels.shape)} for input_ids {list(ids.shape)}: one each"
            )
        check_ids(model, labels.where(labels != IGNORED, 0), f"batch {index} of {name}, labels,")
    if not any((batch["labels"][:, 1:] != IGNORED).any() for batch in batches):
        raise ValueError(f"{name} has no token to predict in {len(batches)} batches: perplexity needs at least one")


def check_ids(model: PreTrainedModel, ids: Tensor, name: str) -> None:
    """Refuse what is not token ids that a model embeds.

    Args:
        model: the causal LM.
        ids: `[batch, tokens]`.
        name: what they are, in an error.

    Raises:
        ValueError: with shape, type or the id that is out of range.
    """
    if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.dtype not in _INTEGERS:
        found = f"{ids.dtype} {list(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
        raise ValueError(f"{name} must be token ids, torch.int64 [batch, tokens], got {found}")
    rows = unwrap_model(model).get_input_embeddings().num_embeddings
    smallest, largest = (int(end) for end in ids.aminmax()) if ids.numel() else (0, 0)
    if smallest < 0 or largest >= rows:
        raise ValueError(
            f"{name} has the token id {smallest if smallest < 0 else largest}, the model embeds ids from 0 to "
            f"{rows - 1:,}: tokenise the text with the model's own tokenizer"
        )
