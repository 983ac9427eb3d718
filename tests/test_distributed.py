"""Invariant 4: one process or several, same plan, same weights, same perplexity (gloo, CPU)."""

import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import enable_wrap
from torch.distributed.tensor import DTensor

import gqaprune
from gqaprune.common.distributed import check_same_on_all_ranks
from gqaprune.common.stage_cache import StageCache
from gqaprune.data.calibration import CalibrationSet
from gqaprune.data.sampling import sample_from_model
from gqaprune.data.windows import make_batches
from gqaprune.evaluation.perplexity import measure_perplexity
from gqaprune.models.architecture import find_blocks
from gqaprune.models.sources import find_tensors
from gqaprune.placement.fsdp import shard_model, wrap_model
from gqaprune.plan import PruningPlan
from gqaprune.planning.selection import make_plan
from gqaprune.scoring.repaired_damage import choose_levels, measure_repaired_damage
from gqaprune.scoring.scores import CRITERIA, score_units
from gqaprune.scoring.sensitivity import SENSITIVITIES
from gqaprune.surgery.cut import apply_plan
from gqaprune.surgery.distillation import distill, record_predictions
from gqaprune.surgery.repair import apply_plan_with_repair
from gqaprune.surgery.repair_config import RepairConfig
from gqaprune.training.objective import Objective
from gqaprune.training.recovery import RecoveryConfig

from tiny import make_model, make_plain, make_tokenizer, make_tokens

SCRIPT = """
import os, signal
import gqaprune.surgery.repair
from gqaprune.cli import main
from gqaprune.module import CausalLMModule
def stop(owner, name, calls):
    function, done = getattr(owner, name), []
    def call(*arguments):
        if len(done) == calls:
            os.kill(os.getpid(), signal.SIGKILL)
        done.append(1)
        return function(*arguments)
    setattr(owner, name, call)
stop(CausalLMModule, "training_step", int(os.environ["STEPS"]))
stop(gqaprune.surgery.repair, "refine_mlp", int(os.environ["REPAIRS"]))
raise SystemExit(main())
"""
"""The command, in a file that Lightning starts other ranks from; ranks kill themselves after so many calls."""


