"""Prune-recover rounds: cuts between training steps, the optimizer made anew for what is left."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from test_module import fast_optimizer, make_data, make_trainer

from gqaprune import load_model
from gqaprune.callbacks import CheckpointExport, TaylorPruning
from gqaprune.common.console import console
from gqaprune.models.architecture import count_layer_parameters, find_blocks
from gqaprune.module import CausalLMModule
from gqaprune.training.recovery import RecoveryConfig

from tiny import PLAIN, make_tokens

PRUNING = {**PLAIN, "rate": 0.4, "allocation": "uniform"}


class Watch(Callback):
    """Keeps, for every optimizer there was, what it held, what was live, and how these moved."""

    def __init__(self) -> None:
        self.held: list[set[int]] = []
        self.live: list[dict[str, torch.nn.Parameter]] = []
        self.before: list[dict[str, torch.Tensor]] = []
        self.rates: list[list[float]] = []
        self.sizes: list[int] = []
        self.losses: list[float] = []
        self._optimizer: Any = None

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: torch.optim.Optimizer) -> None:
        if trainer.optimizers[0] is not self._optimizer:
            self._optimizer = trainer.optimizers[0]
            self.held.append({id(p) for group in optimizer.param_groups for p in group["params"]})
            self.live.append({name: p for name, p in pl_module.named_parameters() if p.requires_grad})
            self.before.append({name: p.detach().clone() for name, p in self.live[-1].items()})
            self.rates.append([])
            self.sizes.append(sum(count_layer_parameters(pl_module.model)))
        self.rates[-1].append(optimizer.param_groups[0]["lr"])

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.losses.append(float(trainer.callback_metrics["train/loss"]))


def recover(
    folder: Path, run: Path, recovery: RecoveryConfig, pruning: dict[str, Any] = PRUNING, **settings: Any
) -> tuple[CausalLMModule, Watch, TaylorPruning]:
    module = CausalLMModule(str(folder), recovery=recovery, optimizer=fast_optimizer, warmup_steps=1)
    watch, callback = Watch(), TaylorPruning(**pruning)
    if recovery.mode == "none":
        settings["limit_train_batches"] = 0
    trainer = make_trainer(run, CheckpointExport(str(run / "out")), callback, watch, **settings)
    trainer.fit(module, datamodule=make_data(folder, training={"batch_size": 2}))  # 16 steps
    return module, watch, callback


@pytest.mark.parametrize("mode", ["full", "lora", "lora+distill"])
@pytest.mark.parametrize("rounds", [2, 3])
def test_every_rounds_optimizer_holds_what_lives_and_moves_all_of_it(
    tiny_folder: Path, tmp_path: Path, mode: str, rounds: int
) -> None:
    module, watch, _ = recover(tiny_folder, tmp_path, RecoveryConfig(mode, lora_rank=4, rounds=rounds))
    assert len(watch.held) == rounds
    for number, (held, live, before) in enumerate(zip(watch.held, watch.live, watch.before, strict=True)):
        assert held == {id(p) for p in live.values()}
        assert [name for name, p in live.items() if torch.equal(p, before[name])] == []
        if number + 1 < rounds and mode == "full":
            gone = {name for name, p in live.items() if p.shape != watch.live[number + 1][name].shape}
            assert gone
    assert [len(rates) for rates in watch.rates] == [16 * (i + 1) // rounds - 16 * i // rounds for i in range(rounds)]
    assert all(0 < rates[0] < max(rates) > rates[-1] for rates in watch.rates)  # each warms up and decays

    tokens = make_tokens(2, 20)
    exported = load_model(tmp_path / "out").eval()
    torch.testing.assert_close(exported(tokens).logits, module.model.eval()(tokens).logits, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("allocation", ["uniform", "global"])
def test_each_round_spends_its_share_and_all_of_them_the_budget(
    tiny_folder: Path, tmp_path: Path, allocation: str
) -> None:
    dense = load_model(tiny_folder)
    before, unit = sum(count_layer_parameters(dense)), max(block.unit_parameters for block in find_blocks(dense))
    pruning = {**PRUNING, "allocation": allocation}
    module, watch, callback = recover(tiny_folder, tmp_path, RecoveryConfig(rounds=2), pruning)
    step = 3 * unit
    assert abs(before - watch.sizes[0] - 0.2 * before) <= step and abs(before - watch.sizes[1] - 0.4 * before) <= step
    assert module.plan is not None and module.plan.rate == 0.4
    cut = CausalLMModule(str(tiny_folder), plan=module.plan.to_dict())
    cut.load()
    shapes = {name: tensor.shape for name, tensor in module.model.state_dict().items()}
    assert {name: tensor.shape for name, tensor in cut.model.state_dict().items()} == shapes
    assert callback.report is not None
    assert [stage.name for stage in callback.report.stages] == ["dense", "pruned", "pruned, round 2"]


def test_what_is_left_is_scored_anew_after_recovery(tiny_folder: Path, tmp_path: Path) -> None:
    """The second round's choice depends on what the first one's training did."""
    plans = []
    for rate in (0.0, 0.05):
        module = CausalLMModule(
            str(tiny_folder),
            recovery=RecoveryConfig(rounds=2),
            optimizer=lambda groups, rate=rate: torch.optim.SGD(groups, lr=rate),  # type: ignore[misc]
        )
        callback = TaylorPruning(**{**PRUNING, "allocation": "global"})
        make_trainer(tmp_path, callback).fit(module, datamodule=make_data(tiny_folder, training={"batch_size": 2}))
        plans.append(module.plan)
    assert plans[0] != plans[1]


class SaveAt(Callback):
    """Writes a checkpoint after so many steps."""

    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("mode", ["full", "lora"])
@pytest.mark.parametrize("step", [5, 8, 11, 16, 20], ids=lambda step: f"step {step}")
def test_interrupted_rounds_go_on_as_if_they_had_not_been(
    tiny_folder: Path, tmp_path: Path, mode: str, step: int
) -> None:
    """16 steps an epoch, 2 epochs, the second round from step 16 on; same losses and weights to the last bit."""
    path, losses, weights = tmp_path / "a.ckpt", {}, {}
    for resumed in (False, True):
        plan = CausalLMModule.load_from_checkpoint(path, weights_only=True).plan if resumed else None
        module = CausalLMModule(
            str(tiny_folder),
            recovery=RecoveryConfig(mode, lora_rank=4, rounds=2),
            optimizer=fast_optimizer,
            plan=None if plan is None else plan.to_dict(),
        )
        watch, save = Watch(), SaveAt(-1 if resumed else step, path)
        trainer = make_trainer(tmp_path, TaylorPruning(**PRUNING), watch, save, max_epochs=2)
        data = make_data(tiny_folder, training={"batch_size": 2})
        trainer.fit(module, datamodule=data, ckpt_path=path if resumed else None, weights_only=True)
        losses[resumed], weights[resumed] = watch.losses, module.state_dict()
    assert len(losses[False]) == 32 and losses[True] == losses[False][step:]
    assert all(torch.equal(tensor, weights[True][name]) for name, tensor in weights[False].items())


class StopAt(Callback):
    """Ends training after so many steps."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        trainer.should_stop = trainer.global_step >= self.step


