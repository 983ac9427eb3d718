"""Recovery: what each mode trains, towards what, and what is left of it on disk."""

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from peft import PeftModel
from test_module import Probe, fast_optimizer, make_data, make_trainer
from transformers import AutoModelForCausalLM, PreTrainedModel

import gqaprune
from gqaprune import load_model
from gqaprune.callbacks import CheckpointExport, TaylorPruning
from gqaprune.data.sampling import sample_from_model
from gqaprune.evaluation.perplexity import measure_perplexity
from gqaprune.models.architecture import count_parameters
from gqaprune.models.soft_targets import measure_divergence
from gqaprune.module import CausalLMModule
from gqaprune.training.recovery import MODES, RecoveryConfig

from tiny import PLAIN, make_tokenizer, make_tokens

PRUNING = {**PLAIN, "rate": 0.3, "allocation": "uniform"}


def recover(
    folder: Path, run: Path, recovery: RecoveryConfig, epochs: int = 1, **data: Any
) -> tuple[CausalLMModule, Probe]:
    module, probe = CausalLMModule(str(folder), recovery=recovery, optimizer=fast_optimizer), Probe()
    callbacks = (CheckpointExport(str(run / "out")), TaylorPruning(**PRUNING), probe)
    limits = {"limit_train_batches": 0} if recovery.mode == "none" else {}
    make_trainer(run, *callbacks, max_epochs=epochs, **limits).fit(module, datamodule=make_data(folder, **data))
    return module, probe


@torch.no_grad()
def diverge(model: PreTrainedModel, dense: PreTrainedModel, folder: Path) -> float:
    (tokens,) = make_data(folder).evaluation_batches(["val"]).values()
    tokens = torch.cat([batch["input_ids"] for batch in tokens])
    return float(measure_divergence(model.eval()(tokens).logits, dense.eval()(tokens).logits))


@pytest.mark.parametrize("targets", [None, ["q_proj", "down_proj"]], ids=["all", "two"])
def test_lora_trains_every_adapter_and_nothing_else(tiny_folder: Path, tmp_path: Path, targets: Any) -> None:
    config = RecoveryConfig("lora", lora_rank=4, lora_targets=targets)
    module, probe = recover(tiny_folder, tmp_path, config)
    moved = {name for name, p in module.named_parameters() if not torch.equal(p, probe.before[name])}
    adapters = {name for name in probe.before if ".lora_" in name}
    assert moved == adapters and len(adapters) == 2 * 3 * (7 if targets is None else 2)
    assert {id(p) for p in probe.held} == {id(p) for name, p in module.named_parameters() if name in adapters}
    assert all(4 in p.shape for name, p in module.named_parameters() if name in adapters)


def test_lora_is_merged_on_export_and_kept_beside(tiny_folder: Path, tmp_path: Path) -> None:
    module, _ = recover(tiny_folder, tmp_path, RecoveryConfig("lora", lora_rank=4))
    tokens, model = make_tokens(2, 20), module.model.eval()
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(exported(tokens).logits, model(tokens).logits, atol=1e-5, rtol=1e-4)
    assert not any("lora" in name for name in exported.state_dict())

    assert module.plan is not None
    cut = CausalLMModule(str(tiny_folder), plan=module.plan.to_dict())
    cut.load()
    assert not torch.allclose(cut.model.eval()(tokens).logits, exported(tokens).logits, atol=1e-3)
    adapted = PeftModel.from_pretrained(cut.model, str(tmp_path / "out" / "adapter")).eval()
    torch.testing.assert_close(adapted(tokens).logits, exported(tokens).logits, atol=1e-5, rtol=1e-4)
    files = {file.suffix for file in (tmp_path / "out" / "adapter").iterdir()}
    assert ".safetensors" in files and not files & {".bin", ".pt", ".pkl"}


