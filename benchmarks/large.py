"""Models of 7B and 8B parameters at several rates of all parameters, beside what is published. Needs a GPU and the hub.

    python benchmarks/large.py --folder benchmarks/large_rows --resume

Each row is a JSON file: perplexity on WikiText-2's test split in windows of 2,048 tokens, the seven zero-shot tasks
through lm-eval (`pip install 'gqaprune[eval]'`), and the mean of the five that most papers report. Nothing is trained.
The table puts what others have published beside rows that are there; it has no value of ours that was not measured.
"""

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from peers import read_versions
from quality_report import format_table

import gqaprune
from gqaprune.commands.tasks import Tasks
from gqaprune.common.atomic_files import write_atomically
from gqaprune.data.calibration import CalibrationSet
from gqaprune.datamodules import TextDataModule
from gqaprune.evaluation.perplexity import measure_perplexity
from gqaprune.models.architecture import count_parameters

HERE = Path(__file__).parent
MODELS = ("meta-llama/Llama-3.1-8B", "Qwen/Qwen2.5-7B", "mistralai/Mistral-7B-v0.3")
FIVE = ("arc_easy", "arc_challenge", "hellaswag", "piqa", "winogrande")
"""Zero-shot tasks whose mean most papers report."""
SEVEN = (*FIVE, "boolq", "openbookqa")
Row = dict[str, Any]


@dataclass(frozen=True)
class Published:
    """What a row has to beat.

    Args:
        model: what the model's name ends with.
        rates: of all parameters, the lowest and the highest that it is about.
        measure: `perplexity` or `five tasks`.
        value: published.
        source: whose it is, how sure that is: R read in the paper or its authors' README, T second hand, U unreliable.
    """

    model: str
    rates: tuple[float, float]
    measure: str
    value: float
    source: str


