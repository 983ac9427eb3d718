"""One row of the quality table: prune and measure, in a process of its own so that seconds and memory are the row's.

python quality_row.py spec.json result.json    # quality.py does this
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peers import PEERS, read_peak_rss
from quality import DENSE, FLOOR
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import gqaprune
from gqaprune import PruningPlan
from gqaprune.checkpoints.save import check_output_folder
from gqaprune.common.stage_cache import StageCache
from gqaprune.data.calibration import CalibrationSet
from gqaprune.data.corpora import Corpus
from gqaprune.data.windows import Batch, cut_windows, make_batches, sample_windows, tokenize_corpus
from gqaprune.datamodules import TextDataModule
from gqaprune.evaluation.perplexity import measure_perplexity
from gqaprune.models.architecture import count_layer_parameters, count_parameters, read_geometry
from gqaprune.models.loading import load_model
from gqaprune.models.tokenizer import find_bos

Result = dict[str, Any]


def run_row(spec: Mapping[str, Any]) -> Result:
    """Prune as the spec says (see `quality.make_spec`) and measure on every test text.

    Raises:
        ValueError: if the pruner or the measurement fails, with its reason; or, before either, if the folder to keep
            the model in holds something else.
    """
    if spec.get("keep"):
        check_output_folder(Path(spec["keep"]))
    model, tokenizer = gqaprune.load(spec["model"], dtype="float32")
    tests = {name: read_test(tokenizer, test, spec["protocol"]) for name, test in spec["tests"].items()}
    dense_parameters = sum(count_layer_parameters(model))
    result: Result = {}
    if spec["method"] != DENSE:
        if spec["method"] == FLOOR:
            tested = [batch["input_ids"].flatten() for batches in tests.values() for batch in batches]
            windows = shuffle(torch.cat(tested).unflatten(0, (-1, spec["calibration"]["window"])))
        else:
            windows = read_calibration(model, spec["model"], spec["calibration"])
        if spec["method"] in PEERS:
            model, result = prune_by_peer(model, windows, spec)
        else:
            plan, result = prune_by_own(model, windows, spec)
            if spec.get("keep"):
                gqaprune.save(model, tokenizer, Path(spec["keep"]), plan)
    result["windows"] = {name: len(batches) for name, batches in tests.items()}
    result["perplexity"] = measure_perplexity(model, tests, spec["method"])
    decoder_parameters = sum(count_layer_parameters(model))
    geometry = read_geometry(model.config)
    return result | {
        "parameters": count_parameters(model),
        "decoder_parameters": decoder_parameters,
        "rate_reached": 1 - decoder_parameters / dense_parameters,
        "kept": {
            "hidden_size": geometry.hidden_size,
            "query_heads": geometry.query_heads,
            "kv_heads": geometry.kv_heads,
            "channels": geometry.channels,
        },
    }


def read_test(tokenizer: PreTrainedTokenizerBase, test: Mapping[str, Any], protocol: Mapping[str, int]) -> list[Batch]:
    """Windows of a test text: its first ones, or `sample`d at random over its first tokens; fewer if it is short."""
    window, count = protocol["window"], protocol["windows"]
    corpus, bos = Corpus(test["corpus"], test["split"]), find_bos(tokenizer)
    if "sample" not in test:
        return make_batches(*cut_windows(tokenize_corpus(tokenizer, corpus, window * count), window, bos=bos), 1)
    windows = sample_windows(tokenize_corpus(tokenizer, corpus, test["sample"]), window, count, 0, bos)
    return make_batches(windows, windows, 1)


def read_calibration(model: PreTrainedModel, source: str, calibration: Mapping[str, Any]) -> Tensor:
    """Calibration windows `[windows, window]`, those that `gqaprune prune` takes with the same settings."""
    data = TextDataModule(source, **name_calibration(calibration), seed=calibration["seed"])
    return torch.cat(data.calibration_batches(model))


def name_calibration(calibration: Mapping[str, Any]) -> dict[str, Any]:
    """Calibration settings as the data module names them."""
    return {
        "calibration": {
            "corpora": [calibration["corpus"]],
            "windows": calibration["windows"],
            "window": calibration["window"],
            "batch_size": calibration["batch_size"],
            "sampled_windows": calibration["sampled"],
        },
        "sampling": {"document": calibration["document"], "prompts": calibration["prompts"]},
    }


def shuffle(windows: Tensor) -> Tensor:
    """Windows in another order, so that batches held out hold some of every text."""
    return windows[torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))]


def prune_by_own(model: PreTrainedModel, windows: Tensor, spec: Mapping[str, Any]) -> tuple[PruningPlan, Result]:
    """Prune in place with gqaprune."""
    calibration = spec["calibration"]
    config = gqaprune.PruningConfig(**spec["settings"], rate=spec["rate"])
    batches = list(windows.split(calibration["batch_size"]))
    start = time.perf_counter()
    stages = StageCache(Path(spec["stages"])) if spec.get("stages") else None  # it changes the time, no number
    plan, _ = gqaprune.prune(
        model,
        CalibrationSet(batches, accumulation=calibration["accumulate"], seed=calibration["seed"]),
        config,
        stages=stages,
    )
    costs = {} if stages else {"seconds": time.perf_counter() - start}
    return plan, costs | {"peak_rss": read_peak_rss()}


def prune_by_peer(
    model: PreTrainedModel, windows: Tensor, spec: Mapping[str, Any]
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Hand the dense checkpoint and the windows to a peer in its own Python, and load what it wrote.

    Raises:
        ValueError: with the last line that the peer printed, if it failed.
    """
    with torch.inference_mode():
        loss = model(input_ids=windows[:1, :64], labels=windows[:1, :64]).loss
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        job = {"peer": spec["method"], "rate": spec["rate"], "dense_loss": float(loss)}
        job |= {key: str(folder / key) for key in ("dense", "pruned", "windows", "result")}
        gqaprune.save(model, None, job["dense"])
        point_to_rope(Path(job["dense"]) / "config.json")
        del model
        save_file({"windows": windows.clone()}, job["windows"])
        (folder / "job.json").write_text(json.dumps(job))
        run_peer([spec["peers_python"], str(Path(__file__).with_name("peers.py")), str(folder / "job.json")])
        return load_pruned(Path(job["pruned"])), json.loads(Path(job["result"]).read_text())


