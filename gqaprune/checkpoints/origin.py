"""The dense model that a pruned checkpoint comes from, and that distillation learns from."""

from dataclasses import replace
from pathlib import Path

from gqaprune.models.sources import load_config
from gqaprune.placement.model_source import ModelSource
from gqaprune.plan import PLAN_FILE, PruningPlan
from gqaprune.training.recovery import RecoveryConfig


def find_dense(pretrained: str, trust_remote_code: bool = False) -> tuple[str, str]:
    """Where the model comes from that the plan beside a checkpoint cuts; or an empty string, and why there is none.

    Args:
        pretrained: the checkpoint, a folder or a file.
        trust_remote_code: run code that comes with the dense model's config.
    """
    place = Path(pretrained)
    try:
        name = PruningPlan.load((place if place.is_dir() else place.parent) / PLAN_FILE).model
    except ValueError:
        return "", f"{pretrained} has no plan that tells it"
    if Path(name).resolve() == place.resolve():
        return "", f"the plan of {pretrained} names itself"
    try:
        load_config(name, trust_remote_code)
    except ValueError as error:
        return "", str(error)
    return name, ""


def find_teacher(student: ModelSource, recovery: RecoveryConfig) -> ModelSource:
    """Find the model that distillation learns from: `recovery.teacher`, or the dense model, of pruned checkpoints too.

    Args:
        student: the model to train, dense or pruned.
        recovery: the teacher's name, if it is another model than the dense one, and its type.
    """
    name = recovery.teacher or find_dense(student.pretrained, student.trust_remote_code)[0] or student.pretrained
    return replace(student, pretrained=name, dtype=recovery.teacher_dtype)
