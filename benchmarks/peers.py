"""Other pruners, run as their documents show: a dense checkpoint and calibration windows in, a pruned checkpoint out.

`quality.py` runs this file in the peers' own Python (requirements.txt), where gqaprune is not installed, and measures
what it wrote with gqaprune's own functions. So nothing heavy is imported before it is needed.

    python peers.py job.json            # prune, as the job says
    python peers.py --versions NAME…    # versions of distributions, as JSON
"""

import json
import math
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Peer:
    """A pruner from the package registry.

    Args:
        distribution: the package.
        prune: cuts a model in place; gets the model, calibration windows `[windows, tokens]` and the rate.
    """

    distribution: str
    prune: Callable[[Any, Any, float], None]


def prune_by_optipfair(model: Any, windows: Any, rate: float) -> None:
    """MLP channels by their weights' range (MAW), equal counts in every layer; needs no calibration."""
    _prune_by_optipfair(model, None, rate)


def prune_by_optipfair_data(model: Any, windows: Any, rate: float) -> None:
    """MLP channels by their weights' range times the norm of their activations, equal counts in every layer."""
    _prune_by_optipfair(model, [{"input_ids": batch} for batch in windows.split(4)], rate)


def _prune_by_optipfair(model: Any, batches: Any, rate: float) -> None:
    from optipfair import prune_model

    config = model.config
    channel_parameters = 3 * config.hidden_size * config.num_hidden_layers
    count = round(rate * count_decoder_parameters(model) / channel_parameters)
    # optipfair rounds the count down: half a channel more makes it the count meant.
    percentage = 100 * (count + 0.5) / config.intermediate_size
    prune_model(model, neuron_selection_method="MAW", pruning_percentage=percentage, dataloader=batches)


def prune_by_torch_pruning(model: Any, windows: Any, rate: float) -> None:
    """Group magnitude, with the settings of torch-pruning's LLM example; needs no calibration."""
    import torch_pruning

    _prune_by_torch_pruning(model, windows, rate, torch_pruning.importance.GroupMagnitudeImportance(p=2))


def prune_by_torch_pruning_taylor(model: Any, windows: Any, rate: float) -> None:
    """Group Taylor: gradients of the loss summed over the calibration windows, the rest as for magnitude."""
    import torch_pruning

    _prune_by_torch_pruning(model, windows, rate, torch_pruning.importance.GroupTaylorImportance())


def _prune_by_torch_pruning(model: Any, windows: Any, rate: float, importance: Any) -> None:
    """As examples/LLMs/prune_llm.py: one ratio for hidden size, MLP channels and query heads, widths in steps of 4.

    The example takes the ratio of channels; the one that removes the share of parameters asked is looked for here.
    """
    import torch_pruning

    config = model.config
    head_dim = model.model.layers[0].self_attn.head_dim
    ratio = _find_ratio(config, head_dim, rate)
    heads = {}
    for layer in model.model.layers:
        heads[layer.self_attn.q_proj] = config.num_attention_heads
        heads[layer.self_attn.k_proj] = config.num_key_value_heads
        heads[layer.self_attn.v_proj] = config.num_key_value_heads
    pruner = torch_pruning.pruner.BasePruner(
        model,
        example_inputs=windows[:1, :8],
        forward_fn=lambda model, ids: model(input_ids=ids, use_cache=False).logits,
        importance=importance,
        global_pruning=False,
        pruning_ratio=ratio,
        head_pruning_ratio=ratio,
        ignored_layers=[model.lm_head],
        num_heads=heads,
        prune_num_heads=True,
        prune_head_dims=False,
        round_to=4,
    )
    if isinstance(importance, torch_pruning.importance.GroupTaylorImportance):
        for window in windows.split(1):
            model(input_ids=window, labels=window, use_cache=False).loss.backward()
    for group in pruner.step(interactive=True):
        group.prune()
    model.zero_grad()
    first = model.model.layers[0]
    config.hidden_size = model.model.embed_tokens.embedding_dim
    config.intermediate_size = first.mlp.gate_proj.out_features
    config.num_attention_heads = first.self_attn.q_proj.out_features // head_dim
    config.head_dim = head_dim
    if config.tie_word_embeddings:  # one tensor again, cut alike on both sides
        assert model.lm_head.weight.equal(model.model.embed_tokens.weight)
        model.lm_head.weight = model.model.embed_tokens.weight


