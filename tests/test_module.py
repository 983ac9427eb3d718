"""The module in Lightning's loop: pruned before the optimizer, accumulated, scheduled, resumed."""

from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import LambdaCallback
from lightning.pytorch.strategies import SingleDeviceStrategy

import gqaprune
from gqaprune.callbacks import TaylorPruning
from gqaprune.checkpoints.save import save
from gqaprune.common.console import console
from gqaprune.data.calibration import CalibrationSet
from gqaprune.datamodules import TextDataModule
from gqaprune.evaluation.perplexity import measure_perplexity
from gqaprune.models.architecture import count_parameters
from gqaprune.models.fingerprint import fingerprint_weights
from gqaprune.module import CausalLMModule
from gqaprune.planning.selection import keep_everything
from gqaprune.training.recovery import RecoveryConfig

from tiny import PLAIN, make_model, make_plain, make_tokenizer, merge_settings


def make_data(folder: Path, **settings: Any) -> TextDataModule:
    sizes = {
        "calibration": {"windows": 4, "window": 32},
        "training": {"window": 32, "tokens": 1024},
        "evaluation": {"window": 32, "tokens": 256},
    }
    return TextDataModule(str(folder), **merge_settings(sizes, settings))


def make_trainer(folder: Path, *callbacks: Callback, **settings: Any) -> Trainer:
    return Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        **{"max_epochs": 1, "enable_checkpointing": False, "limit_val_batches": 0, **settings},
    )


def fast_optimizer(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2)


class Probe(Callback):
    """Keeps what the optimizer holds and the learning rates it uses."""

    def __init__(self) -> None:
        self.before: dict[str, torch.Tensor] = {}
        self.rates: list[float] = []

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.before = {name: p.detach().clone() for name, p in pl_module.named_parameters()}
        self.held = [p for group in trainer.optimizers[0].param_groups for p in group["params"]]

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: torch.optim.Optimizer) -> None:
        self.rates.append(optimizer.param_groups[0]["lr"])


def test_optimizer_holds_exactly_the_live_parameters_and_moves_every_one(tiny_folder: Path, tmp_path: Path) -> None:
    module, probe = CausalLMModule(str(tiny_folder), optimizer=fast_optimizer), Probe()
    pruning = TaylorPruning(scheduling={0: 2}, rate=0.3, **PLAIN | {"allocation": "global"})
    make_trainer(tmp_path, pruning, probe).fit(module, datamodule=make_data(tiny_folder))
    live = dict(module.named_parameters())
    assert {id(p) for p in probe.held} == {id(p) for p in live.values()}
    assert count_parameters(module.model) < 40_000
    assert [name for name, p in live.items() if torch.equal(p, probe.before[name])] == []


def test_callback_accumulates_gradients_by_epoch_as_its_scheduling_says(tiny_folder: Path, tmp_path: Path) -> None:
    probe = Probe()
    pruning = TaylorPruning(scheduling={0: 4, 1: 2}, rate=0.0)
    trainer = make_trainer(tmp_path, pruning, probe, max_epochs=2)
    trainer.fit(CausalLMModule(str(tiny_folder)), datamodule=make_data(tiny_folder, training={"batch_size": 4}))
    assert trainer.global_step == len(probe.rates) == 2 + 4  # 8 micro-batches an epoch


def test_calibration_windows_follow_the_first_epochs_accumulation(tiny_folder: Path, tmp_path: Path) -> None:
    """Taylor scores depend on the window; those of the callback are those of the pipeline with that window."""
    from gqaprune import load_model, prune

    data = make_data(tiny_folder, calibration={"windows": 12, "batch_size": 1})
    plans = {}
    for factor in (1, 6):
        settings = {**PLAIN, "rate": 0.3, "criterion": "taylor", "allocation": "global"}
        module = CausalLMModule(str(tiny_folder))
        pruning = TaylorPruning(scheduling={0: factor, 1: 3}, **settings)
        make_trainer(tmp_path, pruning, limit_train_batches=0).fit(module, datamodule=data)
        plan, _ = prune(
            load_model(tiny_folder),
            CalibrationSet(data.calibration_batches(), accumulation=factor),
            make_plain(**settings),
        )  # type: ignore[arg-type]
        assert module.plan is not None and module.plan.layers == plan.layers
        plans[factor] = plan.layers
    assert plans[1] != plans[6]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_learning_rate_warms_up_and_ends_with_the_run(tiny_folder: Path, tmp_path: Path, schedule: Any) -> None:
    probe = Probe()
    module = CausalLMModule(str(tiny_folder), optimizer=fast_optimizer, schedule=schedule, warmup_steps=2)
    trainer = make_trainer(tmp_path, TaylorPruning(scheduling={0: 2, 1: 1}, rate=0.0), probe, max_epochs=2)
    trainer.fit(module, datamodule=make_data(tiny_folder, training={"batch_size": 4}))
    assert len(probe.rates) == 12  # 4 + 8 steps
    assert probe.rates[:3] == pytest.approx([1 / 300, 2 / 300, 0.01])
    assert probe.rates[-1] == pytest.approx({"cosine": 2.4e-4, "linear": 1e-3, "constant": 1e-2}[schedule], rel=0.05)


