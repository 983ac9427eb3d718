"""Change files that commands read, at random, and see that each ends well or in one sentence, soon.

    python tests/fuzz --seconds 120                     # all targets, in turn
    python tests/fuzz --only GGUF --seed 7 --seconds 600
    python tests/fuzz --only GGUF --case 31             # one case again, its folder kept

Each case runs in a process of its own, with limits on time and memory. A case is a failure where it raises, hangs, is
killed, says no sentence or several, writes control characters or leaves another result than an undisturbed run.
"""

import argparse
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from random import Random

os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}  # before torch and transformers read them
sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from isolated import run_isolated
from judging import judge
from targets import TARGETS, run

from gqaprune.common.cpu import avoid_illegal_instructions

SECONDS = 60.0
"""Of the clock that a case may take; a busy machine is allowed for."""
MEMORY = 4 * 2**30
"""Bytes that a case may take beyond what the process has."""


def try_case(name: str, seed: int, case: int, original: Path, folder: Path) -> tuple[str, str | None]:
    """Run a case in a new folder. Returns what was changed and what is wrong, or null."""
    target, random = TARGETS[name], Random(f"{seed} {name} {case}")
    shutil.copytree(original, folder)
    changed = target.change(folder, random)
    command = random.choice(target.commands)
    outcome = run_isolated(lambda: run(command), folder, SECONDS, MEMORY)
    (folder / "output.txt").write_text(outcome.output, encoding="utf-8", errors="replace")
    return f"{command[0]} after a change of {changed[:60]!r}", judge(outcome) or (
        target.complain(folder) if outcome.code == 0 else None
    )


def fuzz(names: list[str], seconds: float, seed: int, only_case: int | None) -> int:
    """Try cases of each target in turn until the time is over. Returns how many failed."""
    failures = tried = case = 0
    with tempfile.TemporaryDirectory(prefix="fuzz-") as root:
        for name in names:
            folder = Path(root) / name
            folder.mkdir()
            outcome = run_isolated(lambda made=folder, one=name: TARGETS[one].prepare(made) or 0, folder, 600, 2**36)
            if outcome.code != 0:
                raise SystemExit(f"{name} cannot be prepared: {outcome.output}")
        end = time.monotonic() + seconds
        counts = dict.fromkeys(names, 0)
        while only_case is not None or time.monotonic() < end:
            case = only_case if only_case is not None else case
            for name in names:
                folder = Path(root) / f"{name} {case}"
                what, wrong = try_case(name, seed, case, Path(root) / name, folder)
                tried, counts[name] = tried + 1, counts[name] + 1
                if wrong is not None:
                    failures += 1
                    kept = Path(tempfile.mkdtemp(prefix="fuzz-failure-"))
                    shutil.copytree(folder, kept, dirs_exist_ok=True)
                    print(f"{name} --seed {seed} --case {case}: {what}: {wrong}\n    kept in {kept}", flush=True)
                shutil.rmtree(folder)
            if only_case is not None:
                break
            case += 1
    print(f"{tried} cases, {failures} failures: " + ", ".join(f"{name} {count}" for name, count in counts.items()))
    return failures


def main() -> int:
    """Run the fuzzers. Returns the exit code: 1 where a case failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=120, help="to go on for")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=list(TARGETS), action="append", help="a target; may be given several times")
    parser.add_argument("--case", type=int, help="one case alone")
    settings = parser.parse_args()
    avoid_illegal_instructions()
    torch.set_num_threads(1)
    return int(fuzz(settings.only or list(TARGETS), settings.seconds, settings.seed, settings.case) > 0)


if __name__ == "__main__":
    sys.exit(main())
