"""TaylorPruning alone, in a LightningModule and a LightningDataModule of another project."""

import json
import os
import socket
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign import Their, TheirData, build, count_groups, make_rows, make_trainer, pad, prune
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader
from transformers import BatchEncoding

import gqaprune
from gqaprune.callbacks import CheckpointExport, PerplexityGuard, RunSummary, SampleGenerations
from gqaprune.common.console import console
from gqaprune.datamodules import TextDataModule
from gqaprune.module import CausalLMModule

from tiny import VOCABULARY


@pytest.mark.parametrize("place", ["init", "setup", "configure_model"])
def test_the_causal_lm_is_pruned_before_optimizers_are_built_wherever_it_is_built(place: str, tmp_path: Path) -> None:
    module = Their(place)
    trainer = make_trainer(tmp_path, callback := prune(allocation="uniform", rate=0.5))
    trainer.fit(module, datamodule=TheirData())
    assert count_groups(module.model) == [(4, 2)] * 3
    held = {id(parameter) for group in trainer.optimizers[0].param_groups for parameter in group["params"]}
    assert held == {id(parameter) for parameter in module.parameters()} and trainer.global_step == 2
    assert module.model.config.num_key_value_heads == 2 and len(module.seen) == 2
    assert callback.report is not None and [stage.name for stage in callback.report.stages][:2] == ["dense", "pruned"]
    assert "configure_model" not in vars(module)


def test_the_plan_does_not_depend_on_padding_nor_on_the_kind_of_batches(tmp_path: Path) -> None:
    rows = make_rows()
    padded = [pad(rows[:4]), pad(rows[4:], "left")]
    sorts = {
        "alone": [row[None] for batch in (rows[:4], rows[4:]) for row in sorted(batch, key=len)],
        "mappings": padded,
        "encodings": [BatchEncoding(batch) for batch in padded],
        "lists": [{name: value.tolist() for name, value in batch.items()} for batch in padded],
        "tuples": [(batch, 0) for batch in padded],
    }
    scores, plans = {}, {}
    for name, batches in sorts.items():
        module, callback = Their(), prune(calibration=batches)
        make_trainer(tmp_path / name, callback, limit_train_batches=0).fit(module, datamodule=TheirData())
        scores[name], plans[name] = callback.scores, count_groups(module.model)
        for key, alone in scores["alone"].items():
            torch.testing.assert_close(callback.scores[key], alone, rtol=1e-4, atol=1e-9)
    assert len(set(map(str, plans.values()))) == 1


def test_training_reads_the_batches_that_it_would_have_read_without_pruning(tmp_path: Path) -> None:
    seen = []
    shuffled = prune(calibration=TheirData().train_dataloader())
    for callbacks in ([], [prune()], [shuffled]):
        seed_everything(3)
        module = Their()
        make_trainer(tmp_path, *callbacks).fit(module, datamodule=TheirData())
        seen.append(module.seen)
    for own in seen[1:]:
        assert all(torch.equal(*pair) for pair in zip(seen[0], own, strict=True))


def test_calibration_batches_come_from_the_argument_the_data_the_module_or_training(tmp_path: Path) -> None:
    marks: list[str] = []

    def give(mark: str) -> Iterable[Any]:
        marks.append(mark)
        return [torch.stack(make_rows()[:1])]

    class Source(TheirData):
        def calibration_batches(self) -> Iterable[Any]:
            return give("data")

    class Own(Their):
        def calibration_batches(self) -> Iterable[Any]:
            return give("module")

        def train_dataloader(self) -> DataLoader[Any]:
            return TheirData().train_dataloader()

    make_trainer(tmp_path, prune(calibration=give("argument"))).fit(Own(), datamodule=Source())
    make_trainer(tmp_path, prune()).fit(Own(), datamodule=Source())
    make_trainer(tmp_path, prune()).fit(Own())
    assert marks == ["argument", "data", "module"]
    make_trainer(tmp_path, callback := prune()).fit(Their(), train_dataloaders=TheirData().train_dataloader())
    assert callback.report is not None and marks == ["argument", "data", "module"]


