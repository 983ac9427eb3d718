"""Recovery: what so many tokens give back, by mode, text and learning rate.

    python benchmarks/recovery.py --train valid.txt --test wiki.test.raw --rows 'full*,lora*,dense' --resume
    python benchmarks/recovery.py --train valid.txt --test wiki.test.raw --rows 'sweep*' --resume

The pruned model is that of quality.py's row `default` at 20 %, made once and kept under `--work`. Every row trains in a
process of its own through gqaprune's module, data module and Lightning's Trainer, and is kept as one JSON file with a
key of what it depends on. Rows named `sweep` learn on the first part of the training text and are measured on its last
part and on the embedded text's validation split: they decide the learning rates, and no test text is read for them.
"""

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peers import read_versions
from quality import METHODS, PROTOCOL, hash_corpus, hash_inputs, make_spec, name_tests, select_names, write_row
from recovery_report import PRODUCTS, draw_points, draw_sweep, print_tables, write_markdown

from gqaprune.data.corpora import Corpus
from gqaprune.training.recovery import MODES, RecoveryConfig

HERE = Path(__file__).parent

TRAINING = {
    "tokens": 200_000,
    "window": 512,
    "batch": 2,
    "weight_decay": 0.01,
    "precision": "bf16-mixed",
    "seed": 0,
}
"""How every row trains: AdamW, 5 % warm-up and a cosine to 0, gradients clipped at 1; weights and moments are float32,
unless the row has another `dtype`."""
POINTS = (0, 50_000, 100_000, 200_000)
"""Tokens after which a row is measured; a cosine ends at the last, so that earlier ones are on the way. Sweeps are
measured at their end only; what rows begin with is measured once."""
SWEEP_TOKENS = 50_000
RECIPES: dict[str, dict[str, Any]] = {
    "full": {"mode": "full"},
    "distill": {"mode": "distill"},
    "lora": {"mode": "lora"},
    "lora+distill": {"mode": "lora+distill"},
    "distill, trained teacher": {"mode": "distill", "trains_teacher": True},
}
"""What has a learning rate of its own: the modes, and teaching by a dense model that learned the text first."""
SWEEP_RATES = {
    "full": (5e-6, 1e-5, 2e-5, 5e-5, 1e-4, 2e-4),
    "distill": (5e-6, 1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4),
    "lora": (1e-4, 2e-4, 5e-4, 1e-3, 2e-3),
    "lora+distill": (1e-4, 2e-4, 5e-4, 1e-3, 2e-3),
    "distill, trained teacher": (2e-5, 5e-5, 1e-4, 2e-4, 4e-4),
}
RATES = {"full": 1e-4, "distill": 1e-4, "lora": 5e-4, "lora+distill": 1e-3}
"""Learning rates, as the sweep has them; of those within 0.0003 of the lowest, the smaller."""

OWN_SETTINGS = {"start", "text", "rate", "tokens", "sweep", "dtype", "trains_teacher"}
"""Settings of a row that are not fields of `RecoveryConfig`."""

Row = dict[str, Any]


