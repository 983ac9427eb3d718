"""Mixtures of experts: attention and shared MLPs are pruned, the experts left alone, and that is said."""

from pathlib import Path

import pytest
import torch

from gqaprune import PruningConfig, load_model, prune
from gqaprune.checkpoints.save import save
from gqaprune.models.architecture import find_blocks, read_geometry
from gqaprune.reporting.report import build_table
from gqaprune.surgery.cut import apply_plan
from gqaprune.surgery.repair import apply_plan_with_repair

from cuts import make_plan, make_repair
from tiny import WHOLE_MLP, make_model, make_tokens

BATCHES = [make_tokens(4, 30, seed=seed) for seed in range(6)]
every = pytest.mark.parametrize("variant", [*WHOLE_MLP, "qwen2_moe"])


@every
def test_experts_stay_to_the_bit_and_the_report_says_so(variant: str) -> None:
    model, dense = make_model(variant, kv_heads=4), make_model(variant, kv_heads=4)
    config = PruningConfig(
        rate=0.1, split="free", allocation="global", limits={"attention_layers": (0, 3), "mlp_layers": (0, 3)}
    )
    plan, report = prune(model, BATCHES, config)
    assert plan.pruned_geometry != plan.geometry
    before = dense.state_dict()
    experts = {
        name: tensor for name, tensor in model.state_dict().items() if ".experts." in name or ".mlp.gate." in name
    }
    assert len(experts) == 9 and all(torch.equal(tensor, before[name]) for name, tensor in experts.items())
    share = sum(p.numel() for name, p in dense.named_parameters() if ".experts." in name)
    share /= sum(p.numel() for name, p in dense.named_parameters() if ".layers." in name)
    assert report.note == f"experts are not pruned: {share:.1%} of the decoder's parameters"
    assert report.note in str(build_table(report).caption) and report.to_dict()["note"] == report.note


@every
def test_repair_brings_it_nearer(variant: str) -> None:
    dense, cut, repaired = (make_model(variant, kv_heads=4) for _ in range(3))
    has_mlp = len(find_blocks(dense)) == 6
    kept = [list(range(0, 20, 2))] * 3 if has_mlp else [[]] * 3
    plan = make_plan(dense, [[0, 2], [0, 1, 2, 3], [1, 3]], kept)
    apply_plan(cut, plan)
    repairs = apply_plan_with_repair(repaired, plan, BATCHES, make_repair(pull=0.5, everywhere=True))
    assert {repair.key.kind for repair in repairs} == {"attention", *(["mlp"] if has_mlp else [])}
    with torch.no_grad():
        logits, own, others = (model(BATCHES[0]).logits for model in (dense, repaired, cut))
    assert (own - logits).norm() < 0.9 * (others - logits).norm()


@every
@pytest.mark.parametrize("format", ["stock", "per-layer", "padded"])
def test_every_format_loads_with_the_same_logits(variant: str, format: str, tmp_path: Path) -> None:
    model = make_model(variant, kv_heads=4)
    has_mlp = len(find_blocks(model)) == 6
    groups = [[0, 2]] * 3 if format == "stock" else [[0, 2], [0, 1, 2, 3], [1]]
    widths = [[range(10)] * 3, [range(7), range(20), range(8)]][format != "stock"]
    plan = make_plan(model, groups, [list(width) if has_mlp else [] for width in widths])
    apply_plan(model, plan)
    save(model, None, tmp_path / "out", plan, format=format)
    loaded = load_model(tmp_path / "out")
    assert format == "padded" or read_geometry(loaded.config) == plan.pruned_geometry
    with torch.no_grad():
        torch.testing.assert_close(loaded(BATCHES[0]).logits, model(BATCHES[0]).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("variant", WHOLE_MLP)
def test_mlps_that_are_experts_alone_cannot_be_asked_to_give(variant: str) -> None:
    with pytest.raises(ValueError, match=r"MLPs of \w+ models stay whole: its MLPs are experts.*set split: free"):
        prune(make_model(variant), BATCHES, PruningConfig(rate=0.1, split="0:10"))