def _find_ratio(config: Any, head_dim: int, rate: float) -> float:
    """The ratio whose widths come nearest to the rate of decoder parameters."""

    def count(hidden: int, channels: int, heads: int) -> int:
        rows = (2 * heads + 2 * config.num_key_value_heads) * head_dim
        return hidden * (rows + 3 * channels + 2)

    def keep(size: int, ratio: float) -> int:
        kept = int(size * (1 - ratio))
        return kept - kept % 4

    def miss(ratio: float) -> float:
        groups = config.num_key_value_heads
        heads = config.num_attention_heads
        removed = math.ceil(math.ceil(ratio * heads) / groups) * groups
        parameters = count(keep(config.hidden_size, ratio), keep(config.intermediate_size, ratio), heads - removed)
        return abs(1 - parameters / count(config.hidden_size, config.intermediate_size, heads) - rate)

    return min((step / 2000 for step in range(1, 2000)), key=miss)


PEERS: dict[str, Peer] = {
    "optipfair-maw": Peer("optipfair", prune_by_optipfair),
    "optipfair-data": Peer("optipfair", prune_by_optipfair_data),
    "torch-pruning-magnitude": Peer("torch-pruning", prune_by_torch_pruning),
    "torch-pruning-taylor": Peer("torch-pruning", prune_by_torch_pruning_taylor),
}
"""Row name -> pruner."""


def count_decoder_parameters(model: Any) -> int:
    """Parameters of all decoder layers."""
    return sum(parameter.numel() for parameter in model.model.layers.parameters())


def read_peak_rss() -> int:
    """Peak resident memory of this process in bytes.

    `ru_maxrss` starts at the parent's size where the parent forked; the kernel's own mark starts anew with the program.
    """
    status = Path("/proc/self/status")
    if status.exists():
        marks = [line.split() for line in status.read_text().splitlines() if line.startswith("VmHWM:")]
        if marks:
            return int(marks[0][1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def run_job(job: dict[str, Any]) -> dict[str, Any]:
    """Load the dense checkpoint, prune it, save it; seconds and memory of the pruning.

    Raises:
        ValueError: if the dense model computes another loss here than it does in gqaprune: a newer checkpoint read
            wrongly (its rope settings, say) would make any pruner look bad.
    """
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(job["dense"], torch_dtype=torch.float32).eval()
    windows = load_file(job["windows"])["windows"]
    with torch.no_grad():
        loss = float(model(input_ids=windows[:1, :64], labels=windows[:1, :64]).loss)
    if abs(loss - job["dense_loss"]) > 1e-3:
        raise ValueError(f"the dense model's loss is {loss:.4f} here and {job['dense_loss']:.4f} in gqaprune")
    start = time.perf_counter()
    PEERS[job["peer"]].prune(model, windows, job["rate"])
    seconds = time.perf_counter() - start
    peak_rss = read_peak_rss()
    model.save_pretrained(job["pruned"])
    return {"seconds": seconds, "peak_rss": peak_rss}


def read_versions(names: list[str]) -> dict[str, str]:
    """Versions of the Python that runs and of distributions in it; those that are not there are left out."""
    found = {"python": sys.version.split()[0]}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def main(arguments: list[str]) -> None:
    """See the top of this file."""
    if arguments[0] == "--versions":
        print(json.dumps(read_versions(arguments[1:])))
        return
    job = json.loads(Path(arguments[0]).read_text())
    Path(job["result"]).write_text(json.dumps(run_job(job)))


if __name__ == "__main__":
    main(sys.argv[1:])