@pytest.mark.parametrize(
    "config",
    [
        RecoveryConfig("distill"),
        RecoveryConfig("distill", temperature=2.0, hidden_weight=1.0, hidden_layers=[0, 2]),
        RecoveryConfig("lora+distill", lora_rank=8),
    ],
    ids=["logits", "hidden too", "lora"],
)
def test_distillation_brings_predictions_back_to_the_dense_models(
    tiny_folder: Path, tmp_path: Path, config: RecoveryConfig
) -> None:
    module, _ = recover(tiny_folder, tmp_path, config, epochs=4)
    dense = load_model(tiny_folder)
    assert module.plan is not None
    cut = CausalLMModule(str(tiny_folder), plan=module.plan.to_dict())
    cut.load()
    exported = load_model(tmp_path / "out")
    assert diverge(exported, dense, tiny_folder) < 0.8 * diverge(cut.model, dense, tiny_folder)


def test_the_teacher_stays_as_it_is_and_is_not_saved(tiny_folder: Path, tmp_path: Path) -> None:
    module, probe = recover(tiny_folder, tmp_path, RecoveryConfig("distill"))
    teacher = module._objective.teacher
    assert teacher is not None
    dense = load_model(tiny_folder)
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
    assert all(torch.equal(p, q) for p, q in zip(teacher.parameters(), dense.parameters(), strict=True))
    held, own = {id(p) for p in probe.held}, {id(p) for p in teacher.parameters()}
    assert not held & own and set(module.state_dict()) == {f"_model.{name}" for name in module.model.state_dict()}


def test_without_recovery_nothing_is_trained(tiny_folder: Path, tmp_path: Path) -> None:
    module, _ = recover(tiny_folder, tmp_path, RecoveryConfig("none"))
    assert module.plan is not None and module.trainer.global_step == 0
    cut = CausalLMModule(str(tiny_folder), plan=module.plan.to_dict())
    cut.load()
    exported = load_model(tmp_path / "out").state_dict()
    assert all(torch.equal(tensor, exported[name]) for name, tensor in cut.model.state_dict().items())


@pytest.mark.parametrize("resumed", [False, True], ids=["pruned here", "plan given"])
def test_recovery_reads_text_that_the_dense_model_wrote(
    tiny_folder: Path, tmp_path: Path, resumed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gqaprune.datamodules.text.sample_from_model", partial(sample_from_model, cache=None))
    data = make_data(tiny_folder, training={"corpora": [], "sampled_windows": 8, "batch_size": 8})
    plan = recover(tiny_folder, tmp_path, RecoveryConfig("none"))[0].plan if resumed else None
    module = CausalLMModule(str(tiny_folder), plan=None if plan is None else plan.to_dict())
    trainer = make_trainer(tmp_path, TaylorPruning(**PRUNING))
    trainer.fit(module, datamodule=data)
    (batch,) = data.train_dataloader()
    dense = load_model(tiny_folder)
    expected = sample_from_model(dense, data.tokenizer, 8, 32, seed=data.seed + 1, cache=None)
    assert trainer.global_step == 1 and sorted(batch["input_ids"].tolist()) == sorted(expected.tolist())
    fresh = make_data(tiny_folder, training={"corpora": [], "sampled_windows": 8})
    with pytest.raises(ValueError, match="training.sampled_windows is 8: call sample_train_windows"):
        fresh.train_dataloader()


def test_weights_decay_in_matrices_only(tiny_folder: Path, tmp_path: Path) -> None:
    module = CausalLMModule(str(tiny_folder), optimizer=lambda groups: torch.optim.AdamW(groups, weight_decay=0.1))
    trainer = make_trainer(tmp_path, TaylorPruning(**PRUNING))
    trainer.fit(module, datamodule=make_data(tiny_folder))
    decays = {p.ndim: group["weight_decay"] for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert decays == {1: 0.0, 2: 0.1}


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "none"])
def test_an_interrupted_run_goes_on_as_if_it_had_not_been(tiny_folder: Path, tmp_path: Path, mode: str) -> None:
    recovery, losses = RecoveryConfig(mode, lora_rank=4), {}
    plan = None
    for name, epochs, checkpoint in (("whole", 2, None), ("first", 1, None), ("resumed", 2, tmp_path / "first.ckpt")):
        module = CausalLMModule(
            str(tiny_folder), recovery=recovery, optimizer=fast_optimizer, schedule="constant", plan=plan
        )
        trainer = make_trainer(tmp_path, TaylorPruning(**PRUNING), max_epochs=epochs)
        torch.manual_seed(0)
        trainer.fit(
            module,
            datamodule=make_data(tiny_folder, training={"batch_size": 32}),
            ckpt_path=checkpoint,
            weights_only=True,
        )
        if name == "first":
            trainer.save_checkpoint(tmp_path / "first.ckpt")
        plan = plan or module.plan.to_dict()  # type: ignore[union-attr]
        losses[name] = float(trainer.callback_metrics["train/loss"])
    assert losses["resumed"] == pytest.approx(losses["whole"], rel=1e-6) and losses["first"] != losses["whole"]


