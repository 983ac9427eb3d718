"""Whether a row still holds: a hash of the sources that it rests on, and what its method does to a tiny random model.

The tiny model covers pruning and measuring, not reading or sampling the calibration text.
"""

import ast
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peers import PEERS
from transformers import LlamaConfig, LlamaForCausalLM

import gqaprune
from gqaprune.data.calibration import CalibrationSet
from gqaprune.data.windows import make_batches
from gqaprune.evaluation.perplexity import measure_perplexity

DENSE = "dense"
PACKAGE = Path(__file__).parent.parent / "gqaprune"
LAYERS = 30
"""As SmolLM2-135M has, for settings that name layers."""
TOLERANCE = 0.02
"""Relative difference of divergences that another processor or another number of threads may make."""

Probe = Mapping[str, Any]


def hash_code(method: str) -> str:
    """Hash of our sources that a row rests on: the method's, or for others what loads and measures."""
    measuring = [PACKAGE / f"{name}.py" for name in ("models/loading", "data/corpora", "data/windows")]
    measuring.append(PACKAGE / "evaluation/perplexity.py")
    wings = ("data", "models", "planning", "scoring", "surgery")
    own = [PACKAGE / "pipeline.py", *measuring, *(file for wing in wings for file in (PACKAGE / wing).rglob("*.py"))]
    files = {DENSE: measuring}.get(
        method, [*measuring, PACKAGE.parent / "benchmarks/peers.py"] if method in PEERS else own
    )
    digest = hashlib.sha256("".join(strip_words(file.read_text()) for file in sorted(set(files))).encode())
    return digest.hexdigest()[:16]


def strip_words(source: str) -> str:
    """Python source without comments and docstrings, which move no numbers."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            vars(node)["body"] = [one for one in body if not is_word(one)] or [ast.Pass()]
    return ast.unparse(tree)


def is_word(statement: ast.stmt) -> bool:
    """Whether a statement is a string that stands by itself."""
    return isinstance(statement, ast.Expr) and isinstance(getattr(statement.value, "value", None), str)


def probe_row(method: str, rate: float, settings: Mapping[str, Any]) -> Probe:
    """What a method does to a tiny model; of peers and the dense model, only measuring is ours and tried."""
    return probe(None if method == DENSE or method in PEERS else settings, rate)


def probe(settings: Mapping[str, Any] | None, rate: float) -> Probe:
    """Prune the tiny model and describe what is left.

    Args:
        settings: fields of `PruningConfig` but the rate; None takes the dense model.
        rate: share of the decoder's parameters to remove.

    Returns:
        `measured`, the divergence from the dense model on fixed tokens in nats, or of the dense model its perplexity;
        `kept`, a hash of the units that layers keep; and `distilled`, what distillation led to, which a random model
        does not keep.
    """
    generator = torch.Generator().manual_seed(0)
    model = _build(generator)
    texts_WT = torch.randint(model.config.vocab_size, (28, 32), generator=generator)
    calibration_WT, test_WT = texts_WT[:20], texts_WT[20:]
    if settings is None:
        perplexity = measure_perplexity(model, {"text": make_batches(test_WT, test_WT, 1)}, "tiny model")
        return {"measured": perplexity["text"], "kept": "", "distilled": None}
    dense_WTV = _predict(model, test_WT)
    config = gqaprune.PruningConfig(**settings, rate=rate)
    config = replace(config, repair=replace(config.repair, products="float32"))  # on every machine
    plan, report = gqaprune.prune(model, CalibrationSet(list(calibration_WT.split(4)), accumulation=1, seed=0), config)
    layers = json.dumps(plan.to_dict()["layers"])
    kept = hashlib.sha256(layers.encode()).hexdigest()[:16]
    distilled = report.distillation and report.distillation.divergence_after
    pruned_WTV = _predict(model, test_WT)
    divergence = (dense_WTV.exp() * (dense_WTV - pruned_WTV)).sum(-1).mean()
    return {"measured": float(divergence), "kept": kept, "distilled": distilled}


def is_same(before: Probe, now: Probe) -> bool:
    """Whether two probes describe the same method."""
    numbers = [(before[name] or 0.0, now[name] or 0.0) for name in ("measured", "distilled")]
    return before["kept"] == now["kept"] and all(math.isclose(*pair, rel_tol=TOLERANCE) for pair in numbers)


@torch.no_grad()
def _predict(model: LlamaForCausalLM, tokens_WT: torch.Tensor) -> torch.Tensor:
    return model(tokens_WT).logits.double().log_softmax(-1)


def _build(generator: torch.Generator) -> LlamaForCausalLM:
    """A random Llama with 6 query heads on 2 KV heads, the same on every machine."""
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model
