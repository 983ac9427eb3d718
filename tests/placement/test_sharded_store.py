"""Layers split over two processes (gloo, CPU) are pruned to what one process gives, and trained on from there."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from gqaprune import PruningConfig, PruningPlan, load_model, load_sharded_model, prune, save
from gqaprune.checkpoints.formats import check_written_by_layer
from gqaprune.data.calibration import CalibrationSet
from gqaprune.models.architecture import find_blocks, get_layers
from gqaprune.models.sources import find_tensors
from gqaprune.placement.fsdp import gather_state_dict, shard_model
from gqaprune.placement.layer_store import Placement, find_store, get_layer_parameters
from gqaprune.placement.sharded_store import ShardedStore
from gqaprune.planning.preflight import check_goes_by_layer
from gqaprune.scoring.scores import CRITERIA, score_units
from gqaprune.training.lora import add_adapters
from gqaprune.training.recovery import RecoveryConfig

from tiny import make_model, make_tokenizer, make_tokens

BATCHES = [make_tokens(3, 24, seed=seed) for seed in range(4)] + [make_tokens(1, 24, seed=9)]
"""No even share for two ranks: 3 batches and 2, of 7 windows and 6."""
TEXT = {"held": [{"input_ids": make_tokens(2, 24, seed=9), "labels": make_tokens(2, 24, seed=9)}] * 3}
TOKENS = make_tokens(2, 24, seed=5)
CONFIG: dict[str, Any] = {
    "rate": 0.3,
    "criterion": "fisher+obs",
    "allocation": "global",
    "split": "free",
    "limits": {"attention_layers": (0, 3), "mlp_layers": (0, 3)},
    # Refinement's steps have other tokens on other numbers of processes.
    "repair": {"epochs": 0, "distill_tokens": 0},
}
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "tied": ("qwen2-tied", {"criterion": "taylor", "repair": {"method": "none"}}),
    "norms": ("gemma3", {"steps": 2}),
    "queries": ("mistral", {"granularity": "query", "rate": 0.1, "criterion": "fisher"}),
    "biases": ("llama-biases", {"criterion": "l2+wanda", "allocation": "optimal"}),
    "stock": ("qwen2", {"allocation": "uniform", "split": None, "rate": 0.1}),
}
"""Name -> variant and settings."""
SCORED = [name for name, criterion in CRITERIA.items() if criterion.runs_held or criterion.goes_by_layer]


def run(model: PreTrainedModel, name: str) -> PruningPlan:
    return prune(
        model, CalibrationSet(BATCHES, accumulation=2), PruningConfig(**{**CONFIG, **RUNS[name][1]}), evaluation=TEXT
    )[0]


def score(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    blocks, result = find_blocks(model), {}
    for criterion in SCORED:
        for accumulate in (1, 5):  # with 5, nothing is left for rank 1
            scores = score_units(model, blocks, CalibrationSet(BATCHES, accumulation=accumulate), criterion)
            result |= {f"{criterion} {accumulate} {key}": score for key, score in scores.items()}
    return result


def score_with_checkpointing(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Scores by gates of a model that is set to recompute activations; it stays so."""
    model.activation_checkpointing_enable()
    model.train()
    scores = score_units(model, find_blocks(model), BATCHES, "fisher")
    assert all(module.training for module in model.modules())
    return {f"fisher 1 {key}": score for key, score in scores.items()}


def count_bytes(model: torch.nn.Module) -> int:
    """Bytes of memory behind the parameters that this rank holds, views of something larger as large as that."""
    parameters = (each.to_local() if isinstance(each, DTensor) else each for each in model.parameters())
    return sum(parameter.untyped_storage().nbytes() for parameter in parameters)


def watch_gathers(model: PreTrainedModel, patch: pytest.MonkeyPatch) -> list[int]:
    """Layers that are gathered, each while all others are in shards."""
    gathered: list[int] = []
    gather = ShardedStore.gather

    def record(store: ShardedStore, index: int) -> Any:
        shards = gather(store, index)
        whole = {name for name, parameter in model.named_parameters() if not isinstance(parameter, DTensor)}
        inside = {name for name in whole if ".layers." in name}
        assert inside == get_layer_parameters(model, index).keys() and shards.keys() == inside
        gathered.append(index)
        return shards

    patch.setattr(ShardedStore, "gather", record)
    return gathered


def measure_loss(model: PreTrainedModel) -> float:
    with torch.no_grad():
        return model(TOKENS, labels=TOKENS).loss.item()