class Spoil(Callback):
    """Raises the learning rate beyond all bounds after so many steps."""

    def __init__(self, step: int, rate: float) -> None:
        self.step, self.rate = step, rate

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step >= self.step:
            for group in trainer.optimizers[0].param_groups:
                group["lr"] = self.rate


@pytest.mark.parametrize("written", [True, False])
def test_a_loss_that_is_not_finite_names_the_last_good_checkpoint(
    tiny_folder: Path, tmp_path: Path, written: bool
) -> None:
    """Steps 1 to 4 are sound, the fifth breaks the weights: checkpoints of steps 4 and 5 are written, 4 is named."""
    module = CausalLMModule(str(tiny_folder), schedule="constant", optimizer=partial(torch.optim.SGD, lr=1e-3))
    keep = ModelCheckpoint(tmp_path / "kept", "{step}", every_n_train_steps=1, save_top_k=-1)
    trainer = make_trainer(
        tmp_path, TaylorPruning(**PRUNING), Spoil(4, float("inf")), *([keep] if written else []),
        enable_checkpointing=written,
    )  # fmt: skip
    sentence = (
        r"step 5, batch 5.*resume with --ckpt_path .*step=4.ckpt"
        if written
        else "no checkpoint with finite weights was"
    )
    with pytest.raises(ValueError, match=sentence):
        trainer.fit(module, datamodule=make_data(tiny_folder, training={"batch_size": 2}))
    assert not written or (tmp_path / "kept" / "step=5.ckpt").exists()


@pytest.mark.parametrize("rounds", [1, 2])
def test_the_best_weights_are_exported(tiny_folder: Path, tmp_path: Path, rounds: int) -> None:
    """Training is spoilt after its first half: what is exported is the best, unless that is less pruned."""
    module = CausalLMModule(
        str(tiny_folder), recovery=RecoveryConfig(rounds=rounds), schedule="constant", optimizer=fast_optimizer
    )
    best = ModelCheckpoint(tmp_path / "kept", monitor="ppl/embedded", save_weights_only=True)
    trainer = make_trainer(
        tmp_path, CheckpointExport(str(tmp_path / "out")), TaylorPruning(**PRUNING), Spoil(9, 0.3), best,
        enable_checkpointing=True, limit_val_batches=1.0, val_check_interval=4, num_sanity_val_steps=0,
    )  # fmt: skip
    data = make_data(tiny_folder, training={"batch_size": 2})
    trainer.fit(module, datamodule=data)
    assert "step=8" in best.best_model_path
    exported, batches = load_model(tmp_path / "out"), data.evaluation_batches(["val"])
    (perplexity,) = measure_perplexity(exported, batches).values()
    if rounds == 1:
        assert perplexity == pytest.approx(float(best.best_model_score), rel=1e-4)  # type: ignore[arg-type]
    else:
        assert perplexity > 2 * float(best.best_model_score)  # type: ignore[arg-type]
        assert count_parameters(exported) == count_parameters(module.model)