PUBLISHED = (
    Published("Llama-3.1-8B", (0.15, 0.15), "five tasks", 72.4, "MoDeGPT, R"),
    Published("Llama-3.1-8B", (0.25, 0.25), "five tasks", 67.0, "UniQL, R"),
    Published("Llama-3.1-8B", (0.2, 0.2), "perplexity", 7.3, "derived"),
    Published("Llama-3.1-8B", (0.25, 0.25), "perplexity", 7.53, "SARATHI, U"),
    Published("Qwen2.5-7B", (0.15, 0.15), "five tasks", 69.1, "UniQL, R"),
    Published("Qwen2.5-7B", (0.25, 0.25), "five tasks", 62.1, "UniQL, R"),
    Published("Mistral-7B-v0.3", (0.25, 0.25), "perplexity", 6.31, "a README, U"),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the rows that are not there, then print the table of all that are."""
    options = parse_arguments(arguments)
    tasks = Tasks(options.tasks, options.limit, options.tasks_folder) if options.tasks else None
    options.folder.mkdir(parents=True, exist_ok=True)
    for model in options.models:
        for rate in [0.0, *options.rates]:
            file = options.folder / f"{model.rstrip('/').replace('/', '--')}@{rate:g}.json"
            settings = describe_settings(model, rate, options)
            if options.resume and file.exists() and json.loads(file.read_text())["settings"] == settings:
                print(f"{file.name}: there")
                continue
            print(f"{file.name}: running", flush=True)
            row = {"settings": settings, **run_row(model, rate, options, tasks)}
            write_atomically(file, (json.dumps(row, indent=1) + "\n").encode())
    print("\n".join(build_table(read_rows(options.folder))))
    return 0


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=lambda text: text.split(","), default=list(MODELS), help="with commas between")
    parser.add_argument(
        "--rates",
        type=lambda text: [float(rate) for rate in text.split(",")],
        default=[0.15, 0.2, 0.25, 0.3],
        help="shares of all parameters to remove",
    )
    parser.add_argument("--calibration", default="wikitext2", help="corpus, never the test text")
    parser.add_argument("--test", default="wikitext2", help="corpus whose test split is measured")
    parser.add_argument("--windows", type=int, default=128, help="calibration windows, and as many sampled ones")
    parser.add_argument("--window", type=int, default=512, help="their tokens")
    parser.add_argument("--test_window", type=int, default=2048)
    parser.add_argument("--tasks", type=lambda text: text.split(",") if text else [], default=list(SEVEN))
    parser.add_argument("--tasks_folder", help="folder with tasks on local files")
    parser.add_argument("--limit", type=int, help="documents of each task at most")
    parser.add_argument("--settings", type=json.loads, default={}, help="fields of PruningConfig, as JSON")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--folder", type=Path, default=HERE / "large_rows", help="where rows are kept")
    parser.add_argument("--resume", action="store_true", help="skip rows that are there with the same settings")
    return parser.parse_args(arguments)


def describe_settings(model: str, rate: float, options: argparse.Namespace) -> dict[str, Any]:
    """What a row depends on; the dense one on no calibration."""
    names = ("test", "test_window", "tasks", "limit", "dtype")
    if rate:
        names += ("calibration", "windows", "window", "settings")
    versions = read_versions(["torch", "transformers", "lm_eval"] if options.tasks else ["torch", "transformers"])
    return {"model": model, "rate": rate, **{name: getattr(options, name) for name in names}, "versions": versions}


def run_row(source: str, rate: float, options: argparse.Namespace, tasks: Tasks | None) -> Row:
    """Prune a model at a rate of all parameters, and measure it."""
    model, tokenizer = gqaprune.load(source, dtype=options.dtype)
    model = model.to(options.device)
    data = TextDataModule(
        source,
        calibration={
            "corpora": [options.calibration],
            "windows": options.windows,
            "sampled_windows": options.windows,
            "window": options.window,
            "batch_size": 2,
        },
        evaluation={"val": [], "test": [options.test], "window": options.test_window, "batch_size": 1},
    )
    dense_parameters, start = count_parameters(model), time.perf_counter()
    if rate:
        config = gqaprune.PruningConfig(rate=rate, rate_base="all", **options.settings)
        gqaprune.prune(model, CalibrationSet(data.calibration_batches(model), source=source), config)
    seconds = time.perf_counter() - start
    perplexity = measure_perplexity(model, data.evaluation_batches(("test",)), "test")
    scores = {} if tasks is None else tasks.run(model, tokenizer)
    return {
        "perplexity": next(iter(perplexity.values())),
        "tasks": {name: dataclasses.asdict(score) for name, score in scores.items()},
        "removed": 1 - count_parameters(model) / dense_parameters,
        "seconds": seconds,
        "device": torch.cuda.get_device_name() if model.device.type == "cuda" else "cpu",
    }


def read_rows(folder: Path) -> list[Row]:
    """All rows there, by model and rate."""
    rows = [json.loads(file.read_text()) for file in folder.glob("*.json")]
    return sorted(rows, key=lambda row: (row["settings"]["model"], row["settings"]["rate"]))


def average_five(row: Mapping[str, Any]) -> float | None:
    """Mean accuracy of the five tasks in per cent, length-normalised where there is one; None if one is missing."""
    values = []
    for task in FIVE:
        found = [row["tasks"][name]["value"] for name in (f"{task} acc_norm", f"{task} acc") if name in row["tasks"]]
        if not found:
            return None
        values.append(found[0])
    return 100 * mean(values)


def build_table(rows: Sequence[Row]) -> list[str]:
    """Markdown: rows as measured, and what is published for the same model and rate."""
    lines = []
    for row in rows:
        settings, five = row["settings"], average_five(row)
        known = [
            f"{own.measure} {own.value:g} ({own.source})"
            for own in PUBLISHED
            if settings["model"].endswith(own.model) and own.rates[0] <= settings["rate"] <= own.rates[1]
        ]
        lines.append(
            [
                settings["model"],
                f"{row['removed']:.1%}" if settings["rate"] else "dense",
                f"{row['perplexity']:.2f}",
                "" if five is None else f"{five:.1f}",
                f"{row['seconds']:.0f} s" if settings["rate"] else "",
                row["device"],
                "; ".join(known),
            ]
        )
    window = rows[0]["settings"]["test_window"] if rows else 2048
    header = ["model", "removed", f"perplexity @{window:,}", "five tasks, %", "pruning", "on", "published, to beat"]
    return format_table(header, lines)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ValueError as error:
        sys.exit(str(error))
