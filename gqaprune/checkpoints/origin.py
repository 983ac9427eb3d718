"""The dense model that a pruned checkpoint comes from, and that distillation learns from."""

from pathlib import Path

from gqaprune.models.architecture import read_geometry
from gqaprune.models.fingerprint import fingerprint_weights
from gqaprune.models.sources import load_config, locate
from gqaprune.placement.model_source import ModelSource
from gqaprune.plan import PLAN_FILE, PruningPlan
from gqaprune.training.recovery import RecoveryConfig

_NETWORK = ("//", "\\\\")
"""What names of folders on other machines begin with, on Windows."""


def find_dense(pretrained: str) -> str:
    """Where the model comes from that the plan beside a checkpoint cuts: on this machine, as a plan fetches nothing.

    Args:
        pretrained: the checkpoint, a folder or a file.

    Raises:
        ValueError: if no plan names it, it is not there, or another model has its name.
    """
    file = _find_plan_file(pretrained)
    if file is None:
        raise ValueError(f"{pretrained} has no plan that tells it")
    plan = PruningPlan.load(file)
    name, place = plan.model, Path(pretrained)
    if not name:
        raise ValueError(f"the plan of {pretrained} does not name it")
    if Path(name).resolve() == place.resolve():
        raise ValueError(f"the plan of {pretrained} names itself")
    try:
        if name.startswith(_NETWORK) or isinstance(locate(name)[0], str):
            raise ValueError("it is not on this machine, and a plan fetches nothing")
        config = load_config(name)
        if difference := plan.geometry.difference(read_geometry(config)):
            raise ValueError(f"another model has this name: {difference}")
        if plan.fingerprint:
            plan.check_weights(name, fingerprint_weights(name))
    except ValueError as error:
        raise ValueError(f"the plan of {pretrained} names {name}: {error}") from None
    return name


def find_teacher(student: ModelSource, recovery: RecoveryConfig) -> ModelSource:
    """Find the model that distillation learns from: `recovery.teacher`, or the dense model, of pruned checkpoints too.

    Args:
        student: the model to train, dense or pruned.
        recovery: the teacher's name, if it is another model than the dense one, and its type.

    Raises:
        ValueError: if the student is a pruned checkpoint whose dense model is not found.
    """
    name, dtype = recovery.teacher or student.pretrained, recovery.teacher_dtype
    if recovery.teacher is not None or _find_plan_file(student.pretrained) is None:
        return student.name_another(name, dtype, student.trust_remote_code)
    try:
        return student.name_another(find_dense(student.pretrained), dtype, trust_remote_code=False)
    except ValueError as error:
        raise ValueError(f"no teacher to learn from: {error}; name one by model.recovery.teacher") from None


def _find_plan_file(pretrained: str) -> Path | None:
    place = Path(pretrained)
    file = (place if place.is_dir() else place.parent) / PLAN_FILE
    return file if place.exists() and file.is_file() else None
