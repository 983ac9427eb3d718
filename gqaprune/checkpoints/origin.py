"""Find the dense model that a pruned checkpoint comes from, and that distillation learns from."""

from pathlib import Path

from gqaprune.models.architecture import read_geometry
from gqaprune.models.fingerprint import fingerprint_weights
from gqaprune.models.sources import load_config, locate
from gqaprune.placement.model_source import ModelSource
from gqaprune.plan import PLAN_FILE, PruningPlan
from gqaprune.training.recovery import RecoveryConfig

_NETWORK = ("//", "\\\\")
"""Prefixes of folders on other machines, on Windows."""


def find_dense(pretrained: str) -> str:
    """Find the dense model that the plan beside a checkpoint names; only on this machine, without any download.

    Args:
        pretrained: the checkpoint, a folder or a file.

    Raises:
        ValueError: if no plan names it, it is not on this machine, or another model has its name.
    """
    file = _find_plan_file(pretrained)
    if file is None:
        raise ValueError(f"{pretrained} has no plan that names the dense model")
    plan = PruningPlan.load(file)
    name, place = plan.model, Path(pretrained)
    if not name:
        raise ValueError(f"the plan of {pretrained} does not name the dense model")
    if Path(name).resolve() == place.resolve():
        raise ValueError(f"the plan of {pretrained} names itself")
    try:
        if name.startswith(_NETWORK) or isinstance(locate(name)[0], str):
            raise ValueError("it is not on this machine, and models that only a plan names are not downloaded")
        config = load_config(name)
        if difference := plan.geometry.difference(read_geometry(config)):
            raise ValueError(f"another model has this name: {difference}")
        if plan.fingerprint:
            plan.check_weights(name, fingerprint_weights(name))
    except ValueError as error:
        raise ValueError(f"the plan of {pretrained} names {name}: {error}") from None
    return name


def find_teacher(student: ModelSource, recovery: RecoveryConfig) -> ModelSource:
    """Find the model that distillation learns from: `recovery.teacher`, else the student's dense model.

    Args:
        student: the model to train, dense or pruned.
        recovery: settings with the teacher's name, if it is not the dense model, and its type.

    Raises:
        ValueError: if the student is a pruned checkpoint whose dense model cannot be found.
    """
    name, dtype = recovery.teacher or student.pretrained, recovery.teacher_dtype
    if recovery.teacher is not None or _find_plan_file(student.pretrained) is None:
        return student.name_another(name, dtype, student.trust_remote_code)
    try:
        return student.name_another(find_dense(student.pretrained), dtype, trust_remote_code=False)
    except ValueError as error:
        raise ValueError(f"no teacher to learn from: {error}; set model.recovery.teacher to the dense model") from None


def _find_plan_file(pretrained: str) -> Path | None:
    place = Path(pretrained)
    file = (place if place.is_dir() else place.parent) / PLAN_FILE
    return file if place.exists() and file.is_file() else None
