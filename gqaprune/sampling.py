"""Text that a model writes itself, as token windows to calibrate on: no corpus, and every kind of text it knows.

Axes in tensor names: B samples, T tokens, V vocabulary.
"""

import math
import os
from collections.abc import Iterable, Sequence
from contextlib import closing
from itertools import islice
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from gqaprune.distributed import get_rank_and_world_size, is_true_anywhere, sum_across_ranks
from gqaprune.gates import freeze_parameters
from gqaprune.progress import console, track
from gqaprune.replace import write_atomically
from gqaprune.stages import hash_model

CACHE_FOLDER = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gqaprune" / "samples"
"""Where sampled windows are kept, one safetensors file per model and settings."""


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
    batch_size: int = 64,
    cache: Path | None = CACHE_FOLDER,
) -> Tensor:
    """Sample windows from a model; the same ones are read back from the cache the next time.

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
        cache: folder of sampled windows; None keeps nothing.

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
    starts = _tokenize_prompts(tokenizer, prompts, document)
    settings = [count, window, document, starts, temperature, top_p, seed, batch_size]
    path = cache / f"{hash_model(model, settings)}.safetensors" if cache is not None else None
    device = next(model.parameters()).device
    windows_NT, error = torch.zeros(count, window, dtype=torch.long), None
    if get_rank_and_world_size()[0] == 0:
        try:
            windows_NT = _read_cache(path)
        except (OSError, SafetensorError, KeyError):
            try:
                documents = math.ceil(count * window / document)
                documents_NT = _sample(model, starts, documents, document, temperature, top_p, seed, batch_size)
                windows_NT = documents_NT.flatten()[: count * window].view(count, window)
                _write_cache(path, windows_NT)
            except ValueError as overflow:
                error = overflow
    if is_true_anywhere(error is not None, device):
        raise error or ValueError("sampling text from the model failed on rank 0")
    return sum_across_ranks({"windows": windows_NT.to(device)})["windows"].cpu()


def _read_cache(path: Path | None) -> Tensor:
    if path is None:
        raise FileNotFoundError
    return load_file(path)["windows"]


def _write_cache(path: Path | None, windows_NT: Tensor) -> None:
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, save({"windows": windows_NT}))
    except OSError as error:  # what was sampled serves all the same
        console.print(f"sampled text is not kept: {path.parent} cannot be written ({error.strerror})")


def _sample(
    model: PreTrainedModel,
    starts: Sequence[Sequence[int]],
    count: int,
    length: int,
    temperature: float,
    top_p: float,
    seed: int,
    batch_size: int,
) -> Tensor:
    own_starts = [starts[index % len(starts)] for index in range(count)]
    generator = torch.Generator().manual_seed(seed)
    firsts, positions = range(0, count, batch_size), range(length - 1)
    steps = track([position for _ in firsts for position in positions], "sampling text from the model", "steps")
    with freeze_parameters(model), closing(steps):
        documents = [
            _continue(
                model,
                own_starts[first : first + batch_size],
                length,
                islice(steps, len(positions)),
                temperature,
                top_p,
                generator,
            )
            for first in firsts
        ]
        next(steps, None)  # the bar's end
    return torch.cat(documents)


def _tokenize_prompts(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], length: int) -> list[list[int]]:
    if not prompts:
        first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        if first is None:
            raise ValueError("the tokenizer has no beginning-of-text token: give prompts to sample from the model")
        return [[first]]
    starts = [list(tokenizer(prompt)["input_ids"]) for prompt in prompts]
    for prompt, start in zip(prompts, starts, strict=True):
        if not 0 < len(start) < length:
            raise ValueError(
                f"prompt {prompt!r} has {len(start)} tokens, a document of {length} needs 1 … {length - 1}"
            )
    return starts


@torch.inference_mode()
def _continue(
    model: PreTrainedModel,
    starts: Sequence[Sequence[int]],
    length: int,
    positions: Iterable[int],
    temperature: float,
    top_p: float,
    generator: torch.Generator,
) -> Tensor:
    """Fill documents from their starts, token by token, `[batch, length]`."""
    device = next(model.parameters()).device
    ids_BT = torch.zeros(len(starts), length, dtype=torch.long)
    given_BT = torch.zeros_like(ids_BT, dtype=torch.bool)
    for row, start in enumerate(starts):
        ids_BT[row, : len(start)] = torch.tensor(start)
        given_BT[row, : len(start)] = True
    cache = DynamicCache(config=model.config)
    for position in positions:
        step_B1 = ids_BT[:, position : position + 1].to(device)
        logits_BV = model(input_ids=step_B1, past_key_values=cache, use_cache=True).logits[:, -1].float().cpu()
        if not torch.isfinite(logits_BV).all():
            raise ValueError(
                f"the model's logits are not finite at token {position} of sampled text: its activations overflow (it "
                f"computes in {model.dtype}); load it with dtype bfloat16 or float32"
            )
        sampled_B = _draw(logits_BV / temperature, top_p, generator)
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
