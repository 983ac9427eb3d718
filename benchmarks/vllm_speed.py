"""Speed in vLLM of a pruned model at its own size, beside the dense one and the padded one.

    make test-engines    # sets up the environment with vLLM
    python benchmarks/vllm_speed.py --pruned benchmarks/work/default@0.2 --python .venv-engines/bin/python

The three models are in one process of vLLM and take turns; each turn has its own ratios. vLLM computes the dense and
the padded model by its own class, the pruned one through its Transformers backend; the dense one is measured through
that, too, so that the class and the size can be told apart.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from quality_report import format_table, splice

import gqaprune
from gqaprune.checkpoints.save import measure_weights, save

HERE = Path(__file__).parent
BEGIN, END = "<!-- vllm-speed:begin -->", "<!-- vllm-speed:end -->"
MODELS = {
    "dense": {},
    "dense, Transformers backend": {"model_impl": "transformers"},
    "padded": {},
    "per-layer": {"trust_remote_code": True},
}
"""Row -> arguments of vLLM; the first is what others are compared with."""
WORK = ("prompt", "decode", "decode, 8 at once")

SCRIPT = """
import json, sys, time, transformers, vllm
from vllm import LLM, SamplingParams
models, options = json.loads(sys.argv[1]), json.loads(sys.argv[2])
length = options["prompt"] + options["generated"] + 1
engines = [
    LLM(folder, dtype="float32", max_model_len=length, max_num_seqs=8, max_num_batched_tokens=8 * options["prompt"],
        kv_cache_memory_bytes=2**28, enable_prefix_caching=False, enforce_eager=options["eager"], **arguments)
    for folder, arguments in models
]

def measure(engine, count, generated):
    prompts = [{"prompt_token_ids": [(7 * i + j) % 1000 + 10 for j in range(options["prompt"])]} for i in range(count)]
    start = time.perf_counter()
    engine.generate(prompts, SamplingParams(max_tokens=generated, ignore_eos=True, temperature=0), use_tqdm=False)
    return time.perf_counter() - start

turns = []
for turn in range(options["turns"] + 1):
    seconds = []
    for engine in engines:
        prompt, several = measure(engine, 1, 1), measure(engine, 8, 1)
        decode = measure(engine, 1, options["generated"]) - prompt
        seconds.append([prompt, decode, measure(engine, 8, options["generated"]) - several])
    turns.append(seconds)
versions = f"vLLM {vllm.__version__} with transformers {transformers.__version__}"
print(json.dumps({"turns": turns[1:], "versions": versions}))  # the first one warms up
"""


def measure(options: argparse.Namespace, root: Path) -> tuple[list[list[str]], str]:
    """Lines of the table, and the versions of what computed them."""
    folders = {"dense": root / "dense", "padded": root / "padded", "per-layer": root / "per-layer"}
    model, tokenizer = gqaprune.load(options.dense, dtype="float32")
    save(model, tokenizer, folders["dense"], format="stock")
    model = gqaprune.load_model(options.pruned, dtype="float32")
    for format in ("padded", "per-layer"):
        save(model, tokenizer, folders[format], format=format)
    models = [(str(folders[name.partition(",")[0]]), arguments) for name, arguments in MODELS.items()]
    settings = {name: getattr(options, name) for name in ("prompt", "generated", "turns", "eager")}
    quiet = {
        "OMP_WAIT_POLICY": "passive",
        "GOMP_SPINCOUNT": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(
        [options.python, "-c", SCRIPT, json.dumps(models), json.dumps(settings)],
        env={**os.environ, **quiet},
        cwd=root,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    found = json.loads(done.stdout.strip().splitlines()[-1])
    lines = []
    for place, name in enumerate(MODELS):
        size = measure_weights(folders[name.partition(",")[0]])
        lines.append([name, f"{size / 1e6:.1f} MB", *describe_ratios(found["turns"], place)])
    return lines, found["versions"]


def describe_ratios(turns: Sequence[Sequence[Sequence[float]]], place: int) -> list[str]:
    """For each kind of work, how many times as fast as the dense model a model is: the median, with the quartiles."""
    cells = []
    for work in range(len(WORK)):
        ratios = [turn[0][work] / turn[place][work] for turn in turns]
        low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
        cells.append(f"{median:.2f} ({low:.2f} to {high:.2f})" if place else "1")
    return cells


def main() -> int:
    """Measure, print, and write the table into results/inference.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pruned", required=True, help="the pruned model, whose layers differ")
    parser.add_argument("--python", required=True, help="Python of an environment with vLLM")
    parser.add_argument("--dense", default="smollm2-135m", help="the dense model")
    parser.add_argument("--prompt", type=int, default=128, help="tokens read")
    parser.add_argument("--generated", type=int, default=64, help="tokens after them")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    parser.add_argument("--results", type=Path, default=HERE / "results/inference.md")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        lines, versions = measure(options, Path(temporary))
    how = "eager" if options.eager else "compiled"
    protocol = (
        f"A prompt of {options.prompt} tokens and {options.generated} after it, medians of {options.turns} turns with "
        f"their quartiles, float32, {how}. {os.cpu_count()} CPU cores; {versions}."
    )
    table = "\n".join(format_table(["times as fast as dense", "weights", *WORK], lines))
    print(table, protocol, sep="\n\n")
    splice(options.results, "\n\n".join([BEGIN, table, protocol, END]), BEGIN, END, "Speed in vLLM")
    return 0


if __name__ == "__main__":
    sys.exit(main())
