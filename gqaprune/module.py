"""The LightningModule around a causal LM: fine-tuning, perplexity, generation."""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, replace
from inspect import signature
from pathlib import Path
from textwrap import shorten
from typing import Any, Literal, Protocol, overload, runtime_checkable
from uuid import uuid4

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.utilities import GradClipAlgorithmType
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.optim import Optimizer
from transformers import PreTrainedModel

from gqaprune.checkpoints.origin import find_teacher
from gqaprune.common.atomic_files import remove_leftovers
from gqaprune.common.console import console
from gqaprune.common.errors import first_line
from gqaprune.common.paths import expand_path
from gqaprune.common.renamed import RenamedAttributes
from gqaprune.common.unregistered import Unregistered
from gqaprune.data.given_batches import align_batch
from gqaprune.data.windows import Batch
from gqaprune.datamodules import TextDataModule
from gqaprune.evaluation.generation import continue_greedily
from gqaprune.evaluation.perplexity import CorpusPerplexities
from gqaprune.models.fingerprint import find_fingerprint
from gqaprune.models.sources import make_absolute, pin
from gqaprune.placement.fsdp import distribute_model
from gqaprune.placement.layer_store import find_store
from gqaprune.placement.model_source import ModelInMemory, ModelSource
from gqaprune.plan import PruningPlan
from gqaprune.surgery.cut_loading import load_cut_model
from gqaprune.training.accumulation import count_round_steps
from gqaprune.training.change_watch import ChangeWatch
from gqaprune.training.checkpoint_files import check_is_local, guard_loading, guard_restoring, load_weights_alone
from gqaprune.training.compilation import LayerCompiler
from gqaprune.training.lightning_internals import HYPER_PARAMETERS, WEIGHTS, find_trainer, unwrap_factory
from gqaprune.training.lora import Adapters
from gqaprune.training.loss_watch import LossWatch
from gqaprune.training.objective import Objective
from gqaprune.training.optimizers import OptimizerConfig, clip_gradients, name_matrices
from gqaprune.training.recovery import RecoveryConfig
from gqaprune.training.resume import list_run_folders
from gqaprune.training.seeding import draws_random_numbers, seed_by_place
from gqaprune.training.stopping import StopTogether


