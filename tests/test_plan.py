"""A plan survives JSON, refuses what does not fit with a sentence that says why, and describes itself."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gqaprune.geometry import Geometry
from gqaprune.plan import FORMAT, KeptUnits, PruningPlan, list_query_heads

DENSE = Geometry("llama", hidden_size=64, head_dim=8, query_heads=(6, 6), kv_heads=(2, 2), channels=(20, 20))


def make_plan(**changes: Any) -> PruningPlan:
    fields = {
        "geometry": DENSE,
        "layers": (KeptUnits((1,), (0, 3, 19)), KeptUnits((0, 1), tuple(range(20)))),
        "model": "größe/modell",
        "criterion": "fisher",
        "allocation": "global",
        "rate": 0.25,
        "rate_base": "all",
        "seed": 7,
        "corpora": ("embedded@train", "wikitext2@train"),
    }
    return PruningPlan(**(fields | changes))


@st.composite
def geometries(draw: st.DrawFn) -> Geometry:
    layers = draw(st.integers(1, 4))
    kv_heads = draw(st.lists(st.integers(1, 6), min_size=layers, max_size=layers))
    ratios = draw(st.lists(st.integers(1, 8), min_size=layers, max_size=layers))
    channels = draw(st.lists(st.integers(1, 12), min_size=layers, max_size=layers))
    return Geometry(
        family=draw(st.sampled_from(["llama", "qwen2"])),
        hidden_size=draw(st.integers(1, 4096)),
        head_dim=draw(st.integers(1, 256)),
        query_heads=tuple(kv * ratio for kv, ratio in zip(kv_heads, ratios, strict=True)),
        kv_heads=tuple(kv_heads),
        channels=tuple(channels),
    )


@st.composite
def kept_units(draw: st.DrawFn, kv_heads: int, ratio: int, channels: int, queries: bool) -> KeptUnits:
    def choose(count: int, least: int = 1, most: int | None = None) -> tuple[int, ...]:
        return tuple(sorted(draw(st.sets(st.integers(0, count - 1), min_size=least, max_size=most))))

    groups, heads = choose(kv_heads), None
    if queries and draw(st.booleans()):
        number = draw(st.integers(1, ratio))
        heads = tuple(group * ratio + head for group in groups for head in choose(ratio, number, number))
    return KeptUnits(groups, choose(channels), heads)


@st.composite
def plans(draw: st.DrawFn, geometry: Geometry | None = None, queries: bool = True) -> PruningPlan:
    geometry = geometry or draw(geometries())
    shapes = zip(geometry.kv_heads, geometry.ratios, geometry.channels, strict=True)
    return PruningPlan(
        geometry=geometry,
        layers=tuple(draw(kept_units(*shape, queries)) for shape in shapes),
        model=draw(st.text()),
        rate=draw(st.floats(0, 1)),
        corpora=tuple(draw(st.lists(st.text(), max_size=3))),
    )


def to_json(plan: PruningPlan) -> dict[str, Any]:
    """The plan as JSON gives it back: lists, no tuples."""
    return json.loads(json.dumps(plan.to_dict()))


@given(plans())
def test_plan_survives_json(plan: PruningPlan) -> None:
    assert PruningPlan.from_dict(to_json(plan)) == plan


def test_plan_survives_save_and_load(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    make_plan().save(path)
    assert PruningPlan.load(path) == make_plan()
    assert [file.name for file in tmp_path.iterdir()] == ["plan.json"]


def test_save_to_a_place_that_cannot_be_replaced_leaves_nothing_beside_it(tmp_path: Path) -> None:
    folder = tmp_path / "plan.json"
    folder.mkdir()
    with pytest.raises(OSError):
        make_plan().save(folder)
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize(
    ("content", "trouble"),
    [
        (b"not json", "not JSON"),
        (b"", "not JSON"),
        (b"\xff\xfe{}", "not JSON"),
        (b"[" * 100_000, "nested more than 64 deep"),
        (b'{"seed": 1e999}', "number 1e999 is not finite"),
        (b"[1, 2]", "got 'list'"),
        (b"{}", "got None"),
        (b'{"format": "other/2"}', "got 'other/2'"),
    ],
    ids=["text", "empty", "not UTF-8", "deep", "infinite", "a list", "no format", "wrong format"],
)
def test_load_refuses_a_file_that_is_no_plan_and_names_it(tmp_path: Path, content: bytes, trouble: str) -> None:
    path = tmp_path / "mine.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=trouble) as caught:
        PruningPlan.load(path)
    assert str(path) in str(caught.value)


def test_load_refuses_a_missing_file_and_names_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no pruning plan at .*gone\.json"):
        PruningPlan.load(tmp_path / "gone.json")


def test_load_refuses_a_folder_and_names_it(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    with pytest.raises(ValueError, match="checkpoint"):
        PruningPlan.load(folder)


def test_plan_without_a_kv_rate_is_read_as_before_there_was_one() -> None:
    plan = replace(make_plan(), kv_rate=0.25)
    data = to_json(plan)
    assert PruningPlan.from_dict(data) == plan
    del data["kv_rate"]
    assert PruningPlan.from_dict(data) == replace(plan, kv_rate=0.0)


@pytest.mark.parametrize("key", sorted(set(make_plan().to_dict()) - {"format", "kv_rate", "fingerprint"}))
def test_missing_key_is_refused_by_name(key: str) -> None:
    data = to_json(make_plan())
    del data[key]
    with pytest.raises(ValueError, match=f"incomplete.*{key}"):
        PruningPlan.from_dict(data)


@pytest.mark.parametrize("key", ["family", "hidden_size", "head_dim", "query_heads", "kv_heads", "channels"])
def test_missing_key_of_the_geometry_is_refused_by_name(key: str) -> None:
    data = to_json(make_plan())
    del data["geometry"][key]
    with pytest.raises(ValueError, match=f"geometry is incomplete.*{key}"):
        PruningPlan.from_dict(data)


@pytest.mark.parametrize("key", ["groups", "channels"])
def test_missing_key_of_a_layer_is_refused_by_name(key: str) -> None:
    data = to_json(make_plan())
    del data["layers"][1][key]
    with pytest.raises(ValueError, match=f"incomplete.*{key}"):
        PruningPlan.from_dict(data)


@pytest.mark.parametrize(
    ("groups", "trouble"),
    [
        ([-1, 0], "index -1 is outside 0 … 1"),
        ([0, 2], "index 2 is outside 0 … 1"),
        ([0, 0], "ascend without repeats"),
        ([1, 0], "ascend without repeats"),
        ([], "at least 1 of 2 must stay"),
    ],
    ids=["negative", "out of range", "repeated", "descending", "empty"],
)
def test_wrong_group_indexes_are_refused_with_their_layer(groups: list[int], trouble: str) -> None:
    data = to_json(make_plan())
    data["layers"][1]["groups"] = groups
    with pytest.raises(ValueError, match=f"layer 1 GQA groups: .*{trouble}"):
        PruningPlan.from_dict(data)


@pytest.mark.parametrize(
    ("channels", "trouble"),
    [
        ([-2, 3], "index -2 is outside 0 … 19"),
        ([3, 20], "index 20 is outside 0 … 19"),
        ([3, 3, 4], "ascend without repeats"),
        ([4, 3], "ascend without repeats"),
        ([], "at least 1 of 20 must stay"),
    ],
    ids=["negative", "out of range", "repeated", "descending", "empty"],
)
def test_wrong_channel_indexes_are_refused_with_their_layer(channels: list[int], trouble: str) -> None:
    data = to_json(make_plan())
    data["layers"][0]["channels"] = channels
    with pytest.raises(ValueError, match=f"layer 0 MLP channels: .*{trouble}"):
        PruningPlan.from_dict(data)


@pytest.mark.parametrize("index", [0.0, "0", True, None, [0]], ids=repr)
def test_index_that_is_no_whole_number_is_refused(index: Any) -> None:
    data = to_json(make_plan())
    data["layers"][0]["channels"] = [index]
    with pytest.raises(ValueError, match="whole numbers"):
        PruningPlan.from_dict(data)


@pytest.mark.parametrize("groups", [0, None], ids=repr)
def test_kept_units_that_are_no_list_are_refused(groups: Any) -> None:
    data = to_json(make_plan())
    data["layers"][0]["groups"] = groups
    with pytest.raises(ValueError, match="wrong type"):
        PruningPlan.from_dict(data)


@pytest.mark.parametrize(
    ("key", "value", "bound"),
    [
        ("rate", 10**39, "a number from 0 to 1"),
        ("rate", float("nan"), "a number from 0 to 1"),
        ("rate", "0.3", "a number from 0 to 1"),
        ("rate", True, "a number from 0 to 1"),
        ("kv_rate", -0.1, "a number from 0 to 1"),
        ("kv_rate", None, "a number from 0 to 1"),
        ("seed", float("inf"), "a whole number of at most 64 bits"),
        ("seed", 2**64, "a whole number of at most 64 bits"),
        ("seed", "0", "a whole number of at most 64 bits"),
        ("model", ["a"], "text of at most 4,096 characters"),
        ("model", "a" * 5000, "text of at most 4,096 characters"),
        ("fingerprint", 7, "text of at most 4,096 characters"),
        ("corpora", "wikitext2", "a list"),
        ("corpora", [{}], "text of at most 4,096 characters"),
        ("layers", {"0": 1}, "a list"),
    ],
)
def test_value_out_of_its_bounds_is_refused_by_name(key: str, value: Any, bound: str) -> None:
    with pytest.raises(ValueError, match=f"the plan's {key} must be {bound}, got ") as caught:
        PruningPlan.from_dict(to_json(make_plan()) | {key: value})
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    "sizes",
    [
        {"query_heads": [10**8], "kv_heads": [1], "channels": [4]},
        {"query_heads": [2**20] * 2, "kv_heads": [1] * 2, "channels": [4] * 2},
        {"query_heads": [2], "kv_heads": [1], "channels": [10**39]},
        {"hidden_size": 10**39},
        {"head_dim": 2**63},
    ],
)
def test_sizes_of_no_model_are_refused_before_anything_is_listed(sizes: dict[str, Any]) -> None:
    geometry = {**to_json(make_plan())["geometry"], **sizes}
    with pytest.raises(ValueError, match="no model has such a geometry"):
        Geometry.from_dict(geometry)


def test_wrong_number_of_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="the plan has 1 layers, but its geometry has 2"):
        make_plan(layers=(KeptUnits((0,), (0,)),))


@pytest.mark.parametrize("key", ["query_heads", "channels"])
def test_count_of_the_geometry_that_is_no_whole_number_is_refused(key: str) -> None:
    data = to_json(make_plan())
    data["geometry"][key][1] += 0.5
    with pytest.raises(ValueError, match=r"whole number|wrong type"):
        PruningPlan.from_dict(data)


def test_plan_fits_the_model_it_was_made_for() -> None:
    make_plan().check_fits(DENSE)


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"family": "qwen2"}, "family llama against qwen2"),
        ({"hidden_size": 65, "head_dim": 4}, "hidden_size 64 against 65"),
        ({"head_dim": 4}, "head_dim 8 against 4"),
        ({"query_heads": (6,), "kv_heads": (2,), "channels": (20,)}, "num_layers 2 against 1"),
        ({"query_heads": (6, 4), "channels": (19, 20)}, "layer 1 query_heads 6 against 4"),
        ({"kv_heads": (2, 3)}, "layer 1 kv_heads 2 against 3"),
        ({"channels": (20, 19)}, "layer 1 channels 20 against 19"),
    ],
    ids=["family", "hidden_size", "head_dim", "num_layers", "query_heads", "kv_heads", "channels"],
)
def test_model_that_does_not_fit_is_refused_with_the_first_difference(changes: dict[str, Any], difference: str) -> None:
    fields = {name: getattr(DENSE, name) for name in DENSE.__dataclass_fields__}
    with pytest.raises(ValueError, match=f"größe/modell.*: {difference} "):
        make_plan().check_fits(Geometry(**(fields | changes)))


@given(plans(queries=False))
def test_pruned_geometry_keeps_every_ratio(plan: PruningPlan) -> None:
    pruned = plan.pruned_geometry
    assert pruned.ratios == plan.geometry.ratios
    assert pruned.kv_heads == tuple(len(kept.groups) for kept in plan.layers)
    assert pruned.channels == tuple(len(kept.channels) for kept in plan.layers)
    assert (pruned.family, pruned.hidden_size, pruned.head_dim) == (
        plan.geometry.family,
        plan.geometry.hidden_size,
        plan.geometry.head_dim,
    )


def test_plan_removes_nothing_only_if_every_unit_stays() -> None:
    whole = KeptUnits((0, 1), tuple(range(20)))
    assert make_plan(layers=(whole, whole)).removes_nothing
    assert not make_plan(layers=(whole, KeptUnits((0, 1), tuple(range(19))))).removes_nothing


def test_layer_is_described_with_its_shapes_before_and_after() -> None:
    layers = 30
    geometry = Geometry("llama", 576, 64, (9,) * layers, (3,) * layers, (1536,) * layers)
    kept = KeptUnits((0, 2), tuple(range(1024)))
    plan = PruningPlan(geometry, (kept,) * layers)
    assert plan.describe_layer(12) == "layer 12  9Q:3KV → 6Q:2KV  MLP 1536 → 1024"
    assert plan.describe_layer(3) == "layer  3  9Q:3KV → 6Q:2KV  MLP 1536 → 1024"


def test_ratio_is_described_once_for_each_that_occurs() -> None:
    assert make_plan().describe_ratio() == "GQA ratio: ✅ every layer keeps 3:1"
    mixed = Geometry("llama", 64, 8, query_heads=(6, 8), kv_heads=(2, 2), channels=(20, 20))
    assert make_plan(geometry=mixed).describe_ratio() == "GQA ratio: ✅ every layer keeps 4:1 and 3:1"


@given(plans())
def test_every_kept_kv_head_has_the_same_whole_number_of_query_heads(plan: PruningPlan) -> None:
    pruned = plan.pruned_geometry
    for layer, kept in enumerate(plan.layers):
        ratio = plan.geometry.ratios[layer]
        for group in kept.groups:
            own = [head for head in plan.list_queries(layer) if head // ratio == group]
            assert len(own) == pruned.ratios[layer] >= 1
    assert pruned.kv_heads == tuple(len(kept.groups) for kept in plan.layers)


@given(st.data())
def test_then_does_to_names_of_units_what_both_plans_do_in_turn(data: st.DataObject) -> None:
    first = data.draw(plans(), "first")
    second = data.draw(plans(first.pruned_geometry), "second")
    both = first.then(second)
    assert both.geometry == first.geometry and both.pruned_geometry == second.pruned_geometry
    assert both.model == first.model and both.corpora == second.corpora
    assert 1 - both.rate == pytest.approx((1 - first.rate) * (1 - second.rate))
    for layer in range(first.geometry.num_layers):
        assert take_names(both, layer, name_units(first.geometry, layer)) == take_names(
            second, layer, take_names(first, layer, name_units(first.geometry, layer))
        )


Names = dict[str, list[str]]


def name_units(geometry: Geometry, layer: int) -> Names:
    counts = {"kv": geometry.kv_heads, "query": geometry.query_heads, "channel": geometry.channels}
    return {kind: [f"{kind} {unit}" for unit in range(count[layer])] for kind, count in counts.items()}


def take_names(plan: PruningPlan, layer: int, names: Names) -> Names:
    """Which of a layer's named units stay, as surgery cuts them: KV heads, query heads, channels."""
    kept, ratio = plan.layers[layer], plan.geometry.ratios[layer]
    heads = [head for group in kept.groups for head in range(group * ratio, (group + 1) * ratio)]
    stays = heads if kept.queries is None else [head for head in heads if head in kept.queries]
    indexes = {"kv": kept.groups, "query": stays, "channel": kept.channels}
    return {kind: [names[kind][index] for index in indexes[kind]] for kind in names}