def work(rank: int, folder: Path) -> None:
    """All that two processes do together: one group is slow to make."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder / 'group'}", rank=rank, world_size=2)
    mesh, facts = init_device_mesh("cpu", (2,)), {}
    for name in RUNS:
        model = load_sharded_model(folder / name / "dense", mesh)
        facts[f"{name} split"] = [count_bytes(layer) for layer in get_layers(model)]
        facts[f"{name} outside"] = count_bytes(model) - sum(facts[f"{name} split"])
        with pytest.MonkeyPatch.context() as patch:
            gathered = watch_gathers(model, patch)
            plan = run(model, name)
            save(model, make_tokenizer(), folder / name / "split", plan)
            assert len(gathered) > 20 or name == "tied"
        facts[f"{name} plan"] = plan.to_dict()
        facts[f"{name} cut"] = [count_bytes(layer) for layer in get_layers(model)]
        shard_model(model, mesh)
        assert find_store(model).is_in_memory
        facts[f"{name} trained on"] = measure_loss(model)
        model = load_sharded_model(folder / name / "split", mesh)
        shard_model(model, mesh)
        facts[f"{name} sharded"] = count_bytes(model)
        facts[f"{name} loss"] = measure_loss(model)
    torch.save(score(load_sharded_model(folder / "llama/dense", mesh)), folder / f"scores-{rank}.pt")
    torch.save(score_with_checkpointing(load_sharded_model(folder / "llama/dense", mesh)), folder / f"again-{rank}.pt")
    facts["overflow"] = overflow(load_sharded_model(folder / "llama/dense", mesh))
    facts["adapters"] = train_adapters(load_sharded_model(folder / "llama/dense", mesh), mesh)
    torch.save(changes(load_sharded_model(folder / "llama/dense", mesh)), folder / f"changes-{rank}.pt")
    torch.save(train(load_sharded_model(folder / "llama/dense", mesh), mesh), folder / f"trained-{rank}.pt")
    padded = load_sharded_model(folder / "padded", mesh)
    shard_model(padded, mesh)
    facts["padded"] = measure_loss(padded)
    (folder / f"facts-{rank}.json").write_text(json.dumps(facts))
    torch.distributed.destroy_process_group()


def overflow(model: PreTrainedModel) -> str:
    """What is said where the loss of one rank's batches is not finite."""
    model.get_input_embeddings().weight.data[255] = torch.inf
    rest = [batch.clamp(max=254) for batch in BATCHES]
    rest[2][0, 0] = 255  # of rank 0
    with pytest.raises(ValueError, match="is not finite") as raised:
        score_units(model, find_blocks(model), rest, "fisher")
    return str(raised.value)


def train_adapters(model: PreTrainedModel, mesh: Any = None) -> list[float]:
    """Losses around one step of LoRA."""
    add_adapters(model, RecoveryConfig(mode="lora"), seed=3)
    if mesh is not None:
        shard_model(model, mesh)
    return step(model)


def step(model: PreTrainedModel) -> list[float]:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    before = measure_loss(model)
    model(TOKENS, labels=TOKENS).loss.backward()
    optimizer.step()
    return [before, measure_loss(model)]


def train(model: PreTrainedModel, mesh: Any) -> dict[str, torch.Tensor]:
    """Whole weights after one step."""
    shard_model(model, mesh)
    step(model)
    state = gather_state_dict(model)
    assert state is not None
    return state