def run(folder: Path, command: str, config: Path, *arguments: str) -> Path:
    """Run a command in a folder; returns the folder of its logs."""
    done = start(folder, command, config, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "lightning_logs/version_0"


def start(folder: Path, command: str, config: Path, *arguments: str, steps: int = -1, repairs: int = -1) -> Any:
    """The same, whatever comes of it; killed after so many micro-batches, or MLPs that were repaired."""
    folder.mkdir(exist_ok=True)
    (folder / "run.py").write_text(SCRIPT)
    (folder / "cpu.py").write_text(CPU_STRATEGIES)
    line = [sys.executable, "run.py", command, "--config", str(config), *arguments]
    environment = os.environ | {"STEPS": str(steps), "REPAIRS": str(repairs), "DS_ACCELERATOR": "cpu"}
    return subprocess.run(line, cwd=folder, capture_output=True, text=True, timeout=300, env=environment)


def read_stages(logs: Path) -> list[dict[str, Any]]:
    return json.loads((logs / "report.json").read_text())["stages"]


@pytest.fixture(scope="module")
def config(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    settings = {
        "model": {"pretrained": str(tiny_folder), "dtype": "float32"},
        "data": {
            "calibration": {"windows": 10, "window": 32, "batch_size": 2},
            "training": {"window": 32, "tokens": 1024},
            "evaluation": {"window": 32, "tokens": 32 * 7, "batch_size": 1},  # 7 batches
        },
        "pruning": {
            "scheduling": {0: 2},
            "rate": 0.3,
            "allocation": "global",
            "criterion": "taylor",
            "repair": {"distill_tokens": 0},  # which sharded layers do without
        },
        "export": {"folder": "out"},
        "trainer": {"accelerator": "cpu", "max_epochs": 1, "enable_checkpointing": False, "enable_progress_bar": False},
    }
    path = tmp_path_factory.mktemp("configs") / "tiny.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def join_group(rank: int, world_size: int, folder: Path) -> None:
    """Make this process one of several; one alone needs no group."""
    if world_size > 1:
        address = f"file://{folder / 'rendezvous'}"
        torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=world_size)


def score_and_measure(rank: int, world_size: int, folder: Path) -> None:
    """Scores of every criterion, every sensitivity, a perplexity and sampled text, written by each rank."""
    join_group(rank, world_size, folder)
    model = make_model("qwen2")
    blocks, batches = find_blocks(model), [make_tokens(2, seed=seed) for seed in range(5)]
    result = {}
    for criterion, accumulate in product(CRITERIA, (2, 5)):  # windows of 2 + 2 + 1 micro-batches; one, none for rank 1
        scores = score_units(model, blocks, CalibrationSet(batches, accumulation=accumulate), criterion)
        result |= {f"{criterion} {accumulate} {key}": score for key, score in scores.items()}
    for name, measure in SENSITIVITIES.items():
        result |= {f"{name} {key}": torch.tensor(value) for key, value in measure(model, blocks, batches).items()}
    evaluation = {"text": make_batches(make_tokens(5), make_tokens(5), 1)}
    result["perplexity"] = torch.tensor(measure_perplexity(model, evaluation)["text"])
    cache = folder / f"samples of {world_size}"  # 3 batches: no even share for two ranks
    result["sampled text"] = sample_from_model(model, make_tokenizer(), 5, 12, batch_size=2, cache=cache)
    torch.save(result, folder / f"{world_size}-{rank}.pt")


def test_scores_sensitivities_perplexity_and_samples_of_two_processes_are_those_of_one(tmp_path: Path) -> None:
    score_and_measure(0, 1, tmp_path)
    torch.multiprocessing.spawn(score_and_measure, (2, tmp_path), nprocs=2)
    one, first, second = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("1-0", "2-0", "2-1"))
    for name, value in one.items():
        torch.testing.assert_close(first[name], value, rtol=1e-5, atol=0)
        assert torch.equal(first[name], second[name])
    assert len(list((tmp_path / "samples of 2").iterdir())) == 3


def damage_and_distill(rank: int, world_size: int, folder: Path) -> None:
    """Damage after repair of every block, and the weights that distillation leaves, written by each rank."""
    join_group(rank, world_size, folder)
    model, batches = make_model("qwen2"), [make_tokens(2, seed=seed) for seed in range(10)]
    blocks = find_blocks(model)
    scores = score_units(model, blocks, CalibrationSet(batches), "fisher")
    levels = {block.key: choose_levels(block.key.kind, block.units, block.units - 1) for block in blocks}
    damage = measure_repaired_damage(model, blocks, scores, {}, levels, batches, {4, 9})
    result = {str(cut): torch.tensor(value) for cut, value in damage.points.items()}
    result |= {f"order of {key}": order for key, order in damage.scores.items()}
    predictions = record_predictions(model, torch.cat(batches[:4]), batches[4], StageCache())
    apply_plan(model, gqaprune.PruningPlan.load(folder / "plan.json"))
    done = distill(model, predictions, RepairConfig(products="float32", distill_learning_rate=0.02), 0)
    result |= model.state_dict() | {"divergence": torch.tensor([done.divergence_before, done.divergence_after])}
    torch.save(result, folder / f"{world_size}-{rank}.pt")


def test_damage_after_repair_and_distillation_of_two_processes_are_those_of_one(tmp_path: Path) -> None:
    config = make_plain(rate=0.3, criterion="l1", limits={"attention_layers": (0, 3), "mlp_layers": (0, 3)})
    gqaprune.prune(make_model("qwen2"), [], config)[0].save(tmp_path / "plan.json")
    damage_and_distill(0, 1, tmp_path)
    torch.multiprocessing.spawn(damage_and_distill, (2, tmp_path), nprocs=2)
    one, first, second = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("1-0", "2-0", "2-1"))
    for name, value in one.items():
        torch.testing.assert_close(first[name], value, rtol=1e-3, atol=1e-5)
        assert torch.equal(first[name], second[name])