def test_plan_after_a_plan_for_another_model_is_refused() -> None:
    with pytest.raises(ValueError, match="layer 0 query_heads 6 against 3"):
        make_plan().then(make_plan())


def test_query_heads_of_a_kv_head_are_consecutive() -> None:
    assert list_query_heads([0, 2], 3) == (0, 1, 2, 6, 7, 8)


def test_plan_of_whole_groups_is_written_as_ever_and_query_heads_only_where_a_layer_lost_some() -> None:
    assert {key for kept in make_plan().to_dict()["layers"] for key in kept} == {"groups", "channels"}
    whole, shrunk = make_plan().layers[1], KeptUnits((0, 1), (0,), (0, 2, 3, 4))
    written = make_plan(layers=(whole, shrunk)).to_dict()["layers"]
    assert "queries" not in written[0] and written[1]["queries"] == [0, 2, 3, 4]


@pytest.mark.parametrize(
    ("queries", "trouble"),
    [
        ([-1, 3], "index -1 is outside 0 … 5"),
        ([0, 6], "index 6 is outside 0 … 5"),
        ([0, 0, 3, 3], "ascend without repeats"),
        ([3, 0], "ascend without repeats"),
        ([], "at least 1 of 6 must stay"),
        ([0, 1, 3], "every GQA group must keep the same number, got 1 in group 1 and 2 in group 0"),
        ([0, 1, 2], "every GQA group must keep the same number, got 0 in group 1 and 3 in group 0"),
    ],
    ids=["negative", "out of range", "repeated", "descending", "empty", "uneven", "group without heads"],
)
def test_wrong_query_heads_are_refused_with_their_layer(queries: list[int], trouble: str) -> None:
    data = to_json(make_plan())
    data["layers"][1]["queries"] = queries
    with pytest.raises(ValueError, match=f"layer 1 query heads: .*{trouble}"):
        PruningPlan.from_dict(data)