def test_what_the_module_is_otherwise_stays_as_it_was(tmp_path: Path) -> None:
    module = Their()
    module.model.eval().model.embed_tokens.requires_grad_(False)
    module.model.model.layers[1].mlp.requires_grad_(False)
    kept = module.model.model.embed_tokens.weight.clone()
    recipe = {"damage": "repaired", "allocation": "optimal", "repair": {"epochs": 1, "distill_tokens": 256}}
    make_trainer(tmp_path, prune(**recipe)).fit(module, datamodule=TheirData())
    frozen = [name for name, parameter in module.named_parameters() if not parameter.requires_grad]
    names = ("gate_proj", "up_proj", "down_proj")
    expected = ["model.model.embed_tokens.weight", *(f"model.model.layers.1.mlp.{name}.weight" for name in names)]
    assert sorted(frozen) == sorted(expected) and torch.equal(module.model.model.embed_tokens.weight, kept)
    assert not module.model.training


def test_a_run_goes_on_from_lightnings_own_checkpoint_in_its_pruned_shapes(tmp_path: Path) -> None:
    checkpoints = ModelCheckpoint(tmp_path / "saved", save_last=True, every_n_train_steps=1)
    first = Their()
    trainer = make_trainer(tmp_path, prune(), checkpoints, max_steps=2, enable_checkpointing=True)
    trainer.fit(first, datamodule=TheirData())
    second, callback = Their(), prune()
    trainer = make_trainer(tmp_path, callback, max_epochs=2)
    trainer.fit(second, datamodule=TheirData(), ckpt_path=str(tmp_path / "saved/last.ckpt"))
    assert count_groups(second.model) == count_groups(first.model) != count_groups(build())
    assert trainer.global_step == 4 and callback.report is not None and len(callback.report.stages) >= 2


def test_the_other_callbacks_work_beside_it_or_say_why_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(console, "quiet", False)
    module = Their()
    others = [RunSummary(), CheckpointExport(str(tmp_path / "out")), SampleGenerations(), PerplexityGuard(), prune()]
    make_trainer(tmp_path, *others).fit(module, datamodule=TheirData())
    out = " ".join(capsys.readouterr().out.split())
    assert "SampleGenerations is off" in out and "PerplexityGuard is off" in out and "TensorBoard" not in out
    saved = gqaprune.load_model(tmp_path / "out")
    ids = torch.stack(make_rows()[:1])
    with torch.no_grad():
        torch.testing.assert_close(saved(ids).logits, module.model(ids).logits)
    assert (tmp_path / "plan.json").exists() and "recovered" in (tmp_path / "report.json").read_text()


def test_a_second_fit_of_a_trainer_calibrates_on_its_own_text(tmp_path: Path) -> None:
    class Other(TheirData):
        def calibration_batches(self) -> Iterable[Any]:
            marks.append("other")
            return [torch.stack(make_rows()[:1])]

    marks: list[str] = []
    trainer = make_trainer(tmp_path, prune())
    trainer.fit(Their(), datamodule=TheirData())
    trainer.fit_loop.epoch_progress.reset()
    trainer.fit(Their(), datamodule=Other())
    assert marks == ["other"]


class FailsLate(Callback):
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        raise RuntimeError("too late")


def test_a_fit_that_failed_before_the_model_was_built_leaves_nothing_behind(tmp_path: Path) -> None:
    module = Their("configure_model")
    with pytest.raises(RuntimeError, match="too late"):
        make_trainer(tmp_path, prune(rate=0.5), FailsLate()).fit(module, datamodule=TheirData())
    make_trainer(tmp_path, prune(rate=0.5)).fit(module, datamodule=TheirData())
    assert count_groups(module.model) == [(4, 2)] * 3  # cut once
    assert "configure_model" not in vars(module)


class Nested(Their):
    def __init__(self) -> None:
        super().__init__("nowhere")
        self.inner = nn.Module()
        self.inner.lm = build()

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss: Tensor = self.inner.lm(**batch).loss
        return loss


def test_another_attribute_may_hold_the_causal_lm(tmp_path: Path) -> None:
    module = Nested()
    make_trainer(tmp_path, prune(model_attribute="inner.lm", rate=0.5)).fit(module, datamodule=TheirData())
    assert count_groups(module.inner.lm) == [(4, 2)] * 3


class Wrong(Their):
    def __init__(self) -> None:
        super().__init__("nowhere")
        self.model: Any = nn.Linear(2, 2)