@runtime_checkable
class ChecksSettings(Protocol):
    """A callback that checks settings in the first hook of a fit, before text is read or a model is loaded."""

    def check_settings(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Raise a `ValueError`, with a setting that works, for settings that would stop the run later."""


class CausalLMModule(RenamedAttributes, LightningModule):
    """A causal LM to prune, fine-tune, measure and prompt.

    Args:
        pretrained: the model: a folder, a `.gguf` file, a hub name, or `smollm2-135m` (embedded, needs no hub); in
            Python also a loaded causal LM, which is then changed in place.
        dtype: type of the weights: `float32`, `bfloat16`, `float16`, or `auto` (the type in the checkpoint).
        attn_implementation: attention kernel, `sdpa` or `eager`; null lets transformers choose.
        trust_remote_code: run code that comes with the checkpoint. gqaprune loads pruned checkpoints without it.
        gradient_checkpointing: recompute activations in the backward pass, in training and in scoring: less memory, but
            one more forward pass.
        compile: compile the decoder layers with `torch.compile` for training steps; the first steps take minutes, and a
            CPU needs a C++ compiler. Not possible if a strategy shards the model.
        recovery: what recovery trains, and on which loss.
        optimizer: optimizer class and its arguments; built after pruning on the parameters that are left, with weight
            decay for matrices only.
        schedule: learning rate after the warm-up: falls to 0 (`cosine`, `linear`) or stays the same (`constant`).
        warmup_steps: number of optimizer steps over which the learning rate rises to its full value; null uses a
            twentieth of all steps.
        max_new_tokens: largest number of tokens that `predict` adds to each prompt; repetition becomes visible after
            about fifty.
        plan: pruning plan to apply on loading instead of calibrating: the path of a `plan.json`, or its content, as
            Lightning checkpoints store it.
        revision: branch, tag or commit of a model on the hub, for its tokenizer, config, weights and code.
    """

    @overload
    def __init__(self, pretrained: str, *arguments: Any, **settings: Any) -> None: ...

    @overload
    def __init__(self, pretrained: PreTrainedModel, *arguments: Any, **settings: Any) -> None: ...

    def __init__(
        self,
        pretrained: str,
        dtype: str = "auto",
        attn_implementation: str | None = None,
        trust_remote_code: bool = False,
        gradient_checkpointing: bool = False,
        compile: bool = False,
        recovery: RecoveryConfig = RecoveryConfig(),  # noqa: B008  (never changed)
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=1e-5, weight_decay=0.01, fused=True),
        schedule: Literal["cosine", "linear", "constant"] = "cosine",
        warmup_steps: int | None = None,
        max_new_tokens: int = 60,
        plan: str | dict[str, Any] | None = None,
        revision: str | None = None,
    ) -> None:
        super().__init__()
        given = pretrained if isinstance(pretrained, PreTrainedModel) else None
        if given is not None:
            pretrained = given.name_or_path
        pretrained = pin(make_absolute(pretrained), revision)  # the name that checkpoints, plan and report use
        origin = (pretrained, dtype, attn_implementation, trust_remote_code)
        self.source = ModelSource(*origin) if given is None else ModelInMemory(*origin, model=given)
        del given, origin  # save_hyperparameters would save them
        self.save_hyperparameters(ignore=["optimizer", "plan", "recovery"])
        self.recovery = recovery
        self.optimizer_config = OptimizerConfig(unwrap_factory(optimizer), schedule, warmup_steps)
        self.adapters = Adapters()
        self.layer_compiler = LayerCompiler(compile)
        self.gradient_checkpointing = gradient_checkpointing
        self.max_new_tokens = max_new_tokens
        self.plan: PruningPlan | None = None
        if plan is not None:
            self.plan = PruningPlan.load(expand_path(plan)) if isinstance(plan, str) else PruningPlan.from_dict(plan)
        self.plan_is_from_checkpoint = isinstance(plan, dict)
        self.rounds_done = 0
        self.run_id = uuid4().hex  # tells a run's checkpoints from those of other runs in the same folder
        self._model: PreTrainedModel | None = None  # names of weights in checkpoints begin with this one
        self._untrained_model: Unregistered[PreTrainedModel] | None = None  # a model with layers on disk, or sharded
        self._objective = Objective(recovery)
        self._losses = LossWatch()
        self._changes: ChangeWatch | None = None
        self._draws_numbers = True
        self._matrix_names: set[str] = set()
        self.perplexities = CorpusPerplexities()

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *arguments: Any, **settings: Any) -> "CausalLMModule":
        """Build a module from a Lightning checkpoint, without running code that the checkpoint may contain.

        Args:
            checkpoint_path: path of a file on this machine, or an open file.
            arguments: further arguments of Lightning's method.
            settings: module settings that override the checkpoint's; code that comes with the model runs only if
                `trust_remote_code` is given here, whatever the checkpoint says.

        Raises:
            ValueError: if the path is not on this machine.
        """
        if isinstance(checkpoint_path, (str, Path)):
            check_is_local(checkpoint_path)
        with load_weights_alone():
            return super().load_from_checkpoint(
                checkpoint_path, *arguments, **{"trust_remote_code": False, **settings, "weights_only": True}
            )

    @classmethod
    def wrap(cls, model: PreTrainedModel) -> "CausalLMModule":
        """Wrap a causal LM that another module trains, without changing the model."""
        module = cls(model)
        module._model = model
        return module

    @property
    def model(self) -> PreTrainedModel:
        """The causal LM; call `load` first, unless the model was passed to `__init__`."""
        if self._model is None and isinstance(self.source, ModelInMemory):
            self.load()
        model = self._model if self._untrained_model is None else self._untrained_model.module
        assert model is not None, "call load() before using the model"
        return model

    def configure_callbacks(self) -> list[Callback]:
        """Begin a run: guard loading, remove leftovers of killed runs, let callbacks check the settings.

        It reads no text and loads no model yet, and it adds a callback that makes all ranks stop together.

        Raises:
            ValueError: if a setting cannot work, such as recovery mode `none` with a trainer that trains.
        """
        guard_loading(self.trainer.strategy)
        guard_restoring(self.trainer)
        if self.recovery.mode == "none" and self.trainer.state.fn == "fit" and self.trainer.limit_train_batches != 0:
            raise ValueError("recovery.mode none trains nothing: set trainer.limit_train_batches to 0")
        callbacks: list[Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        self._losses = LossWatch()
        stopping = StopTogether(self._losses)
        stopping.begin(self.trainer)
        # First, before pruning; Lightning would append callbacks that are returned.
        callbacks[:] = [stopping, *(one for one in callbacks if not isinstance(one, StopTogether))]
        if self.trainer.is_global_zero:
            remove_leftovers(*list_run_folders(Path(self.trainer.default_root_dir)))
        for callback in list(callbacks):
            if self.trainer.state.fn == "fit" and isinstance(callback, ChecksSettings):
                callback.check_settings(self.trainer, self)
        return []

    def name_metrics(self) -> list[str]:
        """List the names of the metrics that training logs and callbacks may monitor."""
        names = ["train/loss", *(f"train/{part}" for part in self._objective.parts)]
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if self.trainer.limit_val_batches != 0 and isinstance(data, TextDataModule):
            names += [f"ppl/{corpus}" for corpus in data.get_labels("val")]
        return names

    def load(self, offload: Path | None = None, sharded: bool = False) -> None:
        """Load the model, pruned if there is a plan. Does nothing if it is already loaded.

        Args:
            offload: keep the decoder layers on disk, changed ones beside this folder; for pruning, not for training.
            sharded: shard the decoder layers over the devices of a `ModelParallelStrategy` from the start.
        """
        if self._untrained_model is not None or self._model is not None:
            return
        data = getattr(find_trainer(self), "datamodule", None)
        if isinstance(data, TextDataModule):
            data.check_context(self.source.read_config())
        mesh = self._mesh if sharded else None
        assert mesh is not None or not sharded, "only a ModelParallelStrategy has a mesh"
        model = load_cut_model(self.source, self.plan, offload, mesh, self.gradient_checkpointing)
        self._name_model_of_plan()
        if not find_store(model).is_in_memory and not self._trains:
            self._untrained_model = Unregistered(model)
        else:
            self._model = model

    def release(self) -> None:
        """Free the model's memory for another model; `load` loads it again."""
        self._model = None

    def setup(self, stage: str) -> None:
        """Load the model if the pruning callback has not, and prepare it for training, before a strategy shards it."""
        self.load()
        if self._trains:
            self.prepare_recovery()

    def configure_model(self) -> None:
        """Shard the model and its teacher over devices if the strategy asks for it."""
        self.load()  # `load_from_checkpoint` calls no other hook
        if self._model is not None and (trainer := find_trainer(self)) is not None:
            device = trainer.strategy.root_device
            self._matrix_names |= name_matrices(self.named_parameters())
            self._model = distribute_model(self._model, self._mesh, device)
            self._objective.distribute_teacher(self._mesh, device)

    def prepare_recovery(self) -> None:
        """Add adapters and load the teacher, once; after a further cut, also discard the compiled layers."""
        self.layer_compiler.reset()
        self.adapters.add(self.model, self.recovery, self.rounds_done)
        self._draws_numbers = draws_random_numbers(self.model)
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        self._objective.learns_all = isinstance(data, TextDataModule) and data.learns_all
        if self._objective.lacks_teacher:
            mesh = None if find_store(self.model).is_in_memory else self._mesh
            self._objective.load_teacher(find_teacher(self.source, self.recovery), mesh)
            if self.recovery.teacher_top_k:
                data, device = self.trainer.datamodule, self.trainer.strategy.root_device  # type: ignore[attr-defined]
                self._objective.cache_teacher(data.read_train_windows(), data.training.batch_size, device)

    def merge_adapters(self) -> None:
        """Merge LoRA adapters into the weights, so that the model can be cut. Does nothing without adapters."""
        self._model = self.adapters.merge(self.model)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Compute logits `[batch, tokens, vocabulary]` from token ids `[batch, tokens]`."""
        logits: Tensor = self.model(input_ids=input_ids, use_cache=False).logits
        return logits

    def compute_loss(self, batch: Batch) -> Tensor | Mapping[str, Tensor]:
        """Compute the loss that a training step minimises; override it to train on another one.

        Args:
            batch: `input_ids` and `labels`, `[batch, tokens]`, padded only at the end of rows.

        Returns:
            The mean loss in nats per token, a scalar with its gradient; or a mapping with that scalar as `loss`, whose
            other entries are logged as `train/<name>`.
        """
        loss, parts = self._objective.measure(self.model, batch)
        return {"loss": loss, **parts}

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Compute and log the mean loss of a batch in nats per token."""
        place = (self.trainer.current_epoch, batch_idx, self.global_rank)
        seed = seed_by_place(self.device, *place) if self._draws_numbers else nullcontext()
        with seed, self.layer_compiler.compiled(self.model):
            measured = self.compute_loss(align_batch(batch))
        parts = dict(measured) if isinstance(measured, Mapping) else {"loss": measured}
        loss = parts.pop("loss")
        self._losses.note(loss, self.global_step, batch_idx)
        self.log_dict({f"train/{name}": part for name, part in parts.items()})
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def on_validation_epoch_start(self) -> None:
        """Start measuring the perplexity of every validation corpus."""
        self._start_perplexities("val", len(self.trainer.num_val_batches))

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Add a batch to its corpus's perplexity."""
        self.perplexities.update(dataloader_idx, self.model, align_batch(batch))

    def on_validation_epoch_end(self) -> None:
        """Log `ppl/<corpus>` over all ranks."""
        self.log_dict(self.perplexities.compute(), prog_bar=True)

    def on_test_epoch_start(self) -> None:
        """Start measuring the perplexity of every test corpus."""
        self._start_perplexities("test", len(self.trainer.num_test_batches))

    test_step, on_test_epoch_end = validation_step, on_validation_epoch_end

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Continue a prompt greedily; return prompt and continuation as token ids `[1, tokens]`."""
        return continue_greedily(self.model, batch["input_ids"], self.max_new_tokens)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Build optimizer and schedule for the parameters that are left after pruning."""
        steps = count_round_steps(self.trainer, self.rounds_done, self.recovery.rounds)
        optimizer, scheduler = self.optimizer_config.build(self.named_parameters(), steps, self._matrix_names)
        # LearningRateMonitor logs under this name.
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step", "name": "learning_rate"},
        }

    def on_train_start(self) -> None:
        """Remember the weights, to see at the end whether training has changed them."""
        self._changes = ChangeWatch(self.parameters())

    def on_train_end(self) -> None:
        """Print a warning if training has changed no weight."""
        if self._changes is not None and self._changes.sees_none(self.parameters()) and self.trainer.is_global_zero:
            console.print(
                f"training changed no weight in {self.trainer.global_step:,} steps: check that the learning rate of "
                "model.optimizer is not too small and that gradients are not zero"
            )
        self._changes = None

    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clip gradients as the trainer's settings say, also in two cases that Lightning refuses.

        It refuses fused optimizers under any mixed precision, although only float16 has a scaler, and only with a
        scaler do they unscale after clipping; and it refuses to clip by norm under FSDP1, because it does not know the
        outermost wrapper.
        """
        precision = self.trainer.precision_plugin
        has_no_scaler = type(precision) is MixedPrecision and precision.scaler is None
        is_by_norm = gradient_clip_algorithm in (None, GradClipAlgorithmType.NORM)
        if has_no_scaler or (isinstance(self.model, FullyShardedDataParallel) and is_by_norm):
            clip_gradients(self.model, optimizer, gradient_clip_val or 0.0, is_by_norm)
        else:
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the plan with the hyperparameters, so that a resumed run builds the pruned shapes."""
        if self.plan is not None:
            checkpoint[HYPER_PARAMETERS]["plan"] = self.plan.to_dict()
        checkpoint |= {"run": self.run_id, "recovery": asdict(self.recovery), "rounds_done": self.rounds_done}
        checkpoint["strategy"] = type(self.trainer.strategy).__name__

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Resume in the round in which the checkpoint was written, with its adapters if it has any."""
        self.rounds_done = checkpoint.get("rounds_done", 0)
        if self.adapters.view is None and any(".lora_" in name for name in checkpoint.get(WEIGHTS, ())):
            self.load()
            try:
                recovery = RecoveryConfig(**checkpoint["recovery"])
            except (KeyError, TypeError) as error:
                raise ValueError(
                    f"the checkpoint has LoRA adapters but not the recovery settings that describe them ({error}): "
                    "resume from another checkpoint, or train anew"
                ) from None
            self.adapters.add(self.model, recovery)

    def load_state_dict(self, *arguments: Any, **settings: Any) -> Any:
        """Load weights, as torch does.

        Raises:
            ValueError: if they do not fit the model.
        """
        try:
            return super().load_state_dict(*arguments, **settings)
        except RuntimeError as error:
            reason = shorten(first_line(error), 300, placeholder=" …")
            raise ValueError(
                f"the checkpoint does not fit {self.source.pretrained} as it is pruned here: {reason}"
            ) from None

    def _name_model_of_plan(self) -> None:
        """Write the name of the model that it cuts into a given plan; a resumed run must have the same model.

        Raises:
            ValueError: if a checkpoint's plan was made for other weights.
        """
        if self.plan is None:
            return
        name = self.source.pretrained
        fingerprint = find_fingerprint(name)
        if self.plan_is_from_checkpoint and self._trains and fingerprint:
            try:
                self.plan.check_weights(name, fingerprint)
            except ValueError as error:
                raise ValueError(f"{error}; set model.pretrained to that model to resume") from None
        self.plan = replace(self.plan, model=name, fingerprint=fingerprint)

    @property
    def _trains(self) -> bool:
        trainer = find_trainer(self)
        return trainer is not None and trainer.state.fn == "fit" and trainer.limit_train_batches != 0

    @property
    def _mesh(self) -> DeviceMesh | None:
        """The devices that a `ModelParallelStrategy` shards the model over; None under other strategies."""
        return None if self.device_mesh is None else self.device_mesh["data_parallel"]

    def _start_perplexities(self, stream: str, loaders: int) -> None:
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        corpora = data.get_labels(stream) if isinstance(data, TextDataModule) else range(loaders)
        self.perplexities = CorpusPerplexities(f"ppl/{corpus}" for corpus in corpora).to(self.device)


# jsonargparse reads the default optimizer's settings from the source of a lambda, and a lambda needs a name to pickle.
build_default_optimizer = signature(CausalLMModule).parameters["optimizer"].default
build_default_optimizer.__qualname__ = "build_default_optimizer"
