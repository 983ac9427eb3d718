"""Text that a model writes itself, as token windows to calibrate on: no corpus, and every kind of text it knows.

Axes in tensor names: B samples, T tokens, V vocabulary.
"""

import hashlib
import math
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from gqaprune.common.atomic_files import write_atomically
from gqaprune.common.cache_folder import find_cache_folder
from gqaprune.common.console import console, track
from gqaprune.common.distributed import get_rank_and_world_size, is_true_anywhere, sum_across_ranks
from gqaprune.common.errors import first_line
from gqaprune.common.precision import multiply_exactly
from gqaprune.data.prompts import encode_beginning
from gqaprune.models.architecture import check_context
from gqaprune.models.gates import freeze_parameters
from gqaprune.models.tokenizer import find_bos
from gqaprune.placement.model_hash import hash_model

CACHE_FOLDER = find_cache_folder("samples")
"""Where sampled documents are kept, a safetensors file per batch, model and settings."""

BATCH = 64
"""Documents that are sampled side by side."""
_SCHEME = 2
"""Raised where the same settings come to write other text, so that what was kept before is not read back."""


@multiply_exactly()
def sample_from_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    window: int = 512,
    *,
    document: int = 256,
    prompts: Sequence[str] = (),
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int = BATCH,
    cache: Path | None = CACHE_FOLDER,
    bos: bool | None = None,
) -> Tensor:
    """Sample windows from a model; batches of documents that the cache has, also of a killed run, are read back.

    In a process group every rank has to call it, and samples its share of the batches.

    Windows are packed from documents that are sampled side by side: many short ones cover more than few long ones. An
    end-of-text token does not end a document: the model goes on with another one, as in packed training text.

    Args:
        model: the dense causal LM.
        tokenizer: its tokenizer.
        count: windows.
        window: tokens per window.
        document: tokens per document, the prompt included; at most the window.
        prompts: beginnings, used in turn; the beginning-of-text token without any.
        temperature: divides the logits; above 0.
        top_p: samples from the likeliest tokens that together have this probability, above 0 to 1.
        seed: same seed, same model and settings: same windows.
        batch_size: documents sampled side by side.
        cache: folder of sampled documents; None keeps nothing.
        bos: whether every document, and so every window, begins with the beginning-of-text token; None does as the
            model's family does. A document is then cut off at its window's end.

    Returns:
        Token ids, int64 `[count, window]`, on the CPU.

    Raises:
        ValueError: if a setting is out of its bounds, a prompt fills a document, or the model's logits are not finite.
    """
    if count < 1 or window < 2 or batch_size < 1:
        raise ValueError(f"sampling needs count >= 1 and window >= 2, got count {count}, window {window}")
    if temperature <= 0 or not 0 < top_p <= 1:
        raise ValueError(
            f"sampling needs temperature > 0 and 0 < top_p <= 1, got temperature {temperature}, top_p {top_p}; "
            "1.0 and 1.0 sample what the model believes"
        )
    document = min(document, window)
    if document < 2:
        raise ValueError(f"sampling needs document >= 2, got {document}; 256 does")
    check_context(model.config, document, "document")
    starts = _tokenize_prompts(tokenizer, prompts, document, bos)
    # Windows that are to begin with a document hold whole numbers of them.
    packed = count * window if find_bos(tokenizer, bos) is None else count * math.ceil(window / document) * document
    documents_NT = torch.zeros(math.ceil(packed / document), document, dtype=torch.long)
    own_starts = [starts[index % len(starts)] for index in range(len(documents_NT))]
    batches = [
        _Batch(own_starts[first : first + batch_size], document, temperature, top_p, f"{seed} {first}")
        for first in range(0, len(documents_NT), batch_size)
    ]
    rank, world_size = get_rank_and_world_size()
    device, error = next(model.parameters()).device, None
    try:
        written = _write_batches(model, batches[rank::world_size], cache)
        for documents_BT, own_BT in zip(documents_NT.split(batch_size)[rank::world_size], written, strict=True):
            documents_BT.copy_(own_BT)
    except ValueError as overflow:
        error = overflow
    if is_true_anywhere(error is not None, device):
        raise error or ValueError("sampling text from the model failed on another rank, which says why")
    documents_NT = sum_across_ranks({"documents": documents_NT.to(device)})["documents"].cpu()
    return documents_NT.flatten()[:packed].view(count, -1)[:, :window].contiguous()


