"""Seconds of pruning on two OpenMP threads whose waiting threads spin or sleep, on idle and on loaded cores.

    python benchmarks/contention.py

In a process for each, a Llama of random weights is scored, cut, repaired and trained some steps. `import gqaprune` sets
the wait policy where nobody has; with torch imported before it, threads wait as torch's own OpenMP has it. The load is
one process per core that never rests, or another run of the same kind, threads and policy, over and over.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).parent
BEGIN, END = "<!-- contention:begin -->", "<!-- contention:end -->"
WAYS: Mapping[str, tuple[str, int]] = {
    "one thread": ("gqaprune", 1),
    "two threads, torch's wait policy": ("torch", 2),
    "two threads, ours": ("gqaprune", 2),
}
"""Name -> what is imported first, and threads."""
BUSY = "import os; parent = os.getppid()\nwhile os.getppid() == parent: pass"
"""Ends with the process that started it, however that ends."""
PLACES = ("idle", "loaded", "beside another")
Seconds = dict[tuple[str, str], float]
"""By way and place."""


def work(layers: int, steps: int) -> float:
    """Prune and train a small model; seconds."""
    import torch
    from measuring import make_model, make_tokens
    from transformers import LlamaConfig

    import gqaprune
    from gqaprune.common.console import console

    console.quiet = True
    config = LlamaConfig(
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=layers,
        num_attention_heads=6,
        num_key_value_heads=2,
        vocab_size=512,
    )
    model, batches = make_model(config, torch.float32, "cpu"), make_tokens(config, 8, 64).split(1)
    start = time.perf_counter()
    gqaprune.prune(model, batches, gqaprune.PruningConfig(0.2, allocation="uniform", repair={"distill_tokens": 0}))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
    for _ in range(steps):
        model(batches[0], labels=batches[0]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return time.perf_counter() - start


def start(first: str, threads: int, options: argparse.Namespace, *flags: str) -> "subprocess.Popen[str]":
    """Start the work in a process of its own, whose environment says nothing of how threads wait."""
    from gqaprune.common.threads import SETTINGS

    environment = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    path = os.pathsep.join([str(HERE.parent), environment.get("PYTHONPATH", "")])
    environment |= {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": path}
    size = ["--layers", str(options.layers), "--steps", str(options.steps)]
    command = [sys.executable, __file__, "--work", first, *size]
    return subprocess.Popen([*command, *flags], env=environment, stdout=subprocess.PIPE, text=True)


def measure_in_a_process(first: str, threads: int, options: argparse.Namespace) -> float:
    """Seconds of the work."""
    process = start(first, threads, options)
    output, _ = process.communicate()
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, process.args)
    return float(json.loads(output.splitlines()[-1]))


@contextmanager
def load_cores(place: str, first: str, threads: int, options: argparse.Namespace) -> Iterator[None]:
    """Have the machine as a place says."""
    busy: list[subprocess.Popen[Any]] = []
    if place == "loaded":
        busy = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(os.cpu_count() or 1)]
    elif place == "beside another":
        busy = [start(first, threads, options, "--endless")]
        assert busy[0].stdout is not None
        busy[0].stdout.readline()  # it is at work
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


def measure(options: argparse.Namespace) -> Seconds:
    """Medians of turns, each of which tries every way in every place."""
    runs: dict[tuple[str, str], list[float]] = {}
    for turn, place, (way, (first, threads)) in product(range(options.turns), PLACES, WAYS.items()):
        with load_cores(place, first, threads, options):
            runs.setdefault((way, place), []).append(measure_in_a_process(first, threads, options))
        print(f"turn {turn + 1}, {way}, {place}: {runs[way, place][-1]:.2f} s", flush=True)
    return {key: median(seconds) for key, seconds in runs.items()}


def describe(seconds: Seconds, others: float, options: argparse.Namespace) -> str:
    """The table, as Markdown."""
    from peers import read_versions
    from quality_report import format_table

    lines = []
    for way in WAYS:
        ratios = [seconds[way, place] / seconds["one thread", place] for place in PLACES]
        lines.append([way, *(f"{seconds[way, place]:.2f} ({r:.2f}×)" for place, r in zip(PLACES, ratios, strict=True))])
    about = (
        f"Medians of {options.turns} turns, in seconds (times one thread's). Loaded: {os.cpu_count()} processes that "
        f"never rest on {os.cpu_count()} cores. Beside another: one more such run, of the same threads and "
        f"policy. Load average before: {others:.1f}. "
        f"torch {read_versions(['torch'])['torch']}."
    )
    return "\n".join([about, "", *format_table(["", *PLACES], lines)])


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and write the table into results/reliability.md."""
    from quality_report import splice

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--results", type=Path, default=HERE / "results/reliability.md")
    parser.add_argument("--work", choices=["gqaprune", "torch"], help=argparse.SUPPRESS)
    parser.add_argument("--endless", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.work:
        __import__(options.work)
        parent = os.getppid()
        while options.endless and os.getppid() == parent:
            print(json.dumps(work(options.layers, options.steps)), flush=True)
        print(json.dumps(work(options.layers, options.steps)))
        return 0
    others = os.getloadavg()[0]
    table = describe(measure(options), others, options)
    print(table)
    splice(options.results, f"{BEGIN}\n\n{table}\n\n{END}", BEGIN, END, "Two threads on cores that others share")
    return 0


if __name__ == "__main__":
    sys.exit(main())