@pytest.mark.parametrize("mode", ["full", "lora", "distill"])
def test_lightning_checkpoints_load_without_further_arguments(tiny_folder: Path, tmp_path: Path, mode: str) -> None:
    module, _ = recover(tiny_folder, tmp_path, RecoveryConfig(mode, lora_rank=4, lora_targets=["q_proj"]))
    module.trainer.save_checkpoint(tmp_path / "a.ckpt")
    loaded, tokens = CausalLMModule.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True), make_tokens(2, 20)
    torch.testing.assert_close(loaded.model.eval()(tokens).logits, module.model.eval()(tokens).logits)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"mode": "lorra"}, "recovery.mode must be one of none, full, lora.*got 'lorra'"),
        ({"lora_rank": 0}, "lora_rank >= 1.*got 0"),
        ({"temperature": 0.0}, "temperature > 0.*got 0.0"),
        ({"distill_weight": 1.5}, "distill_weight in"),
        ({"hidden_layers": [0, -1]}, r"hidden_layers must be decoder layers, counted from 0, got .0, -1."),
        ({"rounds": 0}, "rounds must be at least 1, got 0"),
        ({"teacher_top_k": -1}, "teacher_top_k must be at least 0, got -1"),
        ({"teacher_top_k": 8, "hidden_weight": 1.0}, "hidden_weight 1.0 needs the teacher in memory"),
    ],
)
def test_settings_out_of_bounds_are_refused(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        RecoveryConfig(**settings)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"vocab_size": 300}, "has vocab_size 300, .* has 260: use a teacher with vocab_size 260"),
        ({"hidden_size": 96}, "has hidden_size 96, .* has 24"),
        ({"num_hidden_layers": 2}, r"hidden_layers must be in 0..1, got \[2\]"),
    ],
)
def test_a_teacher_that_cannot_be_learned_from_is_refused_before_any_work(
    tiny_folder: Path, tmp_path: Path, change: dict[str, int], sentence: str
) -> None:
    config = json.loads((tiny_folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))  # and no weights
    recovery = RecoveryConfig("distill", teacher=str(tmp_path), hidden_weight=1.0, hidden_layers=[2])
    with pytest.raises(ValueError, match=sentence):
        recover(tiny_folder, tmp_path, recovery)


def test_pruned_checkpoints_learn_from_the_model_that_they_come_from(tiny_folder: Path, tmp_path: Path) -> None:
    gqaprune.save(load_model(tiny_folder), make_tokenizer(), tmp_path / "copy")
    recover(tmp_path / "copy", tmp_path, RecoveryConfig("none"))
    module = CausalLMModule(str(tmp_path / "out"), recovery=RecoveryConfig("distill"))
    trainer, data = make_trainer(tmp_path, TaylorPruning(rate=0.0)), make_data(tiny_folder)
    trainer.fit(module, datamodule=data)
    teacher = module._objective.teacher
    assert teacher is not None
    assert count_parameters(teacher) == count_parameters(load_model(tiny_folder)) > count_parameters(module.model)

    shutil.rmtree(tmp_path / "copy")
    with pytest.raises(ValueError, match="no teacher .*: no model at .*copy: .* set model.recovery.teacher"):
        make_trainer(tmp_path, TaylorPruning(rate=0.0)).fit(
            CausalLMModule(str(tmp_path / "out"), recovery=RecoveryConfig("distill")), datamodule=data
        )


def test_an_end_by_time_alone_needs_a_constant_rate(tiny_folder: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"max_epochs": -1, "max_time": {"seconds": 1}}
    with pytest.raises(ValueError, match="schedule cosine .* trainer.max_time alone does not set it: set train"):
        make_trainer(tmp_path, TaylorPruning(rate=0.0), **settings).fit(
            CausalLMModule(str(tiny_folder)), datamodule=make_data(tiny_folder)
        )
    trainer = make_trainer(tmp_path, TaylorPruning(rate=0.0), **settings)
    trainer.fit(CausalLMModule(str(tiny_folder), schedule="constant"), datamodule=make_data(tiny_folder))
    assert trainer.global_step >= 1 and trainer.optimizers[0].param_groups[0]["lr"] == 1e-5


def test_unknown_targets_are_refused_with_those_there_are(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"got \['k', 'qq'\]: use q_proj, k_proj"):
        recover(tiny_folder, tmp_path, RecoveryConfig("lora", lora_targets=["qq", "k", "q_proj"]))
