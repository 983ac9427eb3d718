"""A size to reach instead of a rate: parameters or bytes of weights."""

import re
from dataclasses import replace

from transformers import PreTrainedModel

from gqaprune.models.architecture import count_parameters
from gqaprune.planning.config import PruningConfig

_UNITS = {"": 1, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?\s*", re.IGNORECASE)


def parse_size(text: str) -> float:
    """Bytes, of a text such as `5GB`, `4.7 GiB` or `5e9`.

    Raises:
        ValueError: if it is no size.
    """
    if found := _SIZE.fullmatch(text):
        return float(found[1]) * _UNITS[(found[2] or "").lower()]
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"pruning.target_size must be a size such as 5GB or 4.7GiB, got {text!r}") from None


def resolve_target(model: PreTrainedModel, config: PruningConfig) -> PruningConfig:
    """Turn a size that is to be reached into the rate that does so, of all parameters; a config without one is kept.

    Args:
        model: the dense causal LM; its parameters need no values.
        config: with `target_parameters` or `target_size`.

    Raises:
        ValueError: if the model is no larger than the target.
    """
    parameters = count_parameters(model)
    if config.target_size is not None:
        size = parse_size(config.target_size)
        weights = {id(own): own for own in model.parameters()}.values()  # tied ones once
        total = sum(own.nbytes for own in weights)
        target, found = (
            parameters * size / total,
            f"target_size {config.target_size}, the model has {total / 1e9:.2f} GB",
        )
    elif config.target_parameters is not None:
        target = config.target_parameters
        found = f"target_parameters {target:.4g}, the model has {parameters:.4g}"
    else:
        return config
    if not 0 < target < parameters:
        raise ValueError(f"pruning.{found}: give less than that, and more than 0")
    rate = 1 - target / parameters
    return replace(config, rate=rate, rate_base="all", target_size=None, target_parameters=None)
