"""Memory of scoring, repair and recovery in one process and in each of two, beside the formulas of `gqaprune inspect`.

    python benchmarks/memory.py

A Llama of random weights and random tokens. Every cell is measured in processes of its own, to which the C library
gives and from which it takes memory at once: the most that is in memory, weights included, above what there was before.
Two processes talk by gloo, without a GPU; the table has the larger of both.
"""

import argparse
import copy
import os
import socket
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from measuring import make_model, make_tokens, start_processes, watch_memory
from quality_report import format_table, splice
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.data import DataLoader
from transformers import LlamaConfig, PreTrainedModel

from gqaprune import PruningConfig, load_model, load_sharded_model, prune
from gqaprune.common.console import console
from gqaprune.common.stage_cache import StageCache
from gqaprune.models.architecture import find_blocks
from gqaprune.module import CausalLMModule
from gqaprune.planning.memory import estimate_memory, read_sizes
from gqaprune.scoring.scores import score_units
from gqaprune.surgery.distillation import distill, record_predictions
from gqaprune.surgery.repair_config import RepairConfig
from gqaprune.training.recovery import RecoveryConfig

HERE = Path(__file__).parent
BEGIN, END = "<!-- memory:begin -->", "<!-- memory:end -->"
WORKS = ("scoring", "repair", "repair, distillation", "recovery, full", "recovery, lora", "recovery, distill")
PLACES = ("one device", "ddp", "fsdp", "sharded")
"""As `gqaprune inspect` names them. Scoring and repair are alike under `ddp` and `fsdp`, recovery in both last."""
DEVICES = 2


def list_cells() -> list[tuple[str, str]]:
    """Works and places that differ from each other."""
    cells = [(work, place) for work in WORKS for place in PLACES]
    left_out = [(work, "sharded" if work.startswith("recovery") else "fsdp") for work in WORKS]
    return [cell for cell in cells if cell not in [*left_out, ("repair, distillation", "sharded")]]


def make_shape(options: argparse.Namespace) -> LlamaConfig:
    """Three query heads of 64 columns on each KV head."""
    return LlamaConfig(
        hidden_size=options.hidden,
        intermediate_size=options.width,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden // 64,
        num_key_value_heads=options.hidden // 192,
        vocab_size=options.vocabulary,
        max_position_embeddings=options.tokens,
    )


@contextmanager
def join_group(rank: int, port: int, place: str) -> Iterator[None]:
    """What torchrun tells each of its processes, and a process group."""
    if place == "one device":
        yield
        return
    variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0}
    variables |= {"WORLD_SIZE": DEVICES, "LOCAL_WORLD_SIZE": DEVICES, "TORCHELASTIC_RUN_ID": "memory"}
    os.environ.update({name: str(value) for name, value in variables.items()})
    dist.init_process_group("gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def load(folder: str, place: str) -> PreTrainedModel:
    """The model, whole or split. Whole weights are the file, mapped: copies of them are the process's own."""
    if place == "sharded":
        return load_sharded_model(folder, init_device_mesh("cpu", (DEVICES,)))
    return copy.deepcopy(load_model(folder))


def do(work: str, place: str, folder: str, options: argparse.Namespace) -> None:
    """One work, from loading on. Scoring and repair read all tokens, recovery two micro-batches on each process."""
    config = make_shape(options)
    windows = make_tokens(config, options.calibration_tokens // options.tokens, options.tokens)
    if work == "scoring":
        model = load(folder, place)
        score_units(model, find_blocks(model), windows.split(1), "fisher+obs")
    elif work == "repair":
        prune(
            load(folder, place),
            windows.split(1),
            PruningConfig(
                criterion="l2",
                allocation="uniform",
                scoring={"protect_outliers": False},
                repair={"distill_tokens": 0},
            ),
        )
    elif work == "repair, distillation":
        model = load(folder, place)
        predictions = record_predictions(model, windows[:2], windows[2:3], StageCache())
        distill(model, predictions, RepairConfig(products="float32", distill_tokens=2 * options.tokens), 0)
    else:
        mode: Any = work.split(", ")[1]
        strategy: Any = {"one device": "auto", "ddp": "ddp", "fsdp": ModelParallelStrategy(DEVICES, 1)}[place]
        recovery = RecoveryConfig(mode=mode, teacher=folder if mode == "distill" else None)
        batches = [{"input_ids": window, "labels": window} for window in windows[:4].split(1)]
        Trainer(
            accelerator="cpu",
            devices=1 if place == "one device" else DEVICES,
            strategy=strategy,
            max_steps=2,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
        ).fit(CausalLMModule(folder, recovery=recovery), DataLoader(batches, batch_size=None))  # type: ignore[arg-type]


def measure_here(rank: int, port: int, work: str, place: str, folder: str, options: argparse.Namespace) -> int:
    """Bytes in this process."""
    console.quiet = True
    torch.set_num_threads(1)
    with join_group(rank, port, place):
        with watch_memory() as growth:
            do(work, place, folder, options)
        # Training leaves the mapped pages or writes into them; repair puts other weights beside them.
        return growth["Rss" if work.startswith("recovery") else "RssAnon"]


def measure(work: str, place: str, folder: str, options: argparse.Namespace) -> int:
    """Bytes in the process that takes most."""
    count = 1 if place == "one device" else DEVICES
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with start_processes(count) as pool:
        jobs = [pool.apply_async(measure_here, (rank, port, work, place, folder, options)) for rank in range(count)]
        return max(job.get() for job in jobs)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and write the table into results/cost.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=768, help="a multiple of 192")
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--tokens", type=int, default=1024, help="of a micro-batch, one window")
    parser.add_argument("--calibration-tokens", type=int, default=4096)
    parser.add_argument("--works", nargs="+", choices=WORKS, default=WORKS)
    parser.add_argument("--results", type=Path, default=HERE / "results/cost.md")
    options = parser.parse_args(arguments)
    sizes = read_sizes(make_shape(options))
    needed = estimate_memory(sizes, 4, DEVICES, options.tokens, options.calibration_tokens)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        make_model(make_shape(options), torch.float32, "cpu").save_pretrained(folder)
        for work, place in list_cells():
            if work in options.works:
                peak, formula = measure(work, place, folder, options), needed[work][place]
                assert formula is not None
                rows.append([work, place, f"{formula / 2**20:,.0f}", f"{peak / 2**20:,.0f}", f"{peak / formula:.2f}"])
                print(*rows[-1], flush=True)
    lines = [
        f"A random Llama, {sizes.layers} layers, {options.hidden} wide, {options.width} channels, vocabulary "
        f"{options.vocabulary:,}: {sizes.parameters * 4 / 2**20:,.0f} MiB of float32 weights. "
        f"{options.tokens:,} tokens a micro-batch, {options.calibration_tokens:,} of calibration, {DEVICES} processes "
        f"where there are several; torch {torch.__version__}.",
        "",
        *format_table(["work", "place", "formula, MiB", "measured, MiB", "measured / formula"], rows),
    ]
    print("\n".join(lines))
    splice(options.results, "\n".join([BEGIN, "", *lines, "", END]), BEGIN, END, "Memory, by formula and measured")
    return 0


if __name__ == "__main__":
    sys.exit(main())