def test_pruning_without_training_spends_the_whole_budget(tiny_folder: Path, tmp_path: Path) -> None:
    _, _, callback = recover(tiny_folder, tmp_path, RecoveryConfig(rounds=2), limit_train_batches=0)
    assert callback.report is not None and callback.report.rate_reached == pytest.approx(0.4, abs=0.03)


def test_training_that_ends_early_says_what_was_not_spent(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "quiet", False)
    module = CausalLMModule(str(tiny_folder), recovery=RecoveryConfig(rounds=2), optimizer=fast_optimizer)
    trainer = make_trainer(tmp_path, TaylorPruning(**PRUNING), StopAt(3))
    trainer.fit(module, datamodule=make_data(tiny_folder, training={"batch_size": 2}))
    assert "50% of the budget is spent" in " ".join(capsys.readouterr().out.split())


def test_a_plan_that_was_given_is_whole(tiny_folder: Path, tmp_path: Path) -> None:
    plan = recover(tiny_folder, tmp_path, RecoveryConfig("none"))[0].plan
    assert plan is not None
    module = CausalLMModule(str(tiny_folder), recovery=RecoveryConfig(rounds=2), plan=plan.to_dict())
    make_trainer(tmp_path, TaylorPruning(**PRUNING)).fit(
        module, datamodule=make_data(tiny_folder, training={"batch_size": 2})
    )
    assert module.plan == plan and module.trainer.global_step == 16


def test_rounds_refuse_what_measures_whole_cuts(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="swaps.generations measures .*, but recovery.rounds 2 spends it in parts"):
        recover(tiny_folder, tmp_path, RecoveryConfig(rounds=2), {**PRUNING, "swaps": {"generations": 1}})


def test_every_round_compiles_the_layers_that_it_trains(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs: list[Any] = []

    def count(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compile_by = torch.compile
    monkeypatch.setattr("torch.compile", lambda call: compile_by(call, backend=count))
    limit = torch._dynamo.config.patch(recompile_limit=3)  # as many as there are layers, which differ
    monkeypatch.setattr("gqaprune.training.compilation.max", lambda *_: 3, raising=False)
    compiled = []
    for rounds in (1, 2):
        graphs.clear()
        torch.compiler.reset()
        module = CausalLMModule(
            str(tiny_folder), compile=True, recovery=RecoveryConfig(rounds=rounds), optimizer=fast_optimizer
        )
        trainer = make_trainer(tmp_path, TaylorPruning(**{**PRUNING, "allocation": "global"}))
        with limit:  # which monkeypatch would delete instead of putting it back
            trainer.fit(module, datamodule=make_data(tiny_folder, training={"batch_size": 2}))
        compiled.append(len(graphs))
    assert compiled[1] - 1 == 2 * (compiled[0] - 1)  # one sees before work whether anything compiles here
