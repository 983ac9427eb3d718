"""Perplexity kept by pruned models, ours and peers', at several rates, on the calibration's kind of text and others.

    python benchmarks/quality.py --calibration valid.txt --test wiki.test.raw --folder benchmarks/rows \
        --peers-python ../peers/bin/python --rows 'dense,default,optipfair-*' --rates 0.1,0.2,0.3 --resume

Every row (a method at a rate) runs in a process of its own and is kept as one JSON file with a key: a hash of all that
it depends on. `--resume` runs what has no file with the current key. The tables go to the console and to
results/quality.md, the figures to docs/images.

A new row of ours is one line in `METHODS`; a peer is an entry of `PEERS` in peers.py.
"""

import argparse
import dataclasses
import hashlib
import json
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from peers import PEERS, read_versions
from quality_figures import draw_gaps, draw_layers
from quality_report import print_tables, write_markdown
from quality_sources import DENSE, hash_code, is_same, probe_row

import gqaprune
from gqaprune.common.atomic_files import write_atomically
from gqaprune.data.corpora import Corpus, read_corpus
from gqaprune.planning.allocation import ALLOCATIONS
from gqaprune.scoring.scores import CRITERIA

HERE = Path(__file__).parent

WHOLE = {"limits": {"attention_layers": [0, 30], "mlp_layers": [0, 30]}}  # of the 30 there are
CUT = {"damage": "scores", "repair": {"method": "none"}, **WHOLE}
"""An allocation alone, over all layers, as others have it."""
MIXED = {"windows": 96, "sampled": 128}
"""Windows of the calibration text, and somewhat more of the dense model's own, which have more to cover."""
THIRD = {"windows": 32, "sampled": 32}
UNIFORM = {"allocation": "uniform"}
"""As many channels of every layer but those at the ends, no group."""
LEAST_SQUARES = {"repair": {"epochs": 0, "distill_tokens": 0}, "calibration": THIRD}

FLOOR = "floor: chosen and refitted on the tested windows"
"""What bounds the others: no honest calibration can know more of the test texts."""

METHODS: dict[str, dict[str, Any]] = {
    FLOOR: UNIFORM | {"repair": {"epochs": 0, "distill_tokens": 0}},
    "default": {"calibration": MIXED},
    "default, a sixth of the KV heads": {"kv_rate": 1 / 6, "calibration": MIXED},
    "default, a third of the KV heads": {"kv_rate": 1 / 3, "calibration": MIXED},
    "default, channels alone": {"split": "0:10", "calibration": MIXED},
    "default, not distilled": {"repair": {"distill_tokens": 0}, "calibration": MIXED},
    "default, share of all parameters": {"rate_base": "all", "calibration": MIXED},
    "uniform channels": UNIFORM | {"calibration": MIXED},
    "uniform channels, not distilled": UNIFORM | {"repair": {"distill_tokens": 0}, "calibration": MIXED},
    "least squares": LEAST_SQUARES,
    "least squares, uniform channels": LEAST_SQUARES | UNIFORM,
    "no repair": UNIFORM | {"repair": {"method": "none"}, "calibration": THIRD},
    **{f"criterion {name}": UNIFORM | {"criterion": name, "repair": {"method": "none"}} for name in CRITERIA},
    **{f"allocation {name}": {"criterion": "fisher", "allocation": name, **CUT} for name in ALLOCATIONS},
    "allocation global, attention too": {"criterion": "fisher", "allocation": "global", "split": "free", **CUT},
    "allocation uniform, attention too": {"criterion": "fisher", "allocation": "uniform", "split": "free", **CUT},
}
"""Row name -> fields of `PruningConfig` (all but `rate`). Plain types only.

The key `calibration` overrides entries of `CALIBRATION` for the row: `"calibration": {"windows": 128}`.
"""

CALIBRATION = {
    "windows": 16,
    "window": 512,
    "sampled": 0,
    "document": 256,
    "prompts": [],
    "seed": 0,
    "batch_size": 4,
    "accumulate": 1,
}
"""What a row calibrates on unless it says otherwise; peers too. `sampled` windows come from the dense model itself."""

PROMPTS = {"smollm2-135m": ["<|endoftext|>"]}
"""What a model's own text begins with: the token between its training documents, where it is not the BOS."""

PROTOCOL = {"window": 1024, "windows": 16}
"""Perplexity: non-overlapping windows of so many tokens, token-weighted; so many windows of each text."""