def prune_and_save(rank: int, world_size: int, folder: Path) -> None:
    """Plan and weights of whole prunings, or their errors, by what the last rank does otherwise; every rank writes."""
    join_group(rank, world_size, folder)
    batches = [make_tokens(2, seed=seed) for seed in range(5)]
    config = gqaprune.PruningConfig(rate=0.3, split="free", limits={"attention_layers": (0, 3), "mlp_layers": (0, 3)})

    def choose_others(model: Any, blocks: Any, scores: Any, *arguments: Any) -> Any:
        return make_plan(model, blocks, {key: -score for key, score in scores.items()}, *arguments)

    def repair_otherwise(model: Any, *arguments: Any) -> Any:
        model.lm_head.weight.data[0, 0] += 1e-3
        return apply_plan_with_repair(model, *arguments)

    for case, name, differ in (
        ("alike", "", None),
        ("plan", "planning.choice.make_plan", choose_others),
        ("weights", "pipeline.apply_plan_with_repair", repair_otherwise),
    ):
        model = make_model("qwen2")
        with pytest.MonkeyPatch.context() as patch:
            if differ is not None and rank == world_size - 1:
                patch.setattr(f"gqaprune.{name}", differ)
            try:
                plan, _ = gqaprune.prune(model, batches, config)
            except ValueError as error:
                (folder / f"{case}-{rank}.txt").write_text(str(error))
                continue
        plan.save(folder / f"{case}-{rank}.json")
        torch.save(model.state_dict(), folder / f"{case}-{rank}.pt")


@pytest.fixture(scope="module")
def prunings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prunings")
    torch.multiprocessing.spawn(prune_and_save, (2, folder), nprocs=2)
    return folder


def test_two_processes_score_prune_repair_and_refine_to_the_same_weights(prunings: Path) -> None:
    plans = [PruningPlan.load(prunings / f"alike-{rank}.json") for rank in range(2)]
    weights = [torch.load(prunings / f"alike-{rank}.pt", weights_only=True) for rank in range(2)]
    assert plans[0] == plans[1] and not plans[0].removes_nothing
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize(("case", "what"), [("plan", "pruning plans"), ("weights", "pruned weights")])
def test_all_processes_stop_where_one_ends_with_something_else(case: str, what: str, prunings: Path) -> None:
    errors = [(prunings / f"{case}-{rank}.txt").read_text() for rank in range(2)]
    assert errors[0] == errors[1] and f"the {what} of rank 1 differ from rank 0's, of 2 ranks" in errors[0]
    assert "or set trainer.devices to 1" in errors[0]


def test_one_process_agrees_with_itself() -> None:
    check_same_on_all_ranks("the plans", "any", torch.device("cpu"))


CPU_STRATEGIES = """
import torch
import lightning.pytorch.strategies as strategies
class FSDPStrategy(strategies.FSDPStrategy):
    '''Lightning's, which refuses CPUs by its name; torch does not.'''
class DeepSpeedStrategy(strategies.DeepSpeedStrategy):
    '''Lightning's, which refuses CPUs; deepspeed does not. Stage 3 leaves no parameter whole, small as these are.'''
    def __init__(self, stage: int = 2, parallel_devices=None, cluster_environment=None, accelerator=None):
        super().__init__(stage=stage)
        self.config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    def setup_environment(self) -> None:
        super(strategies.DeepSpeedStrategy, self).setup_environment()
    def setup_distributed(self) -> None:
        self.set_world_ranks()
        self._init_deepspeed_distributed()
    @property
    def root_device(self) -> torch.device:
        return torch.device("cpu", 0)
"""
"""Strategies for GPUs, as a file beside the command, on CPUs."""

