"""Measure the time and peak memory of a model that reads a prompt and continues it."""

import ctypes
import gc
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

_CLEAR = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


@dataclass(frozen=True)
class Run:
    """One prompt read and continued.

    Args:
        prefill: seconds for the prompt.
        decode: seconds for the generated tokens.
        cache_bytes: final size of the cache's tensors.
    """

    prefill: float
    decode: float
    cache_bytes: int


@torch.inference_mode()
def run(model: PreTrainedModel, prompt_BT: Tensor, generated: int) -> Run:
    """Read a prompt and continue it greedily, as `generate` does."""
    device = prompt_BT.device.type
    start = read_clock(device)
    output = model(prompt_BT, use_cache=True, logits_to_keep=1)
    middle = read_clock(device)
    for _ in range(generated):
        token_B1 = output.logits[:, -1:].argmax(-1)
        output = model(token_B1, past_key_values=output.past_key_values, use_cache=True)
    end = read_clock(device)
    cache_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in output.past_key_values.layers)
    return Run(middle - start, end - middle, cache_bytes)


def read_clock(device: str) -> float:
    """Read the clock in seconds, once a device is done; CPU time for a single thread, to exclude other work."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.process_time() if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter()


def has_peak(device: str) -> bool:
    """Return whether this machine reports peak memory from a moment on: on GPUs always, else only on Linux."""
    return device == "cuda" or (_CLEAR.exists() and _STATUS.exists())


def start_peak(device: str) -> int:
    """Free unused memory and reset the peak; return the bytes in use.

    On a GPU these are the bytes of torch's tensors, else of the whole process, whose peak Linux resets.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc; without it freed weights still count
    if trim is not None:
        trim(0)
    _CLEAR.write_text("5")
    return read_peak(device)


def read_peak(device: str) -> int:
    """Return the largest number of bytes in use since `start_peak`."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    marks = [line.split() for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:")]
    return int(marks[0][1]) * 1024