Spec = dict[str, Any]
Row = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the selected rows, then draw up the tables of all rows that are there."""
    options = parse_arguments(arguments)
    check_methods(METHODS)
    names = select_names(options.rows)
    rates = [float(rate) for rate in options.rates.split(",")]
    if options.list:
        print("\n".join(f"{name}: {json.dumps(METHODS.get(name, {}))}" for name in names))
        return 0
    if not options.table_only:
        if not options.calibration or not options.test:
            sys.exit("--calibration FILE and --test FILE are needed to run rows (not for --list and --table-only)")
        if Corpus(options.calibration, "all").overlaps(Corpus(options.test, "all")):
            sys.exit(f"{options.calibration} is calibrated and tested on: give two texts")
        tests = name_tests(options.test)
        options.folder.mkdir(parents=True, exist_ok=True)
        texts = {name: hash_corpus(Corpus(test["corpus"], test["split"])) for name, test in tests.items()}
        texts["calibration"] = hash_corpus(Corpus(options.calibration, "all"))
        for name in names:
            for rate in [0.0] if name == DENSE else rates:
                spec = make_spec(name, rate, options.model, options.calibration, tests, options.peers_python)
                spec["keep"] = options.keep and str(options.keep / f"{name}@{rate:g}")
                spec["stages"] = options.stages and str(options.stages)
                run_or_skip(spec, texts, options.folder, options.resume, run_in_process)
    rows = read_rows(options.folder)
    print_tables(rows)
    write_markdown(rows, options.results)
    options.images.mkdir(parents=True, exist_ok=True)
    draw_gaps(rows, options.images / "quality_gap.png")
    draw_layers(rows, options.images / "quality_layers.png")
    failed = [row["name"] for row in rows if "error" in row and row["method"] in names]
    return 1 if failed else 0


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibration", metavar="FILE", help="text to calibrate on, never a test text")
    parser.add_argument("--test", metavar="FILE", help="test text; the embedded text and Python sources are added")
    parser.add_argument("--folder", type=Path, default=HERE / "rows", help="where rows are kept as JSON")
    parser.add_argument("--rows", default="*", help="names or patterns, with commas between them")
    parser.add_argument("--rates", default="0.1,0.2,0.3", help="shares of decoder-layer parameters to remove")
    parser.add_argument("--model", default="smollm2-135m", help="the dense model; rows are named after its last part")
    parser.add_argument("--peers-python", default=sys.executable, help="Python that has requirements.txt installed")
    parser.add_argument(
        "--results", type=Path, default=HERE / "results/quality.md", help="Markdown file for the tables"
    )
    parser.add_argument("--images", type=Path, default=HERE.parent / "docs" / "images", help="folder for figures")
    parser.add_argument("--keep", type=Path, help="folder to keep pruned models of ours in, each as its row is named")
    parser.add_argument("--stages", type=Path, help="folder of stages that rows share; no seconds are kept then")
    parser.add_argument("--resume", action="store_true", help="skip rows that are there with the current key")
    parser.add_argument("--list", action="store_true", help="only list the selected rows")
    parser.add_argument("--table-only", action="store_true", help="only draw up tables and figures of rows there")
    return parser.parse_args(arguments)


def check_methods(methods: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse a method whose settings do not exist, before anything is run.

    Raises:
        ValueError: naming method and setting.
    """
    known = {field.name for field in dataclasses.fields(gqaprune.PruningConfig)} - {"rate"} | {"calibration"}
    for name, settings in methods.items():
        if name in PEERS or name == DENSE:
            raise ValueError(f"method {name!r} has the name of a peer or of the dense model: choose another")
        for unknown in [*(settings.keys() - known), *(settings.get("calibration", {}).keys() - CALIBRATION.keys())]:
            raise ValueError(f"method {name!r}: no setting {unknown!r}; settings are {', '.join(sorted(known))}")


def select_names(patterns: str, names: Sequence[str] = (DENSE, *PEERS, *METHODS)) -> list[str]:
    """Names of the rows that match any of the patterns, in the order that they are listed in.

    Args:
        patterns: with commas between them; or one name, which may have commas itself.
        names: of the rows.

    Raises:
        ValueError: if a pattern matches none.
    """
    wanted = [patterns] if patterns in names else [pattern.strip() for pattern in patterns.split(",")]
    for pattern in wanted:
        if not any(fnmatch(name, pattern) for name in names):
            raise ValueError(f"no row {pattern!r}; rows are {'; '.join(names)}")
    return [name for name in names if any(fnmatch(name, pattern) for pattern in wanted)]


def name_tests(test: str) -> dict[str, dict[str, Any]]:
    """Test texts: the file given, and two unlike it that every Python carries, prose on the language and its sources.

    Sources: windows from all over the first 2^18 tokens of the standard library's top-level modules, in their order.
    """
    return {
        "wikitext-2": {"corpus": test, "split": "all"},
        "embedded": {"corpus": "embedded", "split": "test"},
        "python source": {"corpus": f"{sysconfig.get_path('stdlib')}/[a-z]*.py", "split": "all", "sample": 1 << 18},
    }


def make_spec(
    name: str, rate: float, model: str, calibration: str, tests: Mapping[str, Any], peers_python: str = sys.executable
) -> Spec:
    """All that a row's process needs to know, as plain data."""
    settings = dict(METHODS.get(name, {}))
    own_calibration = settings.pop("calibration", {})
    return {
        "method": name,
        "rate": rate,
        "model": model,
        "settings": settings,
        "calibration": CALIBRATION | {"prompts": PROMPTS.get(model, [])} | own_calibration | {"corpus": calibration},
        "tests": tests,
        "protocol": PROTOCOL,
        "peers_python": peers_python,
    }


