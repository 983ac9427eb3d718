"""What settings mean together, and what is refused when they are made."""

import pytest

from gqaprune import PruningConfig
from gqaprune.surgery.repair_config import RepairConfig

from tiny import make_plain


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"rate": 1.0}, r"rate must be in \[0, 1\).* got 1.0"),
        ({"rate": -0.1}, r"rate must be in \[0, 1\).* got -0.1"),
        ({"criterion": "magic"}, "criterion must be one of fisher, taylor, .*, got 'magic'"),
        (
            {"allocation": "magic"},
            "allocation must be one of uniform, global, inverse, proportional, optimal, got 'magic'",
        ),
        ({"rate_base": "magic"}, "rate_base must be one of decoder, all, got 'magic'"),
        ({"effort": "none"}, "effort must be one of quick, default, best, got 'none'"),
        ({"granularity": "head"}, "granularity must be one of group, query, got 'head'"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"limits": {"min_rate": 0.6, "max_rate": 0.5}}, "min_rate <= max_rate"),
        ({"limits": {"min_groups": 0}}, "min_groups must be at least 1, got 0"),
        ({"limits": {"channel_multiple": 0}}, "channel_multiple must be at least 1, got 0"),
        ({"scoring": {"reduction": "magic"}}, "reduction must be one of sum, mean, max, prod, got 'magic'"),
        ({"scoring": {"normalization": "magic"}}, "normalization must be one of none, mean, sum, max, got 'magic'"),
        ({"criterion": "fisher+magic"}, "criterion must be one of fisher, .*, got 'fisher.magic'"),
        ({"scoring": {"obs_ridge": 0.0}}, "obs_ridge must be above 0 and finite, got 0.0"),
        ({"sensitivity": {"method": "magic"}}, "sensitivity.method must be one of removal, .*, got 'magic'"),
        ({"sensitivity": {"alpha": -1.0}}, r"alpha must be in \[0, 50\], got -1.0"),
        ({"limits": {"frozen_layers": -1}}, "frozen_layers must be at least 0, got -1"),
        ({"split": "lots"}, "two numbers, attention:MLP, neither negative and not both 0, got 'lots'; try 2:8"),
        ({"kv_rate": 1.0}, r"kv_rate must be in \[0, 1\), a share of the KV heads, got 1.0"),
        ({"damage_levels": 1}, "damage_levels must be at least 2, got 1; try 8"),
        ({"damage": "magic"}, "damage must be one of repaired, gated, scores, got 'magic'"),
        ({"damage_levels": -2}, "damage_levels must be at least 2, got -2"),
        ({"swaps": {"generations": -1}}, "swaps.generations must be at least 0, got -1"),
        ({"swaps": {"offspring": 0}}, "swaps.offspring must be at least 1, got 0"),
        ({"kv_rate": 0.2, "split": "2:8"}, "kv_rate 0.2 and split 2:8 both set how much attention loses"),
        ({"kv_rate": 0.2, "granularity": "query"}, "kv_rate 0.2 needs granularity: group"),
        (
            {"steps": 2, "swaps": {"generations": 1}},
            "swaps.generations works with a single cut, got steps 2: set steps to 1",
        ),
        (
            {"steps": 2, "damage": "gated", "allocation": "optimal"},
            "damage: gated works with a single cut",
        ),
    ],
)
def test_setting_out_of_bounds_is_refused(settings: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        PruningConfig(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "needs_text"),
    [
        ({}, True),
        ({"rate": 0.0}, False),
        ({"rate": 0.0, "criterion": "l1", "kv_rate": 0.2}, False),
        ({"rate": 0.0, "kv_rate": 0.2}, True),
        ({"criterion": "l1"}, False),
        ({"criterion": "l1+random"}, False),
        ({"criterion": "l1+wanda"}, True),
        ({"criterion": "l1", "allocation": "inverse"}, True),
        ({"criterion": "l1", "limits": {"frozen_layers": 1}}, True),
        ({"criterion": "l1", "allocation": "optimal"}, False),
        ({"criterion": "l1", "allocation": "optimal", "damage": "gated"}, True),
        ({"criterion": "l1", "allocation": "optimal", "damage": "repaired"}, True),
        ({"criterion": "l1", "allocation": "global", "damage": "gated"}, False),
        ({"criterion": "l1", "swaps": {"generations": 1}}, True),
    ],
)
def test_text_is_needed_where_something_is_measured_on_it(settings: dict[str, object], needs_text: bool) -> None:
    assert make_plain(**settings).needs_text == needs_text
    assert PruningConfig(**settings).needs_text == PruningConfig(**settings).removes_something  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "share"),
    [
        ({}, None),
        ({"allocation": "uniform"}, 0.0),
        ({"allocation": "global"}, 0.0),
        ({"allocation": "optimal", "damage": "gated"}, 0.0),
        ({"allocation": "optimal", "damage": "scores"}, 0.0),
        ({"split": "2:8"}, 0.2),
        ({"split": "free"}, None),
        ({"kv_rate": 0.3}, None),
        ({"granularity": "query"}, None),
        ({"granularity": "query", "split": "1:9"}, 0.1),
    ],
)
def test_attention_gives_nothing_unless_repair_is_seen_or_it_is_asked(
    settings: dict[str, object], share: float | None
) -> None:
    assert PruningConfig(**settings).attention_share == share  # type: ignore[arg-type]


def test_groups_of_settings_are_dictionaries_or_their_own_classes() -> None:
    assert PruningConfig().repair == RepairConfig()
    assert PruningConfig(repair={"epochs": 2, "learning_rate": 0.1}).repair == RepairConfig(epochs=2, learning_rate=0.1)
    with pytest.raises(ValueError, match=r"pull must be in \[0, 1\], got 2"):
        PruningConfig(repair={"pull": 2.0})


def test_effort_replaces_defaults_and_keeps_what_was_set() -> None:
    default, quick = PruningConfig(), PruningConfig(effort="quick")
    assert (quick.criterion, quick.allocation) == ("obs", "uniform")
    assert not quick.repair.refines and not quick.repair.distills and quick.repair.refits_weights
    kept = PruningConfig(effort="quick", criterion="wanda", repair={"epochs": 1})  # type: ignore[arg-type]
    assert (kept.criterion, kept.repair.epochs, kept.repair.distill_tokens) == ("wanda", 1, 0)
    assert PruningConfig(effort="best").repair.distill_tokens > default.repair.distill_tokens
    assert PruningConfig(effort="default") == default
    assert PruningConfig(**vars(quick)) == quick  # as a saved configuration is read
