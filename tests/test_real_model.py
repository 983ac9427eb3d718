"""Invariants 2, 5 and 6 and the kept perplexity, on SmolLM2-135M."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import gqaprune
from gqaprune import PruningPlan, apply_plan, prune, read_windows
from gqaprune.data.corpora import parse_corpus
from gqaprune.data.windows import Batch, cut_windows, make_batches, tokenize_corpus
from gqaprune.evaluation.perplexity import measure_perplexity
from gqaprune.models.architecture import read_geometry
from gqaprune.plan import KeptUnits

from cuts import gate_logits
from tiny import make_plain


def load_dense(folder: Path) -> PreTrainedModel:
    return gqaprune.load_model(folder)


def read_test_text(folder: Path, tokens: int = 1024) -> dict[str, list[Batch]]:
    text = tokenize_corpus(gqaprune.load_tokenizer(folder), parse_corpus("embedded", "test"), tokens)
    return {"embedded": make_batches(*cut_windows(text, 256), 4)}


def draw_plan_at_random(model: PreTrainedModel, groups: int, channels: int) -> PruningPlan:
    generator = torch.Generator().manual_seed(0)

    def draw(count: int, kept: int) -> tuple[int, ...]:
        return tuple(torch.randperm(count, generator=generator)[:kept].sort().values.tolist())

    geometry = read_geometry(model.config)
    return PruningPlan(geometry, tuple(KeptUnits(draw(3, groups), draw(1536, channels)) for _ in geometry.kv_heads))


def test_surgery_equals_gating(smollm_folder: Path) -> None:
    model = load_dense(smollm_folder).double()  # exactly, for a plan by chance; in float32 for real plans below
    plan = draw_plan_at_random(model, 2, 1400)
    tokens = read_test_text(smollm_folder)["embedded"][0]["input_ids"][:1, :64]
    expected = gate_logits(model, plan, tokens)
    apply_plan(model, plan)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, expected, atol=1e-10, rtol=0)


def test_rate_zero_changes_no_bit(smollm_folder: Path) -> None:
    model, untouched = load_dense(smollm_folder), load_dense(smollm_folder)
    prune(model, [], make_plain(rate=0.0))
    for one, other in zip(model.state_dict().values(), untouched.state_dict().values(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("allocation", ["uniform", "global"])
def test_pruned_model_keeps_its_perplexity_and_loads_with_the_same_logits(
    smollm_folder: Path, tmp_path: Path, allocation: str
) -> None:
    model, tokenizer = gqaprune.load(smollm_folder)
    batches = list(read_windows(tokenizer, ["embedded"], window=256, count=16, limit=20_000).split(4))
    evaluation = read_test_text(smollm_folder)
    config = make_plain(rate=0.1, allocation=allocation, limits={"attention_layers": (14, 22), "mlp_layers": (2, 30)})
    plan, report = prune(model, batches, config, evaluation=evaluation)

    assert report.rate_reached == pytest.approx(0.1, abs=0.001)
    assert plan.pruned_geometry.ratios == (3,) * 30
    dense, pruned = (stage.perplexity["embedded"] for stage in report.stages)
    assert pruned < 1.5 * dense
    by_chance = load_dense(smollm_folder)
    apply_plan(by_chance, draw_plan_at_random(by_chance, 3, 1332))  # 10 % of the decoder, chosen at random
    assert pruned < 0.6 * measure_perplexity(by_chance, evaluation)["embedded"]

    tokens = evaluation["embedded"][0]["input_ids"]
    gated = gate_logits(load_dense(smollm_folder), plan, tokens[:1])
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(tokens[:1]).logits, gated, atol=1e-4, rtol=0)

    gqaprune.save(model, tokenizer, tmp_path / "out", plan)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True).eval()
    with torch.no_grad():
        assert torch.equal(plain(tokens).logits, model(tokens).logits)
