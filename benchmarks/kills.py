"""Kills a run of the demo at random moments and goes on, until it ends; compares its files with those of a whole run.

    python benchmarks/kills.py --kills 20

The run is `make demo`'s with less text, on SmolLM2-135M, with a checkpoint after every fourth step. Each trial is
killed (SIGKILL) once, at a moment drawn from the length of the whole run, and begun again by the same command. It has
to give what the whole run gave: plan, report, and every bit of the weights.
"""

import argparse
import json
import math
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from quality_report import format_table, splice

HERE = Path(__file__).parent
COMMAND = [
    sys.executable, str(HERE.parent / "cli.py"), "fit", "--config", str(HERE.parent / "configs" / "demo.yaml"),
    "--data.calibration.windows", "4", "--data.calibration.window", "128", "--pruning.repair.epochs", "1",
    "--data.training.window", "64", "--data.evaluation.window", "128", "--data.evaluation.tokens", "1024",
    "--trainer.limit_train_batches", "16", "--trainer.enable_checkpointing", "true",
    "--trainer.val_check_interval", "4", "--pruning.scheduling", "{0: 1}",
]  # fmt: skip
STAGES = {
    "dense: ": "perplexity of the dense model",
    "calibration: fisher": "scores of fisher",
    "calibration: obs": "scores of obs",
    "repair: blocks": "repair",
    "pruned: ": "perplexity of the pruned model",
    "GQA ratio: ": "all before training",
    "recovered: ": "training",
}
"""What the console says -> what is done then; a progress bar is written to a file once it is full."""
BEGIN, END = "<!-- kills:begin -->", "<!-- kills:end -->"


@dataclass(frozen=True)
class Trial:
    """One run that was killed.

    Args:
        moment: seconds after its start.
        stage: what its console said last to be done.
        there: stages and checkpoints that the second run went on from.
        seconds: of the second run.
        different: its files that are not those of the whole run, and temporary ones that it left.
    """

    moment: float
    stage: str
    there: str
    seconds: float
    different: list[str]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the trials; the exit code is 1 if one differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="how many")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument(
        "--results", type=Path, default=HERE / "results/reliability.md", help="Markdown file for the table"
    )
    options = parser.parse_args(arguments)
    moments = random.Random(options.seed)
    trials = []
    with tempfile.TemporaryDirectory() as root:
        start = time.perf_counter()
        run_to_end(Path(root) / "whole")
        length = time.perf_counter() - start
        whole = read_files(Path(root) / "whole")
        for number in range(options.kills):
            trials.append(kill_and_go_on(Path(root) / str(number), moments.uniform(0, length), whole))
            print(trials[-1], flush=True)
    write_table(trials, length, options.results)
    return 1 if any(trial.different for trial in trials) else 0


def write_table(trials: Sequence[Trial], length: float, path: Path) -> None:
    """Put the trials into results/reliability.md, in the order of their moments."""
    head = ["killed after", "last said to be done", "went on from", "took then", "files that differ"]
    rows = [
        [f"{t.moment:.0f} s", t.stage, t.there, f"{t.seconds:.0f} s", ", ".join(t.different) or "none"]
        for t in sorted(trials, key=lambda trial: trial.moment)
    ]
    same = sum(not trial.different for trial in trials)
    outcome = f"{same} of {len(trials)} killed runs end with its plan, report and weights, bit for bit."
    lines = [
        BEGIN,
        "",
        *format_table(head, rows),
        "",
        f"The whole run takes {length:.0f} s; {outcome}",
        "",
        END,
    ]
    splice(path, "\n".join(lines), BEGIN, END, "Killed runs")


def kill_and_go_on(folder: Path, moment: float, whole: dict[str, bytes]) -> Trial:
    """Kill a run at a moment, begin it again, and compare; a run that has ended by then is killed a tenth sooner."""
    while (said := run(folder, moment)) is None:
        shutil.rmtree(folder)
        moment *= 0.9
    start = time.perf_counter()
    again = run_to_end(folder)
    seconds = time.perf_counter() - start
    files = read_files(folder)
    different = [name for name in sorted(files.keys() | whole.keys()) if files.get(name) != whole.get(name)]
    different += [str(path.relative_to(folder)) for path in folder.rglob("*.tmp")]
    shutil.rmtree(folder)
    return Trial(moment, find_stage(said), find_start(again), seconds, different)


def run(folder: Path, moment: float) -> str | None:
    """Run the command in a folder and kill it at a moment; what it said, None if it ended before."""
    folder.mkdir(exist_ok=True)
    output = folder / "output"
    with output.open("w") as file:
        process = subprocess.Popen(COMMAND, cwd=folder, stdout=file, stderr=subprocess.STDOUT)
        try:
            code = process.wait(None if math.isinf(moment) else moment)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            return output.read_text()
    if code != 0:
        raise RuntimeError(f"the run ended with exit code {code}: {output.read_text()[-2000:]}")
    return None


def run_to_end(folder: Path) -> str:
    """Run the command in a folder; what it said."""
    run(folder, math.inf)
    return (folder / "output").read_text()


def read_files(folder: Path) -> dict[str, bytes]:
    """What a run has made."""
    (checkpoint,) = folder.glob("lightning_logs/version_*/checkpoint")
    report = json.loads((checkpoint.parent / "report.json").read_text())
    files = {path.name: path.read_bytes() for path in checkpoint.iterdir() if path.suffix in (".safetensors", ".json")}
    return files | {"report": json.dumps(report, sort_keys=True).encode()}


def find_stage(output: str) -> str:
    """The last stage that a console says is done."""
    place, stage = max((output.rfind(sign), stage) for sign, stage in STAGES.items())
    return stage if place >= 0 else "nothing"


def find_start(output: str) -> str:
    """What a run that went on found there."""
    lines = [line for line in output.splitlines() if "already done" in line or ", from " in line]
    if any(", from " in line and "ckpt" in line for line in lines):
        return "a checkpoint"
    names = [line.split(":")[0] for line in lines]
    blocks = next((line.split(": ")[1].split(" are")[0] for line in lines if line.startswith("repaired blocks")), "")
    if blocks:
        return f"{blocks} blocks"
    return names[-1] if names else "nothing"


if __name__ == "__main__":
    sys.exit(main())