def test_a_run_of_one_step_changes_the_weights_and_one_that_changes_none_says_so(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(console, "quiet", False)
    said = []
    for rate in (1e-2, 0.0):
        module = CausalLMModule(str(tiny_folder), optimizer=partial(torch.optim.SGD, lr=rate), warmup_steps=5)
        make_trainer(tmp_path, max_steps=1).fit(module, datamodule=make_data(tiny_folder))
        dense = gqaprune.load_model(tiny_folder).state_dict()
        changed = any(not torch.equal(value, dense[name]) for name, value in module.model.state_dict().items())
        assert changed == (rate > 0)
        said.append("training changed no weight in 1 steps" in " ".join(capsys.readouterr().out.split()))
    assert said == [False, True]


def test_random_state_is_left_alone_unless_something_is_dropped(tiny_folder: Path, tmp_path: Path) -> None:
    seeded = []
    for dropout in (0.0, 0.1):
        module = CausalLMModule(str(tiny_folder), recovery=RecoveryConfig("lora", lora_rank=2, lora_dropout=dropout))
        make_trainer(tmp_path, max_steps=1).fit(module, datamodule=make_data(tiny_folder))
        seeded.append(module._draws_numbers)
    assert seeded == [False, True]


def test_lightning_checkpoint_carries_the_plan_and_resumes_pruned(tiny_folder: Path, tmp_path: Path) -> None:
    pruning = TaylorPruning(rate=0.3, **PLAIN | {"allocation": "global"})
    trainer = make_trainer(tmp_path, pruning, enable_checkpointing=True)
    module = CausalLMModule(str(tiny_folder), optimizer=fast_optimizer)
    trainer.fit(module, datamodule=make_data(tiny_folder))
    trainer.save_checkpoint(tmp_path / "run.ckpt")

    loaded = CausalLMModule.load_from_checkpoint(tmp_path / "run.ckpt", weights_only=True)
    loaded.load()
    assert loaded.plan == module.plan
    again = TaylorPruning(rate=0.3, **PLAIN | {"allocation": "global"})
    trainer = make_trainer(tmp_path, again, max_epochs=2)
    resumed = CausalLMModule(str(tiny_folder), plan=module.plan.to_dict())  # type: ignore[union-attr]
    trainer.fit(resumed, datamodule=make_data(tiny_folder), ckpt_path=str(tmp_path / "run.ckpt"), weights_only=True)
    assert trainer.current_epoch == 2 and again.report is not None
    assert [stage.name for stage in again.report.stages] == ["dense", "pruned"]  # as the first run measured them


def test_lightning_checkpoints_keep_the_names_that_earlier_ones_have(tiny_folder: Path, tmp_path: Path) -> None:
    """Runs that an earlier version began are resumed from them."""
    module = CausalLMModule(str(tiny_folder), recovery=RecoveryConfig("lora", lora_rank=2))
    trainer = make_trainer(tmp_path, TaylorPruning(rate=0.3, **PLAIN | {"allocation": "global"}), max_steps=1)
    trainer.fit(module, datamodule=make_data(tiny_folder))
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    checkpoint = torch.load(tmp_path / "run.ckpt", weights_only=True)
    assert checkpoint["run"] == module.run_id and checkpoint["recovery"] == asdict(module.recovery)
    assert checkpoint["rounds_done"] == 0 and checkpoint["strategy"] == "SingleDeviceStrategy"
    assert checkpoint["hyper_parameters"]["plan"] == module.plan.to_dict()  # type: ignore[union-attr]
    assert checkpoint["hyper_parameters"]["pretrained"] == str(tiny_folder)
    projection = "_model.model.layers.0.self_attn.q_proj"
    names = {"base_layer.weight", "lora_A.default.weight", "lora_B.default.weight"}
    assert {name.removeprefix(f"{projection}.") for name in checkpoint["state_dict"] if projection in name} == names


def test_strategies_that_accumulate_by_themselves_want_one_factor_which_the_trainer_has(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SingleDeviceStrategy, "handles_gradient_accumulation", True)  # as DeepSpeed's does
    module, data = CausalLMModule(str(tiny_folder)), make_data(tiny_folder)
    with pytest.raises(ValueError, match=r"is \{0: 4, 2: 8\}: set it to a single number, such as \{0: 4\}"):
        make_trainer(tmp_path, TaylorPruning(scheduling={0: 4, 2: 8})).fit(module, datamodule=data)
    with pytest.raises(ValueError, match=r"is \{0: 4\}: set trainer.accumulate_grad_batches to 4 as well"):
        make_trainer(tmp_path, TaylorPruning(scheduling={0: 4})).fit(module, datamodule=data)


def test_loss_that_is_not_finite_stops_with_the_step(tiny_folder: Path, tmp_path: Path) -> None:
    module = CausalLMModule(str(tiny_folder), optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1e30))
    with pytest.raises(ValueError, match=r"the training loss is (nan|inf) at step \d+, batch \d+: lower the learning"):
        make_trainer(tmp_path, TaylorPruning(rate=0.0)).fit(module, datamodule=make_data(tiny_folder))


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_gradients_of_a_fused_optimizer_are_clipped_in_mixed_precision(
    tiny_folder: Path, tmp_path: Path, algorithm: Any
) -> None:
    module = CausalLMModule(
        str(tiny_folder),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1.0, fused=True),
        schedule="constant",
        warmup_steps=0,
    )
    probe, bound = Probe(), 1e-3
    settings: Any = {"max_steps": 1, "precision": "bf16-mixed", "gradient_clip_algorithm": algorithm}
    trainer = make_trainer(tmp_path, TaylorPruning(rate=0.0), probe, gradient_clip_val=bound, **settings)
    trainer.fit(module, datamodule=make_data(tiny_folder))
    moves = torch.cat([(p - probe.before[name]).flatten() for name, p in module.named_parameters()])
    moved = moves.norm() if algorithm == "norm" else moves.abs().max()
    assert float(moved) == pytest.approx(bound, rel=0.02)