def list_rows() -> dict[str, dict[str, Any]]:
    """Row name -> what to train on what."""
    rows: dict[str, dict[str, Any]] = {
        "dense": {"mode": "full", "start": "dense"},
        **{name: dict(recipe) for name, recipe in RECIPES.items()},
        "full, bfloat16 weights": {"mode": "full", "dtype": "bfloat16"},
        "full, two rounds": {"mode": "full", "start": "dense", "rounds": 2},
        **{f"{mode}, sampled text": {"mode": mode, "text": "sampled"} for mode in RECIPES if mode in MODES},
        "full, two rounds, sampled text": {"mode": "full", "start": "dense", "rounds": 2, "text": "sampled"},
    }
    for name, rates in SWEEP_RATES.items():
        for rate in rates:
            rows[f"sweep {name} {rate:g}"] = RECIPES[name] | {"rate": rate, "tokens": SWEEP_TOKENS, "sweep": True}
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the selected rows, then draw up tables and figures of all rows that are there."""
    options = parse_arguments(arguments)
    check_rows(list_rows())
    names = select_names(options.rows, list(list_rows()))
    if options.list:
        print("\n".join(f"{name}: {json.dumps(list_rows()[name])}" for name in names))
        return 0
    if not options.table_only:
        if not options.train or not options.test:
            sys.exit("--train FILE and --test FILE are needed to run rows (not for --list and --table-only)")
        if Corpus(options.train, "all").overlaps(Corpus(options.test, "all")):
            sys.exit(f"{options.train} is trained and tested on: give two texts")
        options.folder.mkdir(parents=True, exist_ok=True)
        tests = name_tests(options.test)
        texts = {name: hash_corpus(Corpus(test["corpus"], test["split"])) for name, test in tests.items()}
        texts["train"] = hash_corpus(Corpus(options.train, "all"))
        for name in names:
            run_or_skip(name, options, tests, texts)
    rows = [json.loads(file.read_text()) for file in sorted(options.folder.glob("*.json"))]
    print_tables(rows)
    write_markdown(rows, options.results)
    options.images.mkdir(parents=True, exist_ok=True)
    draw_points(rows, options.images / "recovery.png")
    draw_sweep(rows, options.images / "recovery_sweep.png")
    return 1 if any("error" in row and row["name"] in names for row in rows) else 0


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", metavar="FILE", help="text to calibrate and train on, never a test text")
    parser.add_argument("--test", metavar="FILE", help="test text; the embedded text and Python sources are added")
    parser.add_argument("--rows", default="*", help="names or patterns, with commas between them")
    parser.add_argument("--folder", type=Path, default=HERE / "recovery_rows", help="where rows are kept as JSON")
    parser.add_argument("--work", type=Path, default=HERE / "work", help="where the pruned model is kept")
    parser.add_argument("--model", default="smollm2-135m", help="the dense model")
    parser.add_argument(
        "--results", type=Path, default=HERE / "results/recovery.md", help="Markdown file for the tables"
    )
    parser.add_argument("--images", type=Path, default=HERE.parent / "docs" / "images", help="folder for figures")
    parser.add_argument("--precision", choices=PRODUCTS, default=TRAINING["precision"], help="of Lightning's Trainer")
    parser.add_argument("--resume", action="store_true", help="skip rows that are there with the current key")
    parser.add_argument("--list", action="store_true", help="only list the selected rows")
    parser.add_argument("--table-only", action="store_true", help="only draw up tables and figures of rows there")
    return parser.parse_args(arguments)


def check_rows(rows: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse a row whose settings do not exist, before anything is run.

    Raises:
        ValueError: naming row and setting.
    """
    known = {field.name for field in dataclasses.fields(RecoveryConfig)} | OWN_SETTINGS
    for name, row in rows.items():
        if unknown := row.keys() - known:
            raise ValueError(f"row {name!r}: no setting {sorted(unknown)}; settings are {', '.join(sorted(known))}")
        if row["mode"] not in MODES:
            raise ValueError(f"row {name!r}: no mode {row['mode']!r}; modes are {', '.join(MODES)}")


def choose_points(name: str, row: Mapping[str, Any]) -> list[int]:
    """Tokens after which a row is measured: before any only where no other row begins with the same weights."""
    if row.get("sweep"):
        return [row["tokens"]]
    return list(POINTS if name == "full" or row.get("start") == "dense" else POINTS[1:])


def run_or_skip(name: str, options: argparse.Namespace, tests: Mapping[str, Any], texts: Mapping[str, str]) -> None:
    """Run a row and keep its result, a failure too; skip it if it is to be resumed and there."""
    row = list_rows()[name]
    inputs = {
        "model": options.model,
        "pruning": METHODS["default"],
        "training": TRAINING | {"tokens": row.get("tokens", TRAINING["tokens"]), "precision": options.precision},
        "row": row | {"rate": row.get("rate", RATES.get(name, RATES[row["mode"]]))},
        "protocol": PROTOCOL,
        "texts": dict(texts),
        "versions": read_versions(["torch", "lightning", "transformers", "peft"]),
    }
    key, file = hash_inputs(inputs), options.folder / f"{name}.json"
    if options.resume and file.exists():
        there = json.loads(file.read_text())
        if there["key"] == key and "error" not in there:
            print(f"{name}: there")
            return
    print(f"{name}: running", flush=True)
    spec = inputs | {
        "name": name,
        "train": options.train,
        "tests": tests,
        "points": choose_points(name, row),
        "teacher_rate": RATES["full"],
        "work": str(options.work),
        "pruning": make_spec("default", 0.2, options.model, options.train, tests),
    }
    with tempfile.TemporaryDirectory() as folder:
        spec_file, result_file = Path(folder) / "spec.json", Path(folder) / "result.json"
        spec_file.write_text(json.dumps(spec | {"scratch": folder}))
        done = subprocess.run([sys.executable, str(HERE / "recovery_row.py"), str(spec_file), str(result_file)])
        failed = {"error": f"the row's process ended with exit code {done.returncode} and no result"}
        result = json.loads(result_file.read_text()) if result_file.exists() else failed
    if "error" in result:
        print(f"{name}: failed: {result['error']}", flush=True)
    write_row({"name": name, "key": key, "inputs": inputs} | result, file)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ValueError as error:
        sys.exit(str(error))