def run_or_skip(
    spec: Spec, texts: Mapping[str, str], folder: Path, resume: bool, run: Callable[[Spec], dict[str, Any]]
) -> bool:
    """Run a row and keep its result, a failure too; skip it if `resume` and it is there as it would be run now.

    Args:
        spec: what to run.
        texts: content hash of every text.
        folder: where rows are kept.
        resume: whether to skip.
        run: spec -> result.

    Returns:
        Whether it was run.
    """
    name = f"{spec['method']}@{spec['rate']:g}"
    file = folder / f"{name}.json"
    inputs = describe_inputs(spec, texts, read_row_versions(spec))
    key = hash_inputs(inputs)
    if resume and file.exists():
        there = json.loads(file.read_text())
        if there["key"] == key and "error" not in there:
            print(f"{name}: there")
            return False
    print(f"{name}: running", flush=True)
    result = run(spec)
    if "error" in result:
        print(f"{name}: failed: {result['error']}", flush=True)
    row = {"name": name, "method": spec["method"], "rate": spec["rate"], "key": key, "code": hash_code(spec["method"])}
    row["probe"] = probe_row(spec["method"], spec["rate"], spec["settings"])
    write_row(row | {"inputs": inputs} | result, file)
    return True


def write_row(row: Row, file: Path) -> None:
    """Write a row as JSON, an entry per line, whole or not at all."""
    entries = (f"{json.dumps(key)}: {json.dumps(value)}" for key, value in row.items())
    write_atomically(file, ("{\n" + ",\n".join(entries) + "\n}\n").encode())


def describe_inputs(spec: Spec, texts: Mapping[str, str], versions: Mapping[str, str]) -> dict[str, Any]:
    """What a row depends on, without the places where things lie on this machine."""
    inputs = {name: spec[name] for name in ("method", "rate", "settings", "protocol")}
    inputs["model"] = Path(spec["model"]).name
    inputs["calibration"] = {key: value for key, value in spec["calibration"].items() if key != "corpus"}
    inputs["calibration"]["text"] = texts["calibration"]
    if spec["method"] == DENSE:
        del inputs["calibration"]
    inputs["tests"] = {name: texts[name] for name in spec["tests"]}
    inputs["samples"] = {name: test["sample"] for name, test in spec["tests"].items() if "sample" in test}
    return inputs | {"versions": dict(versions)}


def hash_inputs(inputs: Mapping[str, Any]) -> str:
    """The row's key."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:16]


def hash_corpus(corpus: Corpus) -> str:
    """Hash of a text's content."""
    digest = hashlib.sha256()
    for document in read_corpus(corpus):
        digest.update(document.encode() + b"\0")
    return digest.hexdigest()[:16]


def read_row_versions(spec: Spec) -> dict[str, str]:
    """Versions of what runs a row: Python, whose texts are test texts, and packages; a peer's from its own Python."""
    own = read_versions(["torch", "transformers"])
    if spec["method"] not in PEERS:
        return own
    names = [PEERS[spec["method"]].distribution, "torch", "transformers"]
    command = [spec["peers_python"], str(HERE / "peers.py"), "--versions", *names]
    try:
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return own  # the row will say why it cannot run
    return own | {f"peer's {name}": version for name, version in json.loads(printed).items()}


def run_in_process(spec: Spec) -> dict[str, Any]:
    """Run a row in a fresh process; what kills the process is the row's error."""
    with tempfile.TemporaryDirectory() as folder:
        spec_file, result_file = Path(folder) / "spec.json", Path(folder) / "result.json"
        spec_file.write_text(json.dumps(spec))
        done = subprocess.run([sys.executable, str(HERE / "quality_row.py"), str(spec_file), str(result_file)])
        if not result_file.exists():
            return {"error": f"the row's process ended with exit code {done.returncode} and no result"}
        return json.loads(result_file.read_text())


def read_rows(folder: Path) -> list[Row]:
    """All rows there; each with `stale`: whether its method has other settings now, or does something else.

    Where our sources have changed, the method is tried on a tiny model. If it does what it did, the row is kept as one
    of these sources, for most changes move no number.
    """
    rows = []
    for file in sorted(folder.glob("*.json")):
        row = json.loads(file.read_text())
        method, settings = row["method"], row["inputs"]["settings"]
        current = {key: value for key, value in METHODS.get(method, {}).items() if key != "calibration"}
        is_known = settings == current
        code = hash_code(method)
        has_changed = is_known and row["code"] != code and "probe" in row
        if has_changed and is_same(row["probe"], probe_row(method, row["rate"], settings)):
            row["code"] = code
            write_row(row, file)
        rows.append(row | {"stale": not is_known or row["code"] != code})
    return rows


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ValueError as error:
        sys.exit(str(error))
