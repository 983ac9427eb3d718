"""Speed and memory of pruned models: prefill, decode, KV cache and peak memory, dense against pruned.

    OMP_NUM_THREADS=1 python benchmarks/inference.py                 # SmolLM2-135M on a CPU
    python benchmarks/inference.py --device cuda                     # Llama-3-8B's shapes, random weights, on a GPU

What goes is chosen by weights alone and nothing is repaired: neither changes a shape. The dense and one pruned model at
a time take turns in one process, so that what else the machine does hits both; peak memory is that of a process of its
own. What the parameters removed would give at best is in the table, too:

- prefill: the weights that multiply the prompt's tokens, dense over pruned: projections once per token, the head once
  per prompt, for `generate` asks for no logits but the last;
- decode: the bytes that a token reads, dense over pruned: all weights but an embedding table that is not also the head,
  and the KV cache half-way through.
"""

import argparse
import copy
import sys
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from inference_report import Case, Result, build_speed_line, describe
from measuring import GEOMETRIES, make_model, make_tokens
from quality_report import splice
from transformers import PreTrainedModel

import gqaprune
from gqaprune.commands.speed import read_peak, run, start_peak
from gqaprune.models.architecture import count_layer_parameters, read_geometry

HERE = Path(__file__).parent
VARIANTS: Mapping[str, Mapping[str, Any]] = {
    **{
        f"{rate:.0%} by channels, multiple of {multiple}": {"rate": rate, "limits": {"channel_multiple": multiple}}
        for rate in (0.2, 0.3)
        for multiple in (1, 8, 64)
    },
    "20% by channels, each layer its own width": {
        "rate": 0.2,
        "limits": {"channel_multiple": 64},
        "allocation": "global",
    },
    "a third of the GQA groups": {"rate": 0.0, "kv_rate": 1 / 3},
    "30%, a third of the groups among it": {"rate": 0.3, "kv_rate": 1 / 3, "limits": {"channel_multiple": 64}},
}
"""Name -> settings of `PruningConfig`."""
CASES = {
    "cpu": Case("smollm2-135m", "float32", "cpu", 256, 8),
    "cuda": Case("llama-3-8b", "bfloat16", "cuda", 2048, 64),
}
"""What `--device` measures."""


def load(case: Case) -> PreTrainedModel:
    """The dense model."""
    if case.model in GEOMETRIES:
        return make_model(GEOMETRIES[case.model], getattr(torch, case.dtype), case.device)
    return gqaprune.load_model(case.model, case.dtype).to(case.device).eval()


def cut(model: PreTrainedModel, settings: Mapping[str, Any]) -> gqaprune.PruningPlan:
    """Prune a dense model in place, in all of its layers; the plan."""
    whole = (0, read_geometry(model.config).num_layers)
    common = {
        "criterion": "l2",
        "repair": {"method": "none"},
        "limits": {"attention_layers": whole, "mlp_layers": whole, **settings.get("limits", {})},
    }
    return gqaprune.prune(model, [], gqaprune.PruningConfig(**{"allocation": "uniform", **settings, **common}))[0]


def count_work(model: PreTrainedModel, case: Case) -> dict[str, int]:
    """What each kind of work is ideally proportional to, as the top of this file says."""
    geometry, head = read_geometry(model.config), model.get_output_embeddings().weight
    table = model.get_input_embeddings().weight
    unread = 0 if table is head else table.nbytes
    cache = geometry.kv_cache_bytes_per_token(head.element_size()) * (case.prompt + case.generated // 2)
    return {
        "prefill": geometry.projection_weights * case.prompt + head.numel(),
        "decode": measure_weights(model) - unread + cache,
    }


def measure_weights(model: PreTrainedModel) -> int:
    """Bytes of all parameters, tied ones once."""
    return sum(parameter.nbytes for parameter in model.parameters())


def measure_peak(case: Case, settings: Mapping[str, Any] | None) -> int:
    """Peak memory of one run, beyond what the process takes without a model; for a process of its own."""
    empty = start_peak(case.device)
    model = load(case)
    if settings is not None:
        cut(model, settings)
    start_peak(case.device)
    run(model, make_tokens(model.config, 1, case.prompt).to(case.device), case.generated)
    return read_peak(case.device) - empty


def measure_peak_apart(case: Case, settings: Mapping[str, Any] | None) -> int:
    """The same, in a process that is started for it."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(measure_peak, case, settings).result()


def measure(case: Case, variants: Mapping[str, Mapping[str, Any]], turns: int) -> list[Result]:
    """Every variant in turn with the dense model; a first turn warms up and does not count."""
    dense = load(case)
    work, size, parameters = count_work(dense, case), measure_weights(dense), sum(count_layer_parameters(dense))
    dense_peak = measure_peak_apart(case, None)
    prompt_BT = make_tokens(dense.config, 1, case.prompt).to(case.device)
    results = []
    for name, settings in variants.items():
        peaks = dense_peak, measure_peak_apart(case, settings)
        pruned = copy.deepcopy(dense)
        plan = cut(pruned, settings)
        runs = [[run(model, prompt_BT, case.generated) for model in (dense, pruned)] for _ in range(turns + 1)][1:]
        own = count_work(pruned, case)
        results.append(
            Result(
                name,
                *zip(*runs, strict=True),
                {kind: work[kind] / own[kind] for kind in work},
                peaks,
                (size, measure_weights(pruned)),
                plan.pruned_geometry.kv_cache_bytes_per_token(pruned.dtype.itemsize) * (case.prompt + case.generated),
                (min(plan.pruned_geometry.channels), max(plan.pruned_geometry.channels)),
                1 - sum(count_layer_parameters(pruned)) / parameters,
            )
        )
        print(" | ".join(build_speed_line(results[-1], case, "prefill")), flush=True)
    return results


def main() -> int:
    """Measure, print, and write the tables into results/inference.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=list(CASES), default="cpu")
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--results", type=Path, default=HERE / "results/inference.md")
    options = parser.parse_args()
    case = CASES[options.device]
    table = describe(measure(case, VARIANTS, options.turns), case)
    print(table)
    begin, end = (f"<!-- inference-{options.device}:{edge} -->" for edge in ("begin", "end"))
    splice(options.results, f"{begin}\n\n{table}\n\n{end}", begin, end, f"The pruned model itself, {options.device}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
