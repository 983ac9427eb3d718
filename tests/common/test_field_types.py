"""Settings given in Python have the types that their fields say."""

from typing import Any

import numpy as np
import pytest

from gqaprune import PruningConfig


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"rate": "0.2"}, "rate must be a number, got '0.2'"),
        ({"rate": None}, "rate must be a number, got 'None'"),
        ({"rate": True}, "rate must be a number, got 'True'"),
        ({"rate": float("nan")}, r"rate must be in \[0, 1\), a share of the parameters, got nan"),
        ({"steps": 1.5}, "steps must be a whole number, got '1.5'"),
        ({"split": 2.8}, "split must be a name, got '2.8'"),
        ({"criterion": None}, "criterion must be a name, got 'None'"),
        ({"limits": {"min_groups": "1"}}, "min_groups must be a whole number, got '1'"),
        ({"repair": {"bias": "no"}}, "bias must be true or false, got 'no'"),
        ({"swaps": {"generations": 2.0}}, "generations must be a whole number, got '2.0'"),
        ({"limits": {"mlp_layers": "0-5"}}, r"mlp_layers must be two layers, .*, such as \(4, 28\), got '0-5'"),
        ({"limits": {"attention_layers": (1, 2, 3)}}, "attention_layers must be two layers"),
        ({"limits": {"mlp_layers": (0, "5")}}, "mlp_layers must be two layers"),
    ],
)
def test_a_value_of_another_type_is_refused_by_its_name(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        PruningConfig(**settings)


def test_numbers_of_numpy_and_whole_rates_are_taken() -> None:
    config = PruningConfig(rate=np.float32(0.25), kv_rate=0, steps=np.int64(2), limits={"mlp_layers": [0, 3]})  # type: ignore[arg-type]
    assert (config.rate, config.steps) == (0.25, 2)
