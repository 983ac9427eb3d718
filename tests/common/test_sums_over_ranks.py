"""Sums over ranks: the same bits on every rank, and no more bytes than they take."""

import multiprocessing
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from gqaprune.common.distributed import copy_from_first_rank, sum_across_ranks

RANKS = 3
SIZES = (1, 2, 7, 1000, 100_003)


def add_on(rank: int, folder: Path, queue: Any) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    generator = torch.Generator().manual_seed(rank)
    values = [torch.randn(size, dtype=torch.float64, generator=generator) for size in SIZES]
    sums = [sum_across_ranks({"sum": value})["sum"].tolist() for value in values]
    first = torch.full((4, 2), float(rank), dtype=torch.bfloat16).T
    copy_from_first_rank(first)
    queue.put((sums, first.tolist()))
    dist.barrier()
    dist.destroy_process_group()


def test_all_ranks_get_the_same_bits_of_a_sum_and_the_first_ones_weights(tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["gqaprune.pipeline"])
    queue = context.Queue()
    processes = [context.Process(target=add_on, args=(rank, tmp_path, queue)) for rank in range(RANKS)]
    for process in processes:
        process.start()
    found = [queue.get(timeout=600) for _ in processes]
    for process in processes:
        process.join()
    values = [torch.Generator().manual_seed(rank) for rank in range(RANKS)]
    expected = [sum(torch.randn(size, dtype=torch.float64, generator=one) for one in values) for size in SIZES]
    for sums, first in found:
        assert sums == found[0][0]
        assert all(torch.allclose(torch.tensor(own).double(), total) for own, total in zip(sums, expected, strict=True))
        assert first == [[0.0] * 4] * 2
