"""The LightningModule around a causal LM: fine-tuning, perplexity, generation."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from lightning.pytorch.utilities import GradClipAlgorithmType
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from peft import PeftModel
from torch import Tensor
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.optim import Optimizer
from transformers import PreTrainedModel, get_scheduler

from gqaprune.checkpoints.origin import find_dense
from gqaprune.data.windows import Batch
from gqaprune.evaluation.generation import continue_greedily
from gqaprune.evaluation.perplexity import Perplexity
from gqaprune.models.architecture import get_layers
from gqaprune.models.loading import load_model
from gqaprune.models.losses import measure_losses, measure_mean_loss
from gqaprune.models.wrapping import unwrap_model, unwrap_name
from gqaprune.placement.fsdp import gather_state_dict, shard_model, wrap_model
from gqaprune.placement.layer_store import are_layers_apart
from gqaprune.placement.loading_by_layer import can_read_by_layer, load_offloaded_model, load_sharded_model
from gqaprune.plan import PruningPlan
from gqaprune.surgery.cut import apply_plan
from gqaprune.training.accumulation import count_optimizer_steps
from gqaprune.training.compilation import CompiledLayers
from gqaprune.training.distillation import measure_distance, measure_divergence, measure_divergence_from_top
from gqaprune.training.lightning_internals import HYPER_PARAMETERS, WEIGHTS, find_trainer
from gqaprune.training.recovery import RecoveryConfig, add_adapters
from gqaprune.training.resume import find_checkpoint
from gqaprune.training.teacher import CachedTeacher, Predictions, cache_teacher


class CausalLMModule(LightningModule):
    """A causal LM to prune, fine-tune, measure and prompt.

    Args:
        pretrained: the model: a folder, a `.gguf` file, a hub name, or `smollm2-135m` (embedded, needs no hub).
        dtype: type of the weights: `float32`, `bfloat16`, `float16`, or `auto` (the checkpoint's own).
        attn_implementation: attention kernel, `sdpa` or `eager`; transformers' choice by default.
        trust_remote_code: run code that comes with the checkpoint. Pruned checkpoints do not need it here.
        gradient_checkpointing: recompute activations in the backward pass, of training and of scores: less memory, one
            more forward pass.
        compile: compile the decoder layers with `torch.compile` for training steps; the first ones take minutes, and on
            a CPU a C++ compiler is needed. Not where a strategy splits the model.
        recovery: what training trains, and on which loss.
        optimizer: optimizer class and its arguments; built on the parameters that pruning left, weight decay for
            matrices only.
        schedule: course of the learning rate after the warm-up, down to 0 (`cosine`, `linear`) or `constant`.
        warmup_steps: optimizer steps over which the learning rate rises from 0; null takes a twentieth of them.
        max_new_tokens: tokens that `predict` adds to each prompt at most; loops take some fifty to show.
        plan: a pruning plan to apply on loading, instead of calibrating: the path of a `plan.json`, or its content, as
            a Lightning checkpoint carries it, whose weights are loaded next.
    """

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
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["optimizer", "plan", "recovery"])
        self.pretrained = pretrained
        self.dtype_name = dtype
        self.attn_implementation = attn_implementation
        self.trust_remote_code = trust_remote_code
        self.gradient_checkpointing = gradient_checkpointing
        self.compile_layers = compile
        self.recovery = recovery
        self.optimizer_factory = optimizer
        self.schedule = schedule
        self.warmup_steps = warmup_steps
        self.max_new_tokens = max_new_tokens
        self.plan, self.goes_on = _read_plan(plan), isinstance(plan, dict)
        self.rounds_done = 0
        self.run = uuid4().hex  # what checkpoints are known by
        self._model: PreTrainedModel | None = None
        self._apart: list[PreTrainedModel] = []  # in lists, or Lightning would move them, or keep them with its own
        self._adapted: list[PeftModel] = []
        self._teacher: list[PreTrainedModel] = []
        self._cached_teacher: CachedTeacher | None = None
        self._compiled: CompiledLayers | None = None
        self._perplexity: dict[str, Perplexity] = {}
        self._matrices: set[str] = set()

    @property
    def model(self) -> PreTrainedModel:
        """The causal LM; `load` it first."""
        model = self._apart[0] if self._apart else self._model
        assert model is not None, "load() comes before the model is used"
        return model

    def configure_callbacks(self) -> list[Callback]:
        """None; but the first hook of a run, early enough to say that nothing will be trained."""
        if self.recovery.mode == "none":
            self.trainer.limit_train_batches = 0
        return []

    def load(self, offload: Path | None = None, sharded: bool = False) -> None:
        """Load the model, pruned if there is a plan. Does nothing the second time.

        Args:
            offload: its decoder layers stay on disk, those that change beside this folder: to prune, not to train.
            sharded: its decoder layers are split over the devices of a `ModelParallelStrategy` from the start.
        """
        if self._apart or self._model is not None:
            return
        kernel, remote = self.attn_implementation, self.trust_remote_code
        if offload is not None:
            self._apart.append(load_offloaded_model(self.pretrained, offload, self.dtype_name, kernel, remote))
        elif sharded and not self._trains:
            self._apart.append(self._load_sharded(self.pretrained, self.dtype_name))
        elif sharded:
            self._model = self._load_sharded(self.pretrained, self.dtype_name)
        else:
            self._model = self.load_dense()
        if self.plan is not None:
            apply_plan(self.model, self.plan)
        if self.gradient_checkpointing:
            self.model.activation_checkpointing_enable()
        self.model.train()  # transformers loads in eval mode, where gradient checkpointing does nothing

    def load_dense(self, pretrained: str | None = None, dtype: str | None = None) -> PreTrainedModel:
        """Load the model again as it was before pruning, or another one, apart from the module's own."""
        return load_model(
            pretrained or self.pretrained, dtype or self.dtype_name, self.attn_implementation, self.trust_remote_code
        )

    def release(self) -> None:
        """Let the model go, so that another one has its memory; `load` brings it back."""
        self._model = None

    def _load_sharded(self, pretrained: str, dtype: str) -> PreTrainedModel:
        assert self.device_mesh is not None, "only ModelParallelStrategy has a mesh"
        mesh = self.device_mesh["data_parallel"]
        return load_sharded_model(pretrained, mesh, dtype, self.attn_implementation, self.trust_remote_code)

    def setup(self, stage: str) -> None:
        """Load what the pruning callback has not, and make it ready to train, before strategies build models split."""
        self.load()
        if self._trains:
            self.prepare_recovery()

    def configure_model(self) -> None:
        """Split the model, and its teacher, over devices where the strategy asks."""
        self.load()  # for `load_from_checkpoint`, which calls no other hook
        if self._apart:  # its layers are on disk, or split already and not to be trained
            return
        if self.device_mesh is not None:
            for model in [self.model, *self._teacher]:
                shard_model(model, self.device_mesh["data_parallel"])
        elif (trainer := find_trainer(self)) is not None and self._model is not None:
            device = trainer.strategy.root_device
            self._matrices |= {name for name, parameter in self.named_parameters() if parameter.ndim > 1}  # FSDP1: flat
            self._model = wrap_model(self._model, device)
            self._teacher = [wrap_model(teacher, device) for teacher in self._teacher]

    @property
    def _trains(self) -> bool:
        trainer = find_trainer(self)
        return trainer is not None and trainer.state.fn == "fit" and trainer.limit_train_batches != 0

    def prepare_recovery(self) -> None:
        """Add adapters and load the teacher, once; after a further cut forget what was compiled before it."""
        if self._compiled is not None:
            self._compiled = None
            torch.compiler.reset()  # else the programs of earlier shapes would use up how many there may be
        if self.recovery.uses_lora and not self._adapted:
            seed = int(os.environ.get("PL_GLOBAL_SEED", "0")) + self.rounds_done
            self._adapted.append(add_adapters(self.model, self.recovery, seed))
        if self.recovery.distills and not self._teacher:
            teacher = self._load_teacher()
            self._teacher.append(teacher.eval().requires_grad_(False))
            if top_k := self.recovery.teacher_top_k:
                data = self.trainer.datamodule  # type: ignore[attr-defined]
                teacher.to(self.trainer.strategy.root_device)
                self._cached_teacher = cache_teacher(
                    teacher, data.read_train_windows(), top_k, self.recovery.temperature, data.batch_size
                )
                teacher.to("meta")

    @property
    def teacher_source(self) -> str:
        """What distillation learns from: `recovery.teacher`, or the dense model, of pruned checkpoints too."""
        return self.recovery.teacher or find_dense(self.pretrained, self.trust_remote_code)[0] or self.pretrained

    def _load_teacher(self) -> PreTrainedModel:
        """Whole on each device, or split as the model is; what is to be cached runs before a strategy splits it."""
        settings, source = self.recovery, self.teacher_source
        is_split = are_layers_apart(self.model) and not settings.teacher_top_k
        if is_split and can_read_by_layer(source, self.trust_remote_code):
            return self._load_sharded(source, settings.teacher_dtype)
        return self.load_dense(source, settings.teacher_dtype)

    def merge_adapters(self) -> None:
        """Fold LoRA adapters into the weights, so that the model can be cut. Does nothing without them."""
        while self._adapted:
            self._model = self._adapted.pop().merge_and_unload()

    @property
    def adapted(self) -> PeftModel | None:
        """The model as peft sees it, if it has LoRA adapters."""
        return self._adapted[0] if self._adapted else None

    @property
    def plain_model(self) -> PreTrainedModel:
        """The causal LM out of what a strategy wraps it in; its weights may be split."""
        return unwrap_model(self.model)

    def gather_state_dict(self) -> dict[str, Tensor] | None:
        """The causal LM's whole weights on rank 0 if they are split, else None. Every rank has to call it."""
        return gather_state_dict(self.model)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits `[batch, tokens, vocabulary]` of token ids `[batch, tokens]`."""
        logits: Tensor = self.model(input_ids=input_ids, use_cache=False).logits
        return logits

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Mean loss of a batch in nats per token."""
        seed = _own_seed(self.device, self.trainer.current_epoch, batch_idx, self.global_rank)
        with seed, self._running_compiled():
            loss = self._measure_loss(batch)
        if not torch.isfinite(loss):
            good = find_checkpoint(list_checkpoint_folders(self.trainer), self.run)
            restart = f"go on from {good} (--ckpt_path)" if good else "no checkpoint with finite weights was written"
            raise ValueError(
                f"the training loss is {loss.item()} at step {self.global_step}, batch {batch_idx}: "
                f"lower the learning rate, clip gradients, or train in bfloat16 or float32; {restart}"
            )
        self.log("train/loss", loss, prog_bar=True)
        self.log("train/learning_rate", self.trainer.optimizers[0].param_groups[0]["lr"])
        return loss

    def _running_compiled(self) -> AbstractContextManager[None]:
        if not self.compile_layers:
            return nullcontext()
        if self._compiled is None:
            self._compiled = CompiledLayers(self.model)
        return self._compiled.running()

    def _measure_loss(self, batch: Batch) -> Tensor:
        """The language model's loss, or its mixture with the distance from the teacher."""
        settings, hidden = self.recovery, self.recovery.distills and self.recovery.hidden_weight > 0
        ids = batch["input_ids"]
        student = self.model(input_ids=ids, use_cache=False, output_hidden_states=hidden)
        is_goal = not settings.distills or settings.distill_weight < 1  # else it is for the eye
        loss = measure_mean_loss(student.logits if is_goal else student.logits.detach(), batch["labels"])
        if (
            is_goal and (imbalance := getattr(student, "aux_loss", None)) is not None
        ):  # of experts, where the config asks
            loss = loss + self.model.config.router_aux_loss_coef * imbalance
        if not settings.distills:
            return loss
        logits = student.logits[:, :-1]
        if self._cached_teacher is not None:
            predictions = Predictions(*(part.to(self.device) for part in self._cached_teacher.predict(batch["index"])))
            divergence = measure_divergence_from_top(logits, predictions, settings.temperature)
        else:
            with torch.no_grad():
                teacher = self._teacher[0].to(self.device)(ids, use_cache=False, output_hidden_states=hidden)
            divergence = measure_divergence(logits, teacher.logits[:, :-1], settings.temperature)
        self.log("train/lm_loss", loss)
        self.log("train/divergence", divergence)
        loss = (1 - settings.distill_weight) * loss + settings.distill_weight * divergence
        if hidden:
            layers = settings.hidden_layers or [len(get_layers(self.model)) - 1]
            # Entry 0 is the embedding, entry i + 1 what layer i gives.
            states = [[output.hidden_states[layer + 1] for layer in layers] for output in (student, teacher)]
            distance = measure_distance(*states)
            self.log("train/hidden_distance", distance)
            loss = loss + settings.hidden_weight * distance
        return loss

    def on_validation_epoch_start(self) -> None:
        """Start a perplexity for every validation corpus."""
        self._start_perplexity("val")

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Add a batch to its corpus's perplexity."""
        self._update_perplexity(batch, dataloader_idx)

    def on_validation_epoch_end(self) -> None:
        """Log `ppl/<corpus>` over all ranks."""
        self._log_perplexity()

    def on_test_epoch_start(self) -> None:
        """Start a perplexity for every test corpus."""
        self._start_perplexity("test")

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Add a batch to its corpus's perplexity."""
        self._update_perplexity(batch, dataloader_idx)

    def on_test_epoch_end(self) -> None:
        """Log `ppl/<corpus>` over all ranks."""
        self._log_perplexity()

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Continue a prompt greedily; returns prompt and continuation as token ids `[1, tokens]`."""
        return continue_greedily(self.model, batch, self.max_new_tokens)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Build optimizer and schedule on the live parameters, after pruning."""
        matrices: list[Tensor] = []
        vectors: list[Tensor] = []
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                is_matrix = parameter.ndim > 1 or unwrap_name(name) in self._matrices
                (matrices if is_matrix else vectors).append(parameter)
        groups: list[dict[str, Any]] = [{"params": matrices}]
        if vectors:
            groups.append({"params": vectors, "weight_decay": 0.0})
        optimizer = self.optimizer_factory(groups)
        name = "constant_with_warmup" if self.schedule == "constant" else self.schedule
        steps = max(1, self.first_step(self.rounds_done + 1) - self.first_step(self.rounds_done))
        warmup = steps // 20 if self.warmup_steps is None else self.warmup_steps
        scheduler = get_scheduler(name, optimizer, warmup, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clip as the trainer says, a fused optimizer's gradients and those of FSDP1 too.

        Lightning refuses the first under any mixed precision, though only float16 has a scaler that fused steps would
        undo after the clipping, and the second by their norm, for it does not know the outermost wrapper.
        """
        precision = self.trainer.precision_plugin
        is_by_norm = gradient_clip_algorithm in (None, GradClipAlgorithmType.NORM)
        if isinstance(self.model, FullyShardedDataParallel) and is_by_norm:
            if gradient_clip_val:
                self.model.clip_grad_norm_(gradient_clip_val)
        elif type(precision) is MixedPrecision and precision.scaler is None:
            algorithm = GradClipAlgorithmType(gradient_clip_algorithm or GradClipAlgorithmType.NORM)
            Precision.clip_gradients(precision, optimizer, gradient_clip_val or 0.0, algorithm)
        else:
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the plan with the hyperparameters, so that a resumed run builds the pruned shapes."""
        if self.plan is not None:
            checkpoint[HYPER_PARAMETERS]["plan"] = self.plan.to_dict()
        checkpoint["run"] = self.run
        checkpoint["recovery"] = asdict(self.recovery)
        checkpoint["rounds_done"] = self.rounds_done
        checkpoint["strategy"] = type(self.trainer.strategy).__name__

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on in the round that the checkpoint was written in, with adapters if it has some."""
        self.rounds_done = checkpoint.get("rounds_done", 0)
        if not self._adapted and any(".lora_" in name for name in checkpoint.get(WEIGHTS, ())):
            self.load()
            self._adapted.append(add_adapters(self.model, RecoveryConfig(**checkpoint["recovery"])))

    def first_step(self, rounds: int) -> int:
        """Optimizer step at which training begins once so many of `recovery.rounds` are done."""
        return count_optimizer_steps(self.trainer) * rounds // self.recovery.rounds

    def _start_perplexity(self, stream: str) -> None:
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        counts = self.trainer.num_val_batches if stream == "val" else self.trainer.num_test_batches
        labels = [str(number) for number in range(len(counts))] if data is None else data.get_labels(stream)
        self._perplexity = {label: Perplexity().to(self.device) for label in labels}

    def _update_perplexity(self, batch: Batch, dataloader_idx: int) -> None:
        list(self._perplexity.values())[dataloader_idx].update(
            *measure_losses(self.model, batch["input_ids"], batch["labels"])
        )

    def _log_perplexity(self) -> None:
        for label, metric in self._perplexity.items():
            # The metric has already added up the ranks' sums.
            self.log(f"ppl/{label}", metric.compute().float(), prog_bar=True)


def _read_plan(plan: str | dict[str, Any] | None) -> PruningPlan | None:
    if plan is None:
        return None
    return PruningPlan.load(plan) if isinstance(plan, str) else PruningPlan.from_dict(plan)


@contextmanager
def _own_seed(device: torch.device, *place: int) -> Iterator[None]:
    """Random numbers of a place in a run, and of its seed: dropout is the same in one that goes on."""
    with torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type):
        content = hashlib.sha256(repr((torch.initial_seed(), *place)).encode()).digest()
        torch.manual_seed(int.from_bytes(content[:7], "big"))
        yield


def list_checkpoint_folders(trainer: Trainer) -> list[str]:
    """Where a trainer writes checkpoints; known once it has set up its callbacks."""
    writers = [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]
    return [str(writer.dirpath) for writer in writers if writer.dirpath]