DDP = ("--trainer.strategy", "ddp", "--trainer.devices", "2")
STRATEGY_FILES = Path(__file__).parent.parent / "configs/strategy"
FSDP2 = ("--config", str(STRATEGY_FILES / "fsdp2.yaml"), "--trainer.devices", "2")


def test_two_processes_prune_as_one(config: Path, tmp_path: Path) -> None:
    # Refinement's steps have other tokens on other numbers of processes: test_refinement looks at those.
    settings = ("--pruning.repair.epochs", "0")
    one = read_stages(run(tmp_path / "one", "prune", config, *settings))
    two = read_stages(run(tmp_path / "two", "prune", config, *settings, *DDP))
    assert PruningPlan.load(tmp_path / "one/out/plan.json") == PruningPlan.load(tmp_path / "two/out/plan.json")
    weights = [load_file(tmp_path / name / "out/model.safetensors") for name in ("one", "two")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    for mine, theirs in zip(one, two, strict=True):
        assert theirs["perplexity"] == pytest.approx(mine["perplexity"], rel=1e-6)


FSDP1 = (
    "--trainer.strategy", "cpu.FSDPStrategy", "--trainer.strategy.state_dict_type", "sharded",
    "--trainer.devices", "2", "--trainer.gradient_clip_val", "1.0",
)  # fmt: skip
DEEPSPEED_2, DEEPSPEED_3 = (
    ("--trainer.strategy", "cpu.DeepSpeedStrategy", "--trainer.strategy.stage", stage, "--trainer.devices", "2")
    for stage in "23"
)
SHARDED = ("--pruning.sharded", "true")
DISTILL = ("--model.recovery.mode", "lora+distill")


STRATEGIES = {
    "ddp": DDP,
    "fsdp2": FSDP2,
    "fsdp2-lora-distill": FSDP2 + DISTILL,
    "fsdp2-sharded-lora-distill": FSDP2 + SHARDED + DISTILL,
    "fsdp-lora-distill": FSDP1 + DISTILL,
    "deepspeed-2": DEEPSPEED_2,
    "deepspeed-3-lora-distill": DEEPSPEED_3 + DISTILL,
}


@pytest.mark.parametrize("name", STRATEGIES)
def test_two_processes_recover_and_export_what_they_measured(config: Path, tmp_path: Path, name: str) -> None:
    if name.startswith("deepspeed"):
        pytest.importorskip("deepspeed")
    logs = run(tmp_path / "fit", "fit", config, *STRATEGIES[name])
    dense, pruned, recovered = read_stages(logs)
    assert recovered["parameters"] == pruned["parameters"] < dense["parameters"]
    assert recovered["perplexity"]["val/embedded"] != pruned["perplexity"]["val/embedded"]

    events = EventAccumulator(str(logs))
    events.Reload()
    first, *_, last = (event.value for event in events.Scalars("learning_rate/matrices"))
    assert 0 < last < first  # the schedule is the run's own
    is_whole = name.startswith(("ddp", "deepspeed-2"))  # rank 0 can run it by itself
    assert any(tag.startswith("samples/") for tag in events.Tags()["tensors"]) == is_whole

    # 7 windows on two processes: none may count twice.
    logs = run(tmp_path / "validate", "validate", config, "--model.pretrained", str(tmp_path / "fit/out"), *DDP)
    events = EventAccumulator(str(logs))
    events.Reload()
    (measured,) = events.Scalars("ppl/embedded")
    assert measured.value == pytest.approx(recovered["perplexity"]["val/embedded"], rel=1e-5)


def test_two_processes_prune_sharded_layers_as_one_and_recover_them_as_whole_ones(config: Path, tmp_path: Path) -> None:
    settings = ("--pruning.repair.epochs", "0", "--pruning.criterion", "fisher+obs")
    one = read_stages(run(tmp_path / "one", "prune", config, *settings))
    two = read_stages(run(tmp_path / "two", "prune", config, *settings, *FSDP2, *SHARDED))
    assert PruningPlan.load(tmp_path / "one/out/plan.json") == PruningPlan.load(tmp_path / "two/out/plan.json")
    whole = load_file(tmp_path / "one/out/model.safetensors")
    for name, path in find_tensors(tmp_path / "two/out").items():
        torch.testing.assert_close(load_file(path)[name], whole.pop(name), rtol=1e-5, atol=1e-5)
    assert not whole
    for mine, theirs in zip(one, two, strict=True):
        assert theirs["perplexity"] == pytest.approx(mine["perplexity"], rel=1e-6)
        assert theirs["parameters"] == mine["parameters"]

    losses = {}
    pruned = ("--model.pretrained", str(tmp_path / "two/out"), "--pruning.rate", "0")
    decay = ("--model.optimizer", "AdamW", "--model.optimizer.lr", "1e-3", "--model.optimizer.weight_decay", "50")
    for name, strategy in (("ddp", DDP), ("fsdp2", FSDP2), ("fsdp", FSDP1)):
        events = EventAccumulator(str(run(tmp_path / name, "fit", config, *pruned, *decay, *strategy)))
        events.Reload()
        losses[name] = [event.value for event in events.Scalars("train/loss")]
    assert losses["fsdp2"] == pytest.approx(losses["ddp"], rel=1e-4) and len(losses["ddp"]) > 1
    assert losses["fsdp"] == pytest.approx(losses["ddp"], rel=1e-4)  # matrices decay where they are stored flat, too


def test_two_processes_prune_and_recover_in_rounds(config: Path, tmp_path: Path) -> None:
    """Both hold the same model after every cut: DDP would average what differs, and perplexity would not be shared."""
    settings = ("--model.recovery.rounds", "2", "--pruning.repair.method", "none")
    stages = read_stages(run(tmp_path / "fit", "fit", config, *settings, *DDP))
    assert [stage["name"] for stage in stages] == ["dense", "pruned", "pruned, round 2", "recovered"]
    dense, first, second, recovered = (stage["decoder_parameters"] for stage in stages)
    assert dense > first > second == recovered == pytest.approx(0.7 * dense, rel=0.02)
    logs = run(tmp_path / "validate", "validate", config, "--model.pretrained", str(tmp_path / "fit/out"))
    events = EventAccumulator(str(logs))
    events.Reload()
    (measured,) = events.Scalars("ppl/embedded")
    assert measured.value == pytest.approx(stages[-1]["perplexity"]["val/embedded"], rel=1e-5)


STOP_EARLY = {
    "callbacks": [
        {"class_path": f"lightning.pytorch.callbacks.{name}", "init_args": {"monitor": "ppl/embedded", **settings}}
        for name, settings in (("EarlyStopping", {"patience": 2}), ("ModelCheckpoint", {"save_weights_only": True}))
    ],
    "enable_checkpointing": True,
    "val_check_interval": 2,
}


@pytest.mark.parametrize("strategy", [FSDP2, FSDP1], ids=["fsdp2", "fsdp"])
def test_training_of_split_models_stops_early_and_exports_the_best_weights(
    config: Path, learned_folder: Path, tmp_path: Path, strategy: tuple[str, ...]
) -> None:
    (tmp_path / "early.yaml").write_text(yaml.safe_dump({"trainer": STOP_EARLY}))
    worse = ("--model.optimizer.init_args.lr", "1e-2", "--model.optimizer.init_args.maximize", "true")
    model = (
        "--model.pretrained",
        str(learned_folder),
        "--pruning.rate",
        "0.02",
        "--data.calibration.held_out_windows",
        "0",
    )
    settings = ("--config", str(tmp_path / "early.yaml"), "--data.training.tokens", "4096", *model, *worse)
    logs = run(tmp_path, "fit", config, *settings, *strategy)
    events = EventAccumulator(str(logs))
    events.Reload()
    _, best, *later = (event.value for event in events.Scalars("ppl/embedded"))  # the first is from before training
    assert len(later) == 2 and 1.01 * best < later[0] < later[1]
    logs = run(tmp_path / "validate", "validate", config, "--model.pretrained", str(tmp_path / "out"))
    events = EventAccumulator(str(logs))
    events.Reload()
    assert events.Scalars("ppl/embedded")[0].value == pytest.approx(best, rel=1e-4)


def read_guard(logs: Path) -> dict[str, Any]:
    return json.loads((logs / "guard.json").read_text())


def test_the_guard_stops_two_processes_with_the_diagnosis_of_one(
    config: Path, learned_folder: Path, tmp_path: Path
) -> None:
    layers = (
        "--pruning.limits.attention_layers",
        "[0,3]",
        "--pruning.limits.mlp_layers",
        "[0,3]",
        "--pruning.repair.method",
        "none",
    )
    model = ("--model.pretrained", str(learned_folder), "--pruning.rate", "0.6", "--pruning.split", "free")
    bounds = ("--guard.max_perplexity", "1e9", "--guard.warn_ratio", "1.1", "--guard.stop_ratio", "1.2")
    found = []
    for name, strategy in (("one", ()), ("ddp", DDP), ("fsdp2", FSDP2)):
        done = start(tmp_path / name, "prune", config, *model, *layers, *bounds, *strategy)
        assert done.returncode > 0 and "PerplexityGuard: after pruning the perplexity on held-out" in done.stderr
        assert "version_0" in done.stderr and "version_1" not in done.stderr  # every rank names the run's folder
        found.append(read_guard(tmp_path / name / "lightning_logs/version_0"))
        assert PruningPlan.load(tmp_path / name / "lightning_logs/version_0/plan.json").layers
        assert not (tmp_path / name / "out").exists()
    for other in found[1:]:
        assert other["diagnosis"]["verdict"]["cause"] == found[0]["diagnosis"]["verdict"]["cause"]
        assert other["perplexity"] == pytest.approx(found[0]["perplexity"], rel=1e-5)
        assert other["diagnosis"]["layers"] == pytest.approx(found[0]["diagnosis"]["layers"], rel=1e-5)


@pytest.mark.parametrize("strategy", [DDP, FSDP2], ids=["ddp", "fsdp2"])
def test_the_guard_stops_training_that_breaks_the_model_on_two_processes(
    config: Path, learned_folder: Path, tmp_path: Path, strategy: tuple[str, ...]
) -> None:
    model = ("--model.pretrained", str(learned_folder), "--pruning.rate", "0.02")
    worse = ("--model.optimizer.init_args.lr", "0.1", "--model.optimizer.init_args.maximize", "true")
    done = start(tmp_path, "fit", config, *model, *worse, "--trainer.val_check_interval", "2", *strategy)
    assert done.returncode > 0 and "PerplexityGuard: at step " in done.stderr
    assert "sync_dist" not in done.stderr
    found = read_guard(tmp_path / "lightning_logs/version_0")
    if strategy == DDP:
        assert found["diagnosis"]["verdict"]["cause"] == "repair"
    else:
        assert "diagnosis" not in found  # a split model is not diagnosed
    assert not (tmp_path / "out").exists()


CHECKPOINTS = (
    "--trainer.enable_checkpointing", "true", "--trainer.max_epochs", "2", "--trainer.val_check_interval", "4",
)  # fmt: skip


KILLED = {"ddp": DDP, "fsdp2-lora-distill": FSDP2 + DISTILL, "fsdp2-sharded": FSDP2 + SHARDED, "fsdp": FSDP1}


@pytest.mark.parametrize("strategy", KILLED.values(), ids=KILLED)
def test_two_killed_processes_end_as_others_do(config: Path, tmp_path: Path, strategy: list[str]) -> None:
    run(tmp_path / "whole", "fit", config, *CHECKPOINTS, *strategy)
    command = (tmp_path / "killed", "fit", config, *CHECKPOINTS, *strategy)
    assert start(*command, repairs=2).returncode == -9
    done = start(*command, steps=6)
    assert done.returncode == -9 and done.stdout.count("blocks: 4 of 5 are already done") == 1
    assert start(*command).returncode == 0
    assert not (tmp_path / "killed/lightning_logs/unfinished").exists()
    whole, killed = (load_file(tmp_path / name / "out/model.safetensors") for name in ("whole", "killed"))
    assert [name for name in whole if not torch.equal(whole[name], killed[name])] == []


def test_checkpoints_go_on_under_another_strategy_or_say_why_not(config: Path, tmp_path: Path) -> None:
    for name, strategy in (("ddp", DDP), ("fsdp2", FSDP2)):
        assert start(tmp_path / name, "fit", config, *CHECKPOINTS, *strategy, steps=6).returncode == -9
    done = start(tmp_path / "ddp", "fit", config, *CHECKPOINTS, "--ckpt_path", "last")
    assert done.returncode == 0 and ", from lightning_logs/version_0/checkpoints/epoch=0-step=2.ckpt" in done.stdout
    assert "; its settings were different: trainer.strategy was" in done.stdout
    done = start(tmp_path / "fsdp2", "fit", config, *CHECKPOINTS, "--ckpt_path", "last")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "SingleDeviceStrategy resumes from single files, but lightning_logs/version_0/checkpoints" in done.stderr


def test_two_processes_predict_every_prompt_once(config: Path, tmp_path: Path) -> None:
    prompts = ["--data.prompts", "[One, Two, Three]", "--model.max_new_tokens", "5"]
    alone, together = (
        json.loads((run(tmp_path / name, "predict", config, *prompts, *strategy) / "predictions.json").read_text())
        for name, strategy in (("alone", []), ("together", DDP))
    )
    assert [row["prompt"] for row in together["prompts"]] == ["One", "Two", "Three"]
    assert together == alone


def test_layers_on_disk_are_refused_on_several_processes(config: Path, tmp_path: Path) -> None:
    settings = ("--pruning.offload", "true", "--pruning.criterion", "obs")
    done = start(tmp_path / "disk", "prune", config, *settings, *DDP)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "pruning.offload needs a single device, got DDPStrategy: set trainer.devices to 1" in done.stderr


def test_rounds_are_refused_where_the_model_is_sharded(config: Path, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="recovery.rounds 2 cuts the whole model .*, but ModelParallelStrategy"):
        run(tmp_path / "fit", "fit", config, "--model.recovery.rounds", "2", *FSDP2)


def test_compiled_layers_are_refused_where_the_model_is_sharded(config: Path, tmp_path: Path) -> None:
    done = start(tmp_path / "fit", "fit", config, "--model.compile", "true", *FSDP2)
    assert done.returncode == 1 and "model.compile compiles whole layers, but ModelParallelStrategy" in done.stderr
    assert "dense:" not in done.stdout


@pytest.mark.parametrize(
    ("strategy", "arguments", "message"),
    [
        (DDP, (), "needs a ModelParallelStrategy that shards over all 2 processes, got DDPStrategy: set"),
        (FSDP2, ("--pruning.criterion", "param_first"), "criterion param_first needs the whole model in memory, which"),
        (
            FSDP2,
            ("--data.calibration.sampled_windows", "4"),
            "data.calibration.sampled_windows 4 needs the whole model in memory, but pruning.sharded",
        ),
        (FSDP2, ("--export.format", "gguf-f16"), "format gguf-f16 needs the whole model in memory, but pruning"),
    ],
)
def test_what_sharded_layers_exclude_is_said_before_any_work(
    config: Path, tmp_path: Path, strategy: tuple[str, ...], arguments: tuple[str, ...], message: str
) -> None:
    done = start(tmp_path / "refused", "prune", config, *SHARDED, *strategy, *arguments)
    assert done.returncode == 1 and message in done.stderr and "dense:" not in done.stdout


SRUN = """#!/bin/sh
for rank in 0 1; do SLURM_PROCID=$rank SLURM_LOCALID=$rank SLURM_NODEID=0 "$@" & done
wait $! && wait
"""
"""Starts what it is told to twice, as SLURM's would on one node of two tasks."""


@pytest.mark.parametrize("launcher", ["torchrun.sh", "slurm.sbatch"])
def test_launchers_run_one_command_on_two_processes(config: Path, tmp_path: Path, launcher: str) -> None:
    (tmp_path / "srun").write_text(SRUN)
    (tmp_path / "srun").chmod(0o755)
    path = os.pathsep.join([str(tmp_path), str(Path(sys.executable).parent), os.environ["PATH"]])
    settings = ("--pruning.repair.method", "none", "--trainer.strategy", "ddp", "--trainer.devices", "2")
    slurm = {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_NNODES": "1", "SLURM_JOB_ID": "1234"}
    slurm |= {"SLURM_JOB_NAME": "gqaprune", "SLURM_JOB_NODELIST": "localhost", "MASTER_ADDR": "127.0.0.1"}
    own = slurm if launcher == "slurm.sbatch" else {"PROCESSES": "2"}
    line = ["bash", str(STRATEGY_FILES / launcher), "prune", "--config", str(config), *settings]
    done = subprocess.run(
        line, cwd=tmp_path, capture_output=True, text=True, timeout=300, env=os.environ | {"PATH": path} | own
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "GLOBAL_RANK: 1, MEMBER: 2/2" in done.stderr
    assert not PruningPlan.load(tmp_path / "out/plan.json").removes_nothing
    assert [path.name for path in (tmp_path / "lightning_logs").iterdir()] == ["version_0"]


def distill_hidden_states(rank: int, world_size: int, folder: Path) -> None:
    """Distance of hidden states and a gradient of it, whole and as each strategy shards student and teacher."""
    join_group(rank, world_size, folder)
    ids, result = make_tokens(2, 12), {}
    for name in ("whole", "fsdp2", "fsdp"):
        objective = Objective(RecoveryConfig("distill", hidden_weight=1.0, hidden_layers=[0, 2]))
        student, objective.teacher = make_model("llama"), make_model("llama", seed=1)
        if name == "fsdp2":
            mesh = init_device_mesh("cpu", (world_size,))
            shard_model(student, mesh)
            objective.distribute_teacher(mesh, torch.device("cpu"))
        if name == "fsdp":
            with enable_wrap(wrapper_cls=FullyShardedDataParallel, use_orig_params=True):
                student = wrap_model(student, torch.device("cpu"))
                objective.distribute_teacher(None, torch.device("cpu"))
        loss, parts = objective.measure(student, {"input_ids": ids, "labels": ids})
        loss.backward()
        result[name] = parts["hidden_distance"].detach()
        if name != "fsdp":
            grad = student.model.layers[1].mlp.down_proj.weight.grad
            result[f"{name} gradient"] = grad.full_tensor() if isinstance(grad, DTensor) else grad
    torch.save(result, folder / f"distance-{rank}.pt")


def test_hidden_states_of_sharded_layers_are_those_of_whole_ones(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(distill_hidden_states, (2, tmp_path), nprocs=2)
    for rank in range(2):
        found = torch.load(tmp_path / f"distance-{rank}.pt", weights_only=True)
        for name in ("fsdp2", "fsdp"):
            torch.testing.assert_close(found[name], found["whole"])
        torch.testing.assert_close(found["fsdp2 gradient"], found["whole gradient"], rtol=1e-4, atol=1e-6)
