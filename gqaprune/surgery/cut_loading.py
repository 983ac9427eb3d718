"""Load a model to prune or to train: whole or layer by layer, cut to a plan where there is one."""

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
        plan: what to keep; None keeps all.
        offload: leave the decoder layers on disk, and keep those that change beside this folder.
        mesh: shard the decoder layers over these devices instead.
        gradient_checkpointing: recompute activations in the backward pass.

    Raises:
        ValueError: if there is no such model, or the plan is for another one.
    """
    if isinstance(source, ModelInMemory):
        assert offload is None and mesh is None, "callbacks refuse other placements of a model in memory"
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
