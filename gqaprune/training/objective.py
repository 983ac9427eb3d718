"""The loss that training minimises: the language model's loss, alone or mixed with the distance from a teacher."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from gqaprune.models.architecture import get_layers
from gqaprune.models.layerwise import record_layer_outputs
from gqaprune.models.losses import IGNORED, measure_mean_loss
from gqaprune.models.soft_targets import (
    Predictions,
    measure_distance,
    measure_divergence,
    measure_divergence_from_top,
)
from gqaprune.placement.fsdp import distribute_model
from gqaprune.placement.model_source import ModelSource
from gqaprune.training.recovery import RecoveryConfig
from gqaprune.training.teacher import CachedTeacher, cache_teacher


class Objective:
    """Measures the loss of training batches, with the teacher that distillation learns from.

    It is not a torch module, so that Lightning does not move, train or save the teacher with the student.

    Args:
        settings: the loss and its weights.

    Attributes:
        learns_all: whether all tokens have labels, so that no mask is needed.
        teacher: the model that each step learns from; None without distillation, or with predictions on disk.
        cached_teacher: the teacher's predictions on disk; None unless `settings.teacher_top_k` asks for them.
    """

    def __init__(self, settings: RecoveryConfig) -> None:
        self.settings = settings
        self.learns_all = False
        self.teacher: PreTrainedModel | None = None
        self.cached_teacher: CachedTeacher | None = None

    @property
    def lacks_teacher(self) -> bool:
        """Whether a teacher is needed and not loaded yet."""
        return self.settings.distills and self.teacher is None and self.cached_teacher is None

    def load_teacher(self, source: ModelSource, mesh: DeviceMesh | None = None) -> None:
        """Load the teacher, whole on each device or sharded like the student.

        Args:
            source: the dense model.
            mesh: devices that the student's layers are sharded over. The teacher's layers are sharded as well if they
                can be read one by one and its predictions are not cached: caching comes before sharding.
        """
        if mesh is not None and not self.settings.teacher_top_k and source.can_be_read_by_layer:
            teacher = source.load_sharded(mesh)
        else:
            teacher = source.load()
        self.teacher = teacher.eval().requires_grad_(False)

    def cache_teacher(self, windows_NT: Tensor, batch_size: int, device: torch.device) -> None:
        """Write the teacher's predictions for all training windows to disk, and free its memory.

        Args:
            windows_NT: token ids of the training windows, the same on every rank.
            batch_size: windows per forward pass.
            device: device to compute on.
        """
        assert self.teacher is not None, "call load_teacher() before caching its predictions"
        top_k, temperature = self.settings.teacher_top_k, self.settings.temperature
        self.cached_teacher = cache_teacher(self.teacher.to(device), windows_NT, top_k, temperature, batch_size)
        self.teacher = None

    def distribute_teacher(self, mesh: DeviceMesh | None, device: torch.device) -> None:
        """Shard a teacher in memory over devices, as `distribute_model` shards the student."""
        if self.teacher is not None:
            self.teacher = distribute_model(self.teacher, mesh, device)

    def measure(self, student: PreTrainedModel, batch: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Measure the loss of a batch.

        Args:
            student: the model in training, with the strategy's wrapper.
            batch: `input_ids` and `labels`, `[batch, tokens]`; with a cached teacher also `index` of the windows.

        Returns:
            The loss in nats per token, with its gradient, and its parts by name; no parts without distillation.
        """
        settings, ids_BT = self.settings, batch["input_ids"]
        output, states = self._run(student, ids_BT)
        loss = self._measure_language_loss(student, output, batch["labels"])
        if not settings.distills:
            return loss, {}
        taught, taught_states = self._run_teacher(ids_BT)
        learned_BT = None if self.learns_all else batch["labels"] != IGNORED
        divergence = self._measure_divergence(output.logits[:, :-1], taught, batch, learned_BT)
        parts = {"lm_loss": loss, "divergence": divergence}
        loss = (1 - settings.distill_weight) * loss + settings.distill_weight * divergence
        if self._compares_hidden_states:
            assert taught is not None, "settings refuse hidden states of a cached teacher"
            parts["hidden_distance"] = measure_distance(states, taught_states, learned_BT)
            loss = loss + settings.hidden_weight * parts["hidden_distance"]
        return loss, parts

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the loss's parts."""
        hidden = ("hidden_distance",) if self._compares_hidden_states else ()
        return ("lm_loss", "divergence", *hidden) if self.settings.distills else ()

    @property
    def _compares_hidden_states(self) -> bool:
        return self.settings.distills and self.settings.hidden_weight > 0

    def _measure_language_loss(self, student: PreTrainedModel, output: ModelOutput, labels: Tensor) -> Tensor:
        """Measure the next-token loss, plus the imbalance of experts if the model's config asks for it."""
        is_minimised = not self.settings.distills or self.settings.distill_weight < 1  # else it is only logged
        loss = measure_mean_loss(output.logits if is_minimised else output.logits.detach(), labels)
        imbalance = getattr(output, "aux_loss", None)
        if is_minimised and imbalance is not None:
            loss = loss + student.config.router_aux_loss_coef * imbalance
        return loss

    def _run(self, model: PreTrainedModel, ids_BT: Tensor) -> tuple[ModelOutput, list[Tensor]]:
        """Run a model; return its output and the hidden states that are compared, before the final norm."""
        layers = (self.settings.hidden_layers or [len(get_layers(model)) - 1]) if self._compares_hidden_states else []
        with record_layer_outputs(model, layers) as states:
            output = model(input_ids=ids_BT, use_cache=False)
        return output, [states[layer] for layer in layers]

    def _run_teacher(self, ids_BT: Tensor) -> tuple[ModelOutput | None, list[Tensor]]:
        if self.teacher is None:
            return None, []
        with torch.no_grad():
            return self._run(self.teacher.to(ids_BT.device), ids_BT)

    def _measure_divergence(
        self,
        logits_BTV: Tensor,
        teacher: ModelOutput | None,
        batch: Mapping[str, Tensor],
        learned_BT: Tensor | None,
    ) -> Tensor:
        temperature = self.settings.temperature
        next_BT = None if learned_BT is None else learned_BT[:, 1:]
        if teacher is not None:
            return measure_divergence(logits_BTV, teacher.logits[:, :-1], temperature, next_BT)
        assert self.cached_teacher is not None, "call load_teacher() before measuring the loss"
        cached = self.cached_teacher.predict(batch["index"])
        predictions = Predictions(*(part.to(logits_BTV.device) for part in cached))
        return measure_divergence_from_top(logits_BTV, predictions, temperature, next_BT)
