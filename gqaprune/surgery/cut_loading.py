"""Load a model to prune or to train, cut to a plan if there is one."""

from pathlib import Path

from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedModel

from gqaprune.placement.model_source import ModelInMemory, ModelSource
from gqaprune.plan import PruningPlan
from gqaprune.surgery.cut import apply_plan


def load_cut_model(
    source: ModelSource,
    plan: PruningPlan | None = None,
    offload: Path | None = None,
    mesh: DeviceMesh | None = None,
    gradient_checkpointing: bool = False,
) -> PreTrainedModel:
    """Load a model in training mode, or take the one in memory, and cut it to a plan.

    Args:
        source: the model that the plan was made for.
        plan: the units to keep; None keeps everything.
        offload: if given, the decoder layers stay on disk, and changed layers are stored beside this folder.
        mesh: if given, the decoder layers are sharded over these devices.
        gradient_checkpointing: recompute activations in the backward pass.

    Raises:
        ValueError: if the model does not exist, or the plan was made for another one.
    """
    if isinstance(source, ModelInMemory):
        assert offload is None and mesh is None, "callbacks refuse to move a model that is in memory"
        model = source.model
    elif offload is not None:
        model = source.load_offloaded(offload)
    elif mesh is not None:
        model = source.load_sharded(mesh)
    else:
        model = source.load()
    if plan is not None:
        apply_plan(model, plan)
    if gradient_checkpointing:
        model.activation_checkpointing_enable()
    return model.train()  # transformers loads in eval mode, where gradient checkpointing does nothing