def changes(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """A layer held twice, once to change and once not."""
    weight = "model.layers.1.mlp.up_proj.weight"
    for kept in (True, False):
        with find_store(model).hold(1, changes=kept), torch.no_grad():
            model.get_parameter(weight).add_(1.0)
    return {name: parameter.detach().clone() for name, parameter in find_store(model).named_parameters()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("split")
    for name, (variant, _) in RUNS.items():
        model = make_model(variant, kv_heads=4)
        saved = model.model if name == "tied" else model  # without the head, whose names have no prefix
        saved.save_pretrained(folder / name / "dense", max_shard_size="20KB" if name == "llama" else "5GB")
        whole = load_model(folder / name / "dense")
        plan = run(whole, name)
        save(whole, make_tokenizer(), folder / name / "whole", plan)
        if name == "llama":
            save(whole, None, folder / "padded", plan, format="padded")
    torch.multiprocessing.spawn(work, (folder,), nprocs=2)
    return folder


def read_facts(folder: Path) -> list[dict[str, Any]]:
    return [json.loads((folder / f"facts-{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("name", RUNS)
def test_plan_and_weights_are_those_of_one_process(name: str, folder: Path) -> None:
    plan = PruningPlan.load(folder / name / "whole" / "plan.json")
    assert not plan.removes_nothing
    for facts in read_facts(folder):
        assert PruningPlan.from_dict(facts[f"{name} plan"]) == plan
    files = find_tensors(folder / name / "split")
    whole = load_file(folder / name / "whole" / "model.safetensors")
    assert files.keys() == whole.keys()
    for tensor, path in files.items():
        torch.testing.assert_close(load_file(path)[tensor], whole[tensor], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", RUNS)
def test_what_rank_0_writes_loads_without_gqaprune_and_computes_the_same(name: str, folder: Path) -> None:
    written, expected = (
        AutoModelForCausalLM.from_pretrained(folder / name / part, trust_remote_code=True).eval()
        for part in ("split", "whole")
    )
    with torch.no_grad():
        torch.testing.assert_close(written(TOKENS).logits, expected(TOKENS).logits, rtol=1e-4, atol=1e-4)
    assert not list((folder / name).glob(".*"))  # no rank leaves a temporary folder


def test_scores_are_those_of_one_process(folder: Path) -> None:
    expected = score(load_model(folder / "llama/dense"))
    first, second = (torch.load(folder / f"scores-{rank}.pt", weights_only=True) for rank in (0, 1))
    assert expected.keys() == first.keys() and {"fisher", "taylor", "obs", "l1"} <= set(SCORED)
    for name, value in expected.items():
        torch.testing.assert_close(first[name], value, rtol=1e-5, atol=0)
        assert torch.equal(first[name], second[name])
    again = torch.load(folder / "again-0.pt", weights_only=True)
    assert again
    for name, value in again.items():
        torch.testing.assert_close(value, first[name], rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", RUNS)
def test_each_rank_holds_half_of_every_layer_before_and_after_the_cut(name: str, folder: Path) -> None:
    dense, pruned = load_model(folder / name / "dense"), load_model(folder / name / "whole")
    for facts in read_facts(folder):
        for model, part in ((dense, "split"), (pruned, "cut")):
            for layer, held in zip(get_layers(model), facts[f"{name} {part}"], strict=True):
                assert held == pytest.approx(count_bytes(layer) / 2, rel=0.05)
        layers = sum(count_bytes(layer) for layer in get_layers(dense))
        assert facts[f"{name} outside"] == count_bytes(dense) - layers


@pytest.mark.parametrize("name", RUNS)
def test_what_is_trained_is_loaded_in_halves_and_gives_the_loss_of_the_whole(name: str, folder: Path) -> None:
    whole = load_model(folder / name / "split")
    loss, size = measure_loss(whole), count_bytes(whole)
    for facts in read_facts(folder):
        assert facts[f"{name} loss"] == facts[f"{name} trained on"] == pytest.approx(loss, rel=1e-5)
        assert facts[f"{name} sharded"] == pytest.approx(size / 2, rel=0.05)


def test_padded_checkpoints_are_loaded_sharded(folder: Path) -> None:
    expected = measure_loss(load_model(folder / "padded"))
    for facts in read_facts(folder):
        assert facts["padded"] == pytest.approx(expected, rel=1e-5)


def test_a_step_of_training_moves_the_weights_as_in_one_process(folder: Path) -> None:
    model = load_model(folder / "llama/dense")
    step(model)
    trained = torch.load(folder / "trained-0.pt", weights_only=True)
    assert trained.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(trained[name], tensor, rtol=1e-4, atol=1e-5)


def test_adapters_go_beside_shards_as_beside_whole_weights(folder: Path) -> None:
    before, after = train_adapters(load_model(folder / "llama/dense"))
    assert before != after
    for facts in read_facts(folder):
        assert facts["adapters"] == pytest.approx([before, after], rel=1e-5)


def test_a_layer_is_sharded_anew_only_if_it_is_said_to_change(folder: Path) -> None:
    model = load_model(folder / "llama/dense")
    model.get_parameter("model.layers.1.mlp.up_proj.weight").data.add_(1.0)
    for rank in (0, 1):
        changed = torch.load(folder / f"changes-{rank}.pt", weights_only=True)
        assert list(changed) == [name for name, _ in model.named_parameters()]
        assert all(torch.equal(changed[name], parameter) for name, parameter in model.named_parameters())


def test_all_ranks_say_what_overflows_on_one_instead_of_waiting(folder: Path) -> None:
    first, second = (facts["overflow"] for facts in read_facts(folder))
    assert "the loss of calibration batch 2 is not finite" in first
    assert "the loss of calibration text on another rank is not finite" in second


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"criterion": "param_first"}, "criterion param_first .* which sharded avoids: .* fisher, taylor"),
        ({"allocation": "inverse"}, "allocation inverse .* uniform, global or optimal"),
        ({"limits": {"frozen_layers": 1}}, "frozen_layers 1 .* to 0"),
        ({"allocation": "optimal", "damage": "gated"}, "damage gated .* to repaired"),
        ({"swaps": {"generations": 2}}, "swaps.generations 2 .* to 0"),
        ({"repair": {"method": "bias"}}, "repair.method bias .* least_squares"),
    ],
)
def test_what_needs_the_whole_model_is_refused_with_what_does_not(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_goes_by_layer(PruningConfig(**{**CONFIG, **settings}), Placement.DEVICES)
    check_goes_by_layer(PruningConfig(**CONFIG), Placement.DEVICES)


def test_formats_that_need_the_whole_model_are_refused() -> None:
    with pytest.raises(ValueError, match="format padded needs the whole model in memory, but pruning.sharded keeps"):
        check_written_by_layer("padded", None, Placement.DEVICES)