def test_gradient_checkpointing_is_on_in_training(tiny_folder: Path, tmp_path: Path) -> None:
    module = CausalLMModule(str(tiny_folder), gradient_checkpointing=True)
    module.load()
    assert module.model.training and module.model.is_activation_checkpointing


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_compiled_layers_train_as_they_are_and_are_compiled_in_training_only(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    compiled = []
    compile_eagerly = partial(torch.compile, backend="aot_eager")  # the whole way but for C++
    monkeypatch.setattr("torch.compile", lambda call: compiled.append(call) or compile_eagerly(call))
    weights = []
    for compiles in (False, True):
        module = CausalLMModule(
            str(tiny_folder), compile=compiles, recovery=RecoveryConfig(mode=mode), optimizer=fast_optimizer
        )
        pruning = TaylorPruning(rate=0.3, **PLAIN | {"allocation": "global"})
        torch.manual_seed(0)
        make_trainer(tmp_path, pruning, max_steps=2).fit(module, datamodule=make_data(tiny_folder))
        weights.append(torch.cat([p.detach().flatten() for p in module.model.parameters()]))
        assert len(compiled) == (1 + 3 if compiles else 0)  # one to see whether it can be done
    torch.testing.assert_close(weights[1], weights[0], atol=1e-4, rtol=1e-4)
    assert all(layer._compiled_call_impl is None for layer in module.model.model.layers)


def test_a_machine_that_compiles_nothing_is_said_before_any_work(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: Any) -> None:
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr("torch.compile", refuse)
    monkeypatch.setattr(TextDataModule, "setup", lambda *_: pytest.fail("text was read"))
    with pytest.raises(ValueError, match=r"torch cannot compile here: no C\+\+ compiler; set model.compile to false"):
        make_trainer(tmp_path, TaylorPruning(rate=0.3)).fit(
            CausalLMModule(str(tiny_folder), compile=True), datamodule=make_data(tiny_folder)
        )


def test_a_few_batches_can_be_overfitted(tiny_folder: Path, tmp_path: Path) -> None:
    module = CausalLMModule(str(tiny_folder), optimizer=fast_optimizer)
    data = make_data(tiny_folder, evaluation={"val": []}, training={"batch_size": 2})
    losses: list[float] = []
    probe = LambdaCallback(on_train_batch_end=lambda *arguments: losses.append(float(arguments[2]["loss"])))
    trainer = make_trainer(tmp_path, TaylorPruning(rate=0.0), probe, overfit_batches=2, max_epochs=8)
    trainer.fit(module, datamodule=data)
    assert trainer.global_step == len(losses) == 16 and losses[-1] < losses[1]


def test_loaders_without_a_data_module_are_trained_on_and_measured(tiny_folder: Path, tmp_path: Path) -> None:
    data, module = make_data(tiny_folder), CausalLMModule(str(tiny_folder))
    trainer = make_trainer(tmp_path, limit_val_batches=1.0)
    trainer.fit(module, data.train_dataloader(), data.val_dataloader())
    (measured,) = measure_perplexity(module.model, data.evaluation_batches(["val"])).values()
    assert float(trainer.callback_metrics["ppl/0"]) == pytest.approx(measured, rel=1e-5)


@pytest.mark.parametrize(("variant", "settings"), [("llama", {}), ("mixtral", {"output_router_logits": True})])
def test_the_loss_and_its_gradients_are_those_of_transformers(
    variant: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    model = make_model(variant)
    model.config.update(settings)
    gqaprune.save(model, make_tokenizer(), tmp_path)
    expected: dict[str, Any] = {}

    def compute(trainer: Trainer, module: CausalLMModule, batch: dict[str, torch.Tensor], *_: Any) -> None:
        output = module.model(input_ids=batch["input_ids"], labels=batch["labels"])
        assert bool(settings) == (getattr(output, "aux_loss", None) is not None)
        names, parameters = zip(*module.named_parameters(), strict=True)
        gradients = torch.autograd.grad(output.loss, parameters, allow_unused=True)  # not every expert is chosen
        expected.update(loss=output.loss.item(), gradients=dict(zip(names, gradients, strict=True)))

    def compare(trainer: Trainer, module: CausalLMModule, *_: Any) -> None:
        assert float(trainer.callback_metrics["train/loss"]) == pytest.approx(expected["loss"], rel=1e-5)
        for name, parameter in module.named_parameters():
            if (gradient := expected["gradients"][name]) is not None:
                torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-7, msg=name)

    watch = LambdaCallback(on_train_batch_start=compute, on_before_optimizer_step=compare, on_train_batch_end=compare)
    trainer = make_trainer(tmp_path, watch, max_steps=1)
    trainer.fit(CausalLMModule(str(tmp_path)), datamodule=make_data(tmp_path))
    assert trainer.global_step == 1 and expected


def test_models_are_remembered_by_absolute_paths(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny_folder.parent)
    module = CausalLMModule(tiny_folder.name)
    pruning = TaylorPruning(scheduling={0: 2}, rate=0.3, **PLAIN | {"allocation": "global"})
    trainer = make_trainer(tmp_path, pruning)
    trainer.fit(module, datamodule=make_data(tiny_folder))
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    plan, report = module.plan, pruning.report
    assert plan is not None and report is not None
    assert plan.model == report.model == module.hparams["pretrained"] == str(tiny_folder)
    assert plan.fingerprint == fingerprint_weights(tiny_folder)
    monkeypatch.chdir(tmp_path)
    again = CausalLMModule.load_from_checkpoint(tmp_path / "run.ckpt", weights_only=True)
    assert all(torch.equal(p, module.get_parameter(name)) for name, p in again.named_parameters())


def test_a_plan_that_is_given_names_the_model_that_it_cuts_here(tiny_folder: Path, tmp_path: Path) -> None:
    other = replace(keep_everything(make_model(channels=32)), model="/another/one", fingerprint="ab")
    other.save(tmp_path / "plan.json")
    module = CausalLMModule(str(tiny_folder), plan=str(tmp_path / "plan.json"))
    module.load()
    assert module.plan == replace(other, model=str(tiny_folder), fingerprint=fingerprint_weights(tiny_folder))


def test_a_run_does_not_resume_on_another_model(tiny_folder: Path, tmp_path: Path) -> None:
    save(make_model(channels=32, seed=1), make_tokenizer(), tmp_path / "other")
    data, name = keep_everything(make_model(channels=32)), str(tiny_folder)
    plan = replace(data, model=name, fingerprint=fingerprint_weights(tiny_folder)).to_dict()
    make_trainer(tmp_path).fit(CausalLMModule(name, plan=plan), datamodule=make_data(tiny_folder))
    with pytest.raises(ValueError, match=f"other is not the model .* for \\({name}\\).*; set model.pretrained to that"):
        make_trainer(tmp_path).fit(
            CausalLMModule(str(tmp_path / "other"), plan=plan), datamodule=make_data(tiny_folder)
        )
