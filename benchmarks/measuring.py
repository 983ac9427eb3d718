"""What the benchmarks of speed share: models of random weights, memory by kind, and words for a machine."""

import copy
import ctypes
import gc
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.pool import Pool
from pathlib import Path
from unittest.mock import patch

import torch
from peers import read_versions
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, PreTrainedModel, Qwen2Config

GEOMETRIES: Mapping[str, PretrainedConfig] = {
    "llama-3-8b": LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        max_position_embeddings=8192,
    ),
    "qwen2.5-7b": Qwen2Config(
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        vocab_size=152064,
        max_position_embeddings=32768,
    ),
    "tiny": LlamaConfig(
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=256,
    ),
}
"""Shapes of models by name; `tiny` is for tests."""

MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(2**16), "MALLOC_TRIM_THRESHOLD_": str(2**16)}
"""Environment of a process whose memory is measured: glibc then gives back at once what is freed, so that the process
has what it uses. Else it keeps what is freed of matrices below 32 MiB, and gaps between them."""


def make_model(config: PretrainedConfig, dtype: torch.dtype, device: str) -> PreTrainedModel:
    """A model of random weights, made where it stays."""
    torch.manual_seed(0)
    with torch.device(device):
        own = copy.deepcopy(config)  # pruning changes it
        return AutoModelForCausalLM.from_config(own, dtype=dtype).eval()


def make_tokens(config: PretrainedConfig, windows: int, length: int) -> Tensor:
    """Random token ids `[windows, length]`, the same every time."""
    return torch.randint(config.vocab_size, (windows, length), generator=torch.Generator().manual_seed(0))


@contextmanager
def start_processes(count: int) -> Iterator[Pool]:
    """Processes whose memory is to be measured: they have from their start what glibc reads then."""
    with patch.dict(os.environ, MALLOC), get_context("spawn").Pool(count) as pool:
        yield pool


def read_memory() -> dict[str, int]:
    """Bytes of this process in memory now: its own (`RssAnon`), pages of mapped files (`RssFile`), all (`Rss`)."""
    lines = [line.split() for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("Rss")]
    kinds = {name.rstrip(":"): int(size) * 1024 for name, size, _ in lines}
    return kinds | {"Rss": sum(kinds.values())}


@contextmanager
def watch_memory() -> Iterator[dict[str, int]]:
    """How much each kind grows at most while the context lasts, looked at 200 times a second; there at its end."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before, growth, done = read_memory(), {}, threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            for name, size in read_memory().items():
                growth[name] = max(growth.get(name, 0), size - before[name])

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield growth
    finally:
        done.set()
        watcher.join()


def describe_machine(device: str) -> str:
    """What was measured on, in words."""
    versions = read_versions(["torch", "transformers"])
    cores, threads = os.cpu_count(), torch.get_num_threads()
    place = f"{cores} CPU cores, {threads} thread" + ("s" if threads > 1 else ", seconds of the processor")
    if device == "cuda":
        place = f"one {torch.cuda.get_device_name()}"
    return f"{place}; torch {versions['torch']}, transformers {versions['transformers']}"