def test_query_heads_of_a_removed_group_are_refused() -> None:
    with pytest.raises(ValueError, match="layer 0 query heads: some belong to GQA group 0, which is removed"):
        make_plan(layers=(KeptUnits((1,), (0,), (2, 3)), make_plan().layers[1]))


@pytest.mark.parametrize(
    ("queries", "words"),
    [
        ([(0, 2, 3, 4), (0, 1, 4, 5)], "3:1 → 2:1 in every layer"),
        ([None, (0, 1, 4, 5)], "3:1 → 2:1 in 1 of 2 layers, 3:1 kept in 1 of 2 layers"),
        ([(2, 3), (0, 1, 4, 5)], "3:1 → 1:1 in 1 of 2 layers, 3:1 → 2:1 in 1 of 2 layers"),
    ],
)
def test_changed_ratio_is_described(queries: list[tuple[int, ...] | None], words: str) -> None:
    plan = make_plan(layers=tuple(KeptUnits((0, 1), (0,), heads) for heads in queries))
    assert plan.describe_ratio() == f"GQA ratio: ✅ {words}"
    assert plan.describe_layer(1) == "layer 1  6Q:2KV → 4Q:2KV  MLP 20 → 1"


def test_plan_states_its_format() -> None:
    assert make_plan().to_dict()["format"] == FORMAT == "gqaprune-plan/1"
