"""GGUF files in llama.cpp: size, perplexity beside PyTorch's, and speed of dense, padded and own-size models.

    OMP_NUM_THREADS=1 python benchmarks/llama_cpp.py --pruned benchmarks/work/default@0.2 --text wiki.test.raw

Every model is written in every kind: the dense one, the pruned one with each layer at its own size, and the pruned one
padded to equal layers. Perplexity is of windows that are read each by itself, the same ones by llama.cpp and, in
float32, by PyTorch. For speed the three files of a kind take turns in one process; each turn has its own ratios.
"""

import argparse
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from llama_engine import Seconds, measure_perplexity, measure_seconds
from measuring import describe_machine
from peers import read_versions
from quality_report import format_table, splice
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import gqaprune
from gqaprune.data.corpora import Corpus
from gqaprune.data.windows import cut_windows, make_batches, tokenize_corpus
from gqaprune.evaluation import perplexity
from gqaprune.models.tokenizer import find_bos

HERE = Path(__file__).parent
BEGIN, END = "<!-- llama-cpp:begin -->", "<!-- llama-cpp:end -->"
KINDS = ("f16", "q8_0", "q6_k", "q5_k_m", "q4_k_m")
MODELS = ("dense", "pruned", "padded")


def load_models(
    options: argparse.Namespace, folder: Path
) -> tuple[dict[str, PreTrainedModel], PreTrainedTokenizerBase]:
    """The three models, in float32, and the tokenizer of all."""
    dense, tokenizer = gqaprune.load(options.dense, dtype="float32")
    pruned = gqaprune.load_model(options.pruned, dtype="float32")
    gqaprune.save(pruned, tokenizer, folder / "padded", format="padded")
    padded = gqaprune.load_model(folder / "padded", dtype="float32")
    return dict(zip(MODELS, (dense.eval(), pruned.eval(), padded.eval()), strict=True)), tokenizer


def write_files(
    models: Mapping[str, PreTrainedModel], tokenizer: PreTrainedTokenizerBase, folder: Path
) -> dict[str, dict[str, Path]]:
    """Kind -> model -> file."""
    files: dict[str, dict[str, Path]] = {kind: {} for kind in KINDS}
    for kind in KINDS:
        for name, model in models.items():
            gqaprune.save(model, tokenizer, folder / name / kind, format=f"gguf-{kind}")
            files[kind][name] = folder / name / kind / f"model-{kind}.gguf"
    return files


def measure_quality(
    models: Mapping[str, PreTrainedModel], files: Mapping[str, Mapping[str, Path]], windows: Tensor
) -> list[list[str]]:
    """Lines of a table: sizes and perplexities of the dense and the pruned model, PyTorch's first."""
    batches = {"text": make_batches(windows, windows)}
    lines = [["PyTorch, float32"]]
    for name in MODELS[:2]:
        size = sum(parameter.nbytes for parameter in models[name].parameters())
        found = perplexity.measure_perplexity(models[name], batches)["text"]
        lines[0] += [f"{size / 1e6:.1f} MB", f"{found:.3f}"]
    for kind, written in files.items():
        lines.append([kind])
        for name in MODELS[:2]:
            found = measure_perplexity(written[name], windows)
            lines[-1] += [f"{written[name].stat().st_size / 1e6:.1f} MB", f"{found:.3f}"]
        print(" | ".join(lines[-1]), flush=True)
    return lines


def measure_speed(files: Mapping[str, Mapping[str, Path]], options: argparse.Namespace) -> list[list[str]]:
    """Lines of a table: how many times as fast as the dense model the others are, in reading and in writing."""
    lines = []
    for kind, written in files.items():
        turns = measure_seconds(list(written.values()), options.prompt, options.generated, options.turns)
        lines.append([kind, *describe_speed(turns)])
        print(" | ".join(lines[-1]), flush=True)
    return lines


def describe_speed(turns: Sequence[Sequence[Seconds]]) -> list[str]:
    """Of prompts, then of decoding: the ratio of each model but the dense one, its median with the quartiles."""
    cells = []
    for work in Seconds._fields:
        for place in range(1, len(turns[0])):
            ratios = [getattr(turn[0], work) / getattr(turn[place], work) for turn in turns]
            low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
            cells.append(f"{median:.2f} ({low:.2f} to {high:.2f})")
    return cells


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and write the tables into results/formats.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pruned", required=True, help="the pruned model")
    parser.add_argument("--text", required=True, metavar="FILE", help="text for perplexity, all of it a test split")
    parser.add_argument("--dense", default="smollm2-135m", help="the dense model")
    parser.add_argument("--tokens", type=int, default=8192, help="of the text, from its beginning")
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--prompt", type=int, default=256, help="tokens read for speed")
    parser.add_argument("--generated", type=int, default=64, help="tokens after them")
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--results", type=Path, default=HERE / "results/formats.md")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        models, tokenizer = load_models(options, Path(temporary))
        tokens = tokenize_corpus(tokenizer, Corpus(options.text, "all"), options.tokens)
        windows, _ = cut_windows(tokens, options.window, bos=find_bos(tokenizer))
        files = write_files(models, tokenizer, Path(temporary))
        quality, speed = measure_quality(models, files, windows), measure_speed(files, options)
    text = Path(options.text).name
    header = ["", "dense", f"perplexity, {text}", "pruned", f"perplexity, {text}"]
    times = ["times as fast as dense", *(f"{work}, {name}" for work in Seconds._fields for name in MODELS[1:])]
    machine = f"{describe_machine('cpu')}, xllamacpp {read_versions(['xllamacpp'])['xllamacpp']}"
    protocol = (
        f"{len(windows)} windows of {options.window} tokens; a prompt of {options.prompt} tokens and "
        f"{options.generated} after it, medians of {options.turns} turns with their quartiles. {machine}."
    )
    tables = ["\n".join(format_table(header, quality)), "\n".join(format_table(times, speed)), protocol]
    splice(options.results, "\n\n".join([BEGIN, *tables, END]), BEGIN, END, "GGUF files in llama.cpp")
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