@pytest.mark.parametrize(
    ("module", "settings", "sentence"),
    [
        (lambda: Their("nowhere"), {}, r"Their has no causal LM in .model: build it in __init__, setup or"),
        (Wrong, {}, r"Wrong.model is a Linear, not a causal LM"),
        (Their, {"sharded": True}, "pruning.sharded needs CausalLMModule and TextDataModule, got Their and TheirData"),
        (Their, {"calibration": [{"text": ["a"]}]}, "calibration batch 0 has no token ids: .* got a mapping with text"),
        (Their, {"calibration": []}, "have no row of at least 2 tokens"),
        (Their, {"calibration": [torch.full((1, 4), VOCABULARY)]}, "has the token id 260, but the model embeds ids"),
    ],
)
def test_what_cannot_be_pruned_is_refused_in_a_sentence(
    module: Callable[[], LightningModule], settings: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=sentence):
        make_trainer(tmp_path, prune(**settings)).fit(module(), datamodule=TheirData())


def test_trainers_that_would_fail_later_are_refused_before_work(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="trainer.accumulate_grad_batches 4 is set, but pruning.scheduling sets"):
        make_trainer(tmp_path, prune(), accumulate_grad_batches=4).fit(Their(), datamodule=TheirData())
    with pytest.raises(ValueError, match="EMAWeightAveraging copies the model before it is pruned: list"):
        make_trainer(tmp_path, EMAWeightAveraging(), prune()).fit(Their(), datamodule=TheirData())


def test_our_module_trains_on_their_data_and_theirs_on_ours(tiny_folder: Path, tmp_path: Path) -> None:
    model = build()
    ours = CausalLMModule(model)
    make_trainer(tmp_path / "a", prune(rate=0.5)).fit(ours, datamodule=TheirData())
    assert ours.model is model and count_groups(model) == [(4, 2)] * 3
    assert ours.plan is not None and not ours.plan.removes_nothing and ours.plan.fingerprint == ""
    sizes = {"calibration": {"windows": 4, "window": 32}, "training": {"window": 32, "tokens": 512}}
    text = TextDataModule(str(tiny_folder), **sizes, evaluation={"window": 32, "tokens": 256})  # type: ignore[arg-type]
    theirs, callback = Their(build=lambda: gqaprune.load_model(tiny_folder)), prune()

    class Plain(Their):
        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
            loss: Tensor = self.model(batch["input_ids"], labels=batch["labels"]).loss
            return loss

    theirs = Plain(build=lambda: gqaprune.load_model(tiny_folder))
    make_trainer(tmp_path / "b", callback, limit_val_batches=0).fit(theirs, datamodule=text)
    assert callback.report is not None and callback.report.stages[1].perplexity and callback.report.protocol


class Sharding(Their):
    """Shards its causal LM itself."""

    def configure_model(self) -> None:
        for layer in self.model.model.layers:
            fully_shard(layer, mesh=self.device_mesh["data_parallel"])  # type: ignore[index]
        fully_shard(self.model, mesh=self.device_mesh["data_parallel"])  # type: ignore[index]


def fit_in_rank(rank: int, folder: Path, strategy: str, port: int) -> None:
    """One of two ranks of a run, which shuffle differently."""
    torch.set_num_threads(1)
    own = {"LOCAL_RANK": rank, "NODE_RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in own.items()}
    torch.manual_seed(rank)
    module, callback = (Sharding if strategy == "fsdp2" else Their)(), prune()
    kind: Any = ModelParallelStrategy(2, 1) if strategy == "fsdp2" else strategy
    export = CheckpointExport(str(folder / "out"), format="padded")
    settings: dict[str, Any] = {"strategy": kind, "devices": 2, "use_distributed_sampler": False}
    make_trainer(folder, callback, export, **settings).fit(module, datamodule=TheirData())
    report = callback.report
    assert report is not None
    heads = [
        (layer.self_attn.q_proj.weight.shape[0], layer.mlp.up_proj.weight.shape[0])
        for layer in module.model.model.layers
    ]
    facts = {"heads": heads, "parameters": [stage.parameters for stage in report.stages]}
    weights = {name: float(value.double().sum()) for name, value in module.model.state_dict().items()}
    (folder / f"rank-{rank}.json").write_text(json.dumps(facts | {"weights": weights}))


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_ranks_prune_alike_though_they_shuffle_differently(strategy: str, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(fit_in_rank, (tmp_path, strategy, port), nprocs=2)
    first, second = (json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in (0, 1))
    assert first["heads"] == second["heads"] != [[64, 32]] * 3
    assert first["parameters"] == second["parameters"]
    assert gqaprune.load_model(tmp_path / "out").config.num_key_value_heads in (1, 2, 3, 4)
    if strategy == "ddp":
        assert first["weights"] == second["weights"]