@dataclass(frozen=True)
class _Batch:
    """Documents that are sampled side by side: their first tokens, and what the others depend on besides the model.

    The seed is the batch's own, so that it does not matter which rank samples it, or after which others.
    """

    starts: Sequence[Sequence[int]]
    length: int
    temperature: float
    top_p: float
    seed: str


def _write_batches(model: PreTrainedModel, batches: Sequence[_Batch], cache: Path | None) -> list[Tensor]:
    """The documents of each batch, `[batch, length]`: read from the cache, or sampled and kept there one by one."""
    key = "" if cache is None else hash_model(model, [_SCHEME])
    names = [hashlib.sha256(f"{key} {batch}".encode()).hexdigest()[:32] for batch in batches]
    paths = [None if cache is None else cache / f"{name}.safetensors" for name in names]
    written = {index: kept for index, path in enumerate(paths) if (kept := _read_cache(path)) is not None}
    if left := [index for index in range(len(batches)) if index not in written]:
        positions = [position for index in left for position in range(batches[index].length - 1)]
        steps = track(positions, "sampling text from the model", "steps")
        with freeze_parameters(model), closing(steps):
            model.eval()  # layers that recompute activations, too: those forget keys and values
            for index in left:
                written[index] = _sample(model, batches[index], steps)
                _write_cache(paths[index], written[index])
            next(steps, None)  # the bar's end
    return [written[index] for index in range(len(batches))]


def _read_cache(path: Path | None) -> Tensor | None:
    try:
        return None if path is None else load_file(path)["documents"]
    except (OSError, SafetensorError, KeyError):
        return None


def _write_cache(path: Path | None, documents_BT: Tensor) -> None:
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, save({"documents": documents_BT}))
    except OSError as error:  # what was sampled serves all the same
        console.print(f"sampled text is not kept: {first_line(error)}")


def _tokenize_prompts(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], length: int, bos: bool | None
) -> list[list[int]]:
    if not prompts:
        first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        if first is None:
            raise ValueError("the tokenizer has no beginning-of-text token: give prompts to sample from the model")
        return [[first]]
    starts = [encode_beginning(tokenizer, prompt, bos) for prompt in prompts]
    for prompt, start in zip(prompts, starts, strict=True):
        if not 0 < len(start) < length:
            raise ValueError(
                f"prompt {prompt!r} has {len(start)} tokens, a document of {length} needs 1 … {length - 1}"
            )
    return starts


@torch.inference_mode()
def _sample(model: PreTrainedModel, batch: _Batch, positions: Iterator[int]) -> Tensor:
    """Fill documents from their starts, token by token, `[batch, length]`; takes as many positions as it fills."""
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(batch.seed.encode()).digest()[:8]))
    ids_BT = torch.zeros(len(batch.starts), batch.length, dtype=torch.long)
    given_BT = torch.zeros_like(ids_BT, dtype=torch.bool)
    for row, start in enumerate(batch.starts):
        ids_BT[row, : len(start)] = torch.tensor(start)
        given_BT[row, : len(start)] = True
    cache = DynamicCache(config=model.config)
    for position in islice(positions, batch.length - 1):
        step_B1 = ids_BT[:, position : position + 1].to(device)
        logits_BV = model(input_ids=step_B1, past_key_values=cache, use_cache=True).logits[:, -1].float().cpu()
        if not torch.isfinite(logits_BV).all():
            raise ValueError(
                f"the model's logits are not finite at token {position} of sampled text: its activations overflow (it "
                f"computes in {model.dtype}); load it with dtype bfloat16 or float32"
            )
        sampled_B = _draw(logits_BV / batch.temperature, batch.top_p, generator)
        following = position + 1
        ids_BT[:, following] = torch.where(given_BT[:, following], ids_BT[:, following], sampled_B)
    return ids_BT


def _draw(logits_BV: Tensor, top_p: float, generator: torch.Generator) -> Tensor:
    """One token per sample from the smallest set of tokens with probability `top_p` (Holtzman et al. 2020)."""
    probabilities_BV = logits_BV.softmax(-1)
    if top_p < 1:
        sorted_BV, order_BV = probabilities_BV.sort(descending=True)
        sorted_BV[sorted_BV.cumsum(-1) - sorted_BV >= top_p] = 0
        probabilities_BV = torch.zeros_like(probabilities_BV).scatter_(1, order_BV, sorted_BV)
    return torch.multinomial(probabilities_BV, 1, generator=generator)[:, 0]
