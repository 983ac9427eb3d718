"""Seconds and memory of a model that reads a prompt and continues it, and the clock and the mark they are read from."""

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
        decode: seconds for what was generated.
        cache_bytes: size of the cache's tensors in the end.
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
    """Seconds, once a device is done; of the processor where one thread does all, so that other work counts little."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.process_time() if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter()


def has_peak(device: str) -> bool:
    """Whether this machine tells peak memory since a moment: of GPUs always, of processes where Linux keeps a mark."""
    return device == "cuda" or (_CLEAR.exists() and _STATUS.exists())


def start_peak(device: str) -> int:
    """Let go of what is unused and watch peak memory from now on; bytes in use.

    On a GPU those of torch's tensors. Else the whole process's: Linux is asked to begin its mark anew.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's; without it freed weights count on
    if trim is not None:
        trim(0)
    _CLEAR.write_text("5")
    return read_peak(device)


def read_peak(device: str) -> int:
    """Largest number of bytes in use since `start_peak`."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    marks = [line.split() for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:")]
    return int(marks[0][1]) * 1024
