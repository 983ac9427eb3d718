"""Turn a target size, in parameters or bytes of weights, into a rate."""

import re
from dataclasses import replace

from transformers import PreTrainedModel

from gqaprune.models.architecture import count_parameters
from gqaprune.planning.config import PruningConfig

_UNITS = {"": 1, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?\s*", re.IGNORECASE)


def parse_size(text: str) -> float:
    """Parse a size such as `5GB`, `4.7 GiB` or `5e9` into bytes.

    Raises:
        ValueError: if the text is not a size.
    """
    if match := _SIZE.fullmatch(text):
        return float(match[1]) * _UNITS[(match[2] or "").lower()]
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"pruning.target_size must be a size such as 5GB or 4.7GiB, got {text!r}") from None


def resolve_target(model: PreTrainedModel, config: PruningConfig) -> PruningConfig:
    """Replace a target size by the rate, of all parameters, that reaches it; return other configs unchanged.

    Args:
        model: the dense causal LM; its parameters need no values.
        config: settings, possibly with `target_parameters` or `target_size`.

    Raises:
        ValueError: if the model is no larger than the target.
    """
    parameters = count_parameters(model)
    if config.target_size is not None:
        size = parse_size(config.target_size)
        weights = {id(weight): weight for weight in model.parameters()}.values()  # count tied weights once
        total = sum(weight.nbytes for weight in weights)
        target = parameters * size / total
        setting, actual = f"target_size {config.target_size}", f"{total / 1e9:.2f} GB"
    elif config.target_parameters is not None:
        target = config.target_parameters
        setting, actual = f"target_parameters {target:.4g}", f"{parameters:.4g}"
    else:
        return config
    if not 0 < target < parameters:
        raise ValueError(f"pruning.{setting} must be above 0 and below the {actual} that the model has")
    rate = 1 - target / parameters
    return replace(config, rate=rate, rate_base="all", target_size=None, target_parameters=None)
