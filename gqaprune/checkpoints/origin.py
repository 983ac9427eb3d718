"""The dense model that a pruned checkpoint comes from."""

from pathlib import Path

from gqaprune.models.sources import load_config
from gqaprune.plan import PLAN_FILE, PruningPlan


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