def run_peer(command: list[str]) -> None:
    """Run a command, passing on what it prints.

    Raises:
        ValueError: if it failed, with the last line of what it said.
    """
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    sys.stderr.write(done.stderr)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise ValueError(said[-1])


def point_to_rope(config_file: Path) -> None:
    """Say the rope base where transformers 4 looks for it; it would take 10,000 in silence otherwise."""
    config = json.loads(config_file.read_text())
    config["rope_theta"] = config["rope_parameters"]["rope_theta"]
    config["rope_scaling"] = None
    assert config["rope_parameters"]["rope_type"] == "default"
    config_file.write_text(json.dumps(config))


def load_pruned(folder: Path) -> PreTrainedModel:
    """Load a peer's stock checkpoint, as a Mistral where `LlamaConfig` would refuse its head count.

    A Llama without biases is arithmetically a Mistral without sliding window.
    """
    file = folder / "config.json"
    config = json.loads(file.read_text())
    if config["hidden_size"] % config["num_attention_heads"]:
        assert not config.get("attention_bias") and not config.get("mlp_bias")
        config |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": None}
        file.write_text(json.dumps(config))
    return load_model(folder, "float32")


if __name__ == "__main__":
    spec_file, result_file = map(Path, sys.argv[1:])
    try:
        outcome = run_row(json.loads(spec_file.read_text()))
    except Exception as error:  # whatever stops one row is that row's result
        outcome = {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"}
    result_file.write_text(json.dumps(outcome))
