"""Stops runs of two ranks by SIGTERM at random moments and resumes them; counts those that end in time, and bitwise.

    python benchmarks/stops.py --tries 10

Under DDP and FSDP2 the signal goes to the launcher, which is rank 0, or to the other rank: so many tries of each of the
four. A try counts if all its processes are gone within 15 seconds, with exit code 143, and if the same command then
gives every bit of the weights, and the numbers of the report, of a run that nobody stopped.
"""

import argparse
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests"))

from ranks import STRATEGIES, Run, make_folder, read_results  # noqa: E402

LIMIT = 15.0
"""Seconds that all processes have to end."""
PATIENCE = 600.0
"""Seconds for a whole run."""


@dataclass(frozen=True)
class Try:
    """A run that was stopped.

    Args:
        strategy: name of it.
        rank: that the signal went to.
        moment: seconds after the start.
        took: seconds until all processes were gone.
        codes: exit codes of the ranks.
        place: what the resumed run said that it went on from.
        is_same: whether that gave what a whole run gives.
    """

    strategy: str
    rank: int
    moment: float
    took: float
    codes: tuple[int | None, int | None]
    place: str
    is_same: bool

    @property
    def is_good(self) -> bool:
        """Whether it did what a stop has to do; rank 1 may not have been there yet."""
        codes = {code for code in self.codes if code is not None}
        return self.took <= LIMIT and codes == {128 + signal.SIGTERM} and self.is_same


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the tries; the exit code is 1 if one is not good."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tries", type=int, default=10, help="of each strategy and rank")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    options = parser.parse_args(arguments)
    moments = random.Random(options.seed)
    tries = []
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        whole = {strategy: run_to_end(root / strategy, strategy) for strategy in STRATEGIES}
        for number, (strategy, rank) in product(range(options.tries), product(STRATEGIES, (0, 1))):
            seconds, results = whole[strategy]
            folder = root / f"{strategy}-{rank}-{number}"
            tries.append(stop_and_resume(folder, strategy, rank, moments.uniform(0, seconds), results))
            print(tries[-1], flush=True)
    for strategy, rank in product(STRATEGIES, (0, 1)):
        own = [one for one in tries if (one.strategy, one.rank) == (strategy, rank)]
        good = sum(one.is_good for one in own)
        print(f"{strategy}, rank {rank}: {good} of {len(own)}; slowest {max(one.took for one in own):.1f} s")
    return 0 if all(one.is_good for one in tries) else 1


def run_to_end(folder: Path, strategy: str) -> tuple[float, dict[str, Any]]:
    """Run the command without a stop; seconds that it took and what it made."""
    if not folder.exists():
        make_folder(folder)
    run = Run(folder, "fit", *STRATEGIES[strategy])
    seconds = run.wait(PATIENCE)
    if run.codes != (0, 0):
        raise RuntimeError(f"the run ended with {run.codes}: {run.output[-2000:]}")
    return seconds, read_results(folder)


def stop_and_resume(folder: Path, strategy: str, rank: int, moment: float, whole: dict[str, Any]) -> Try:
    """Stop a run at a moment and resume it; one that has ended by then is stopped a tenth sooner."""
    while True:
        make_folder(folder)
        run = Run(folder, "fit", *STRATEGIES[strategy])
        time.sleep(moment)
        if run.is_alive() and run.process.exitcode is None:
            break
        run.wait(PATIENCE)
        shutil.rmtree(folder)
        moment *= 0.9
    run.send(signal.SIGTERM, rank)
    took = run.wait(PATIENCE)
    codes = run.codes
    (folder / "output").rename(folder / "output of the stopped run")
    try:
        _, results = run_to_end(folder, strategy)
    except RuntimeError as error:
        return Try(strategy, rank, moment, took, codes, str(error), False)
    place = run.output.partition(", from ")[2].split()[:1]
    shutil.rmtree(folder)
    return Try(strategy, rank, moment, took, codes, Path(*place).name, results == whole)


if __name__ == "__main__":
    sys.exit(main())
