"""Sample text from a model as token windows to calibrate on, without a corpus.

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
from torch import Tensor, nn
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
"""Folder of sampled documents, with a safetensors file per batch, model and settings."""


BATCH = 64
"""Documents that are sampled side by side."""
_PIECE = 256
"""Tokens of a piece of the vocabulary."""
_SCHEME = 4
"""Version of the sampling code: increased when the same settings begin to write other text, to ignore old files."""


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
    """Sample windows from a model; batches of documents that are in the cache, also of a killed run, are read from it.

    In a process group every rank must call it, and samples its share of the batches.

    Windows are packed from documents that are sampled side by side; many short ones are more varied than few long ones.
    An end-of-text token does not end a document: the model continues with another text, as in packed training text.

    Args:
        model: the dense causal LM.
        tokenizer: its tokenizer.
        count: number of windows, at least 1.
        window: tokens per window, at least 2.
        document: tokens per document, prompt included; at least 2, and at most the window.
        prompts: beginnings of the documents, used in turn; without any, documents begin with the beginning-of-text
            token.
        temperature: divides the logits; above 0.
        top_p: sample from the likeliest tokens that together have this probability, above 0 to 1.
        seed: the same seed, model and settings sample the same windows.
        batch_size: number of documents sampled side by side.
        cache: folder of sampled documents; None keeps nothing.
        bos: whether every document, and so every window, begins with the beginning-of-text token; None follows the
            model's family. If so, a document is cut off at its window's end.

    Returns:
        Token ids, int64 `[count, window]`, on the CPU.

    Raises:
        ValueError: if a setting is out of its bounds, a prompt fills a document, or the model's logits are not finite.
    """
    if count < 1 or window < 2 or batch_size < 1:
        raise ValueError(
            f"sampling needs count >= 1, window >= 2 and batch_size >= 1, got count {count}, window {window}, "
            f"batch_size {batch_size}"
        )
    if temperature <= 0 or not 0 < top_p <= 1:
        raise ValueError(
            f"sampling needs temperature > 0 and 0 < top_p <= 1, got temperature {temperature}, top_p {top_p}; "
            "try 1.0 and 1.0, which sample from the model's own probabilities"
        )
    document = min(document, window)
    if document < 2:
        raise ValueError(f"sampling needs document >= 2, got {document}; try 256")
    check_context(model.config, document, "document")
    starts = _tokenize_prompts(tokenizer, prompts, document, bos)
    # If every window begins with a document, its length is rounded up to whole documents.
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
        raise error or ValueError("sampling text from the model failed on another rank: see the error of that rank")
    documents_NT = sum_across_ranks({"documents": documents_NT.to(device)})["documents"].cpu()
    return documents_NT.flatten()[:packed].view(count, -1)[:, :window].contiguous()


@dataclass(frozen=True)
class _Batch:
    """Documents that are sampled side by side: their first tokens, and the settings that the others depend on.

    Each batch has its own seed, so that it does not matter which rank samples it, or in which order.
    """

    starts: Sequence[Sequence[int]]
    length: int
    temperature: float
    top_p: float
    seed: str


def _write_batches(model: PreTrainedModel, batches: Sequence[_Batch], cache: Path | None) -> list[Tensor]:
    """Return the documents of each batch, `[batch, length]`, from the cache, or sampled and cached one by one."""
    key = "" if cache is None else hash_model(model, [_SCHEME])
    names = [hashlib.sha256(f"{key} {batch}".encode()).hexdigest()[:32] for batch in batches]
    paths = [None if cache is None else cache / f"{name}.safetensors" for name in names]
    written = {index: kept for index, path in enumerate(paths) if (kept := _read_cache(path)) is not None}
    if left := [index for index in range(len(batches)) if index not in written]:
        positions = [position for index in left for position in range(batches[index].length - 1)]
        steps = track(positions, "sampling text from the model", "steps")
        with freeze_parameters(model), closing(steps):
            model.eval()  # also turns off recomputing activations, which would drop cached keys and values
            for index in left:
                written[index] = _sample(model, batches[index], steps)
                _write_cache(paths[index], written[index])
            next(steps, None)  # ends the progress bar
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
    except OSError as error:  # the sampled text can be used without a cache
        console.print(f"sampled text is not cached and will be sampled again next time: {first_line(error)}")


def _tokenize_prompts(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], length: int, bos: bool | None
) -> list[list[int]]:
    if not prompts:
        first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        if first is None:
            raise ValueError(
                "the tokenizer has no beginning-of-text token to begin sampled text with: set data.sampling.prompts"
            )
        return [[first]]
    starts = [encode_beginning(tokenizer, prompt, bos) for prompt in prompts]
    for prompt, start in zip(prompts, starts, strict=True):
        if not 0 < len(start) < length:
            raise ValueError(
                f"prompt {prompt!r} has {len(start)} tokens, but a document of {length} needs a prompt of 1 to "
                f"{length - 1}: shorten the prompt, or raise data.sampling.document"
            )
    return starts


@torch.inference_mode()
def _sample(model: PreTrainedModel, batch: _Batch, positions: Iterator[int]) -> Tensor:
    """Continue documents from their first tokens, `[batch, length]`; takes one item of `positions` per step."""
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
                f"the model's logits are not finite at token {position} of sampled text, because activations overflow "
                f"in {model.dtype}: load the model with dtype bfloat16 or float32"
            )
        sampled_B = _draw(logits_BV / batch.temperature, batch.top_p, generator)
        following = position + 1
        ids_BT[:, following] = torch.where(given_BT[:, following], ids_BT[:, following], sampled_B)
    return ids_BT


def _draw(logits_BV: Tensor, top_p: float, generator: torch.Generator) -> Tensor:
    """Draw one token per sample from the smallest set of tokens with probability `top_p` (Holtzman et al. 2020).

    This takes one random number per sample and a sum over the vocabulary; `torch.multinomial` draws a number for every
    token, which takes as long as half of a small model's forward pass. Running sums over the whole vocabulary are slow
    as well, so a piece of the vocabulary is drawn first, then a token of it.
    """
    probabilities_BV = logits_BV.softmax(-1)
    if top_p < 1:
        sorted_BV, order_BV = probabilities_BV.sort(descending=True)
        sorted_BV[sorted_BV.cumsum(-1) - sorted_BV >= top_p] = 0
        probabilities_BV = torch.zeros_like(probabilities_BV).scatter_(1, order_BV, sorted_BV)
    padded_BV = nn.functional.pad(probabilities_BV, (0, -probabilities_BV.shape[1] % _PIECE))
    pieces_BPT = padded_BV.unflatten(1, (-1, _PIECE))
    random_B = torch.rand(len(logits_BV), generator=generator, dtype=torch.float64)
    piece_B, rest_B = _invert(pieces_BPT.sum(-1), random_B)
    token_B, _ = _invert(pieces_BPT[torch.arange(len(piece_B)), piece_B], rest_B)
    return piece_B * _PIECE + token_B


def _invert(weights_BN: Tensor, random_B: Tensor) -> tuple[Tensor, Tensor]:
    """Return the entry that a random number in [0, 1) falls on, and where in it, again in [0, 1)."""
    sums_BN = weights_BN.double().cumsum(-1)
    # Below the last sum, never equal to it, so that no entry of weight 0 is drawn.
    last_B = sums_BN[:, -1]
    place_B = torch.minimum(random_B * last_B, last_B.nextafter(torch.zeros_like(last_B)))
    entry_B = torch.searchsorted(sums_BN, place_B[:, None], right=True)[:, 0]
    weight_B = weights_BN.double().gather(1, entry_B[:, None])[:, 0]
    before_B = sums_BN.gather(1, entry_B[:, None])[:, 0] - weight_B
    return entry_B, ((place_B - before_B) / weight_B).clamp_(0.0, 1.0)
