"""The pruning plan: which units of which layer stay, as plain data.

Everything after a plan is mechanical: surgery cuts what it says, a checkpoint carries it, a second run re-applies it.
This file imports no sibling but those that read and write files, so that a plan can be checked without a model.
"""

import json
import reprlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn, cast

from gqaprune.common.atomic_files import write_atomically
from gqaprune.common.json_files import read_json

PLAN_FILE = "plan.json"
FORMAT = "gqaprune-plan/1"

_LARGEST_SIZE = 2**24
"""Of any width or count of a layer; the largest models have a hundredth."""
_MOST_HEADS = 2**20
"""Query heads of all layers together, which plans of a few bytes can ask for and code here lists; likewise."""
_LONGEST_NAME = 4096
"""Characters of a model's name or path."""
_SEEDS = range(-(2**63), 2**64)
"""What torch takes for a seed."""

BlockKind = Literal["attention", "mlp"]


class BlockKey(NamedTuple):
    """Names one block: decoder layer and kind."""

    layer: int
    kind: BlockKind

    def __str__(self) -> str:
        return f"layer {self.layer} {self.kind}"

    @classmethod
    def parse(cls, text: str) -> "BlockKey":
        """What `str` made."""
        _, layer, kind = text.split()
        return cls(int(layer), cast(BlockKind, kind))


@dataclass(frozen=True)
class Geometry:
    """The shapes of a decoder-only model that pruning changes or depends on.

    Args:
        family: Hugging Face `model_type`.
        hidden_size: width of the residual stream.
        head_dim: features per attention head.
        query_heads: query heads of each layer.
        kv_heads: KV heads of each layer (one per GQA group).
        channels: MLP channels of each layer.
    """

    family: str
    hidden_size: int
    head_dim: int
    query_heads: tuple[int, ...]
    kv_heads: tuple[int, ...]
    channels: tuple[int, ...]

    def __post_init__(self) -> None:
        lengths = {len(self.query_heads), len(self.kv_heads), len(self.channels)}
        if len(lengths) != 1 or lengths == {0}:
            raise ValueError(
                f"a geometry needs one count per layer of each kind, got lists of {sorted(lengths)} layers"
            )
        largest = max(self.hidden_size, self.head_dim, *self.query_heads, *self.kv_heads, *self.channels)
        if largest > _LARGEST_SIZE or sum(self.query_heads) > _MOST_HEADS:
            raise ValueError(
                f"no model has such a geometry: sizes up to {largest:,} and {sum(self.query_heads):,} query heads, at "
                f"most {_LARGEST_SIZE:,} and {_MOST_HEADS:,} are read"
            )
        for layer, (query, kv) in enumerate(zip(self.query_heads, self.kv_heads, strict=True)):
            if kv < 1 or query < kv or query % kv:
                raise ValueError(f"layer {layer} has {query} query heads on {kv} KV heads: not a whole ratio")
        has_mlps = any(self.channels)  # a mixture of experts may have none that is always there
        if min(self.channels) < has_mlps or self.head_dim < 1 or self.hidden_size < 1:
            raise ValueError("MLP channels, head_dim and hidden_size of a geometry must be at least 1")

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return len(self.kv_heads)

    @property
    def ratios(self) -> tuple[int, ...]:
        """Query heads per KV head, layer by layer."""
        return tuple(query // kv for query, kv in zip(self.query_heads, self.kv_heads, strict=True))

    @property
    def is_uniform(self) -> bool:
        """Whether every layer has the same shapes, so that a stock config describes the model."""
        return len(set(zip(self.query_heads, self.kv_heads, self.channels, strict=True))) == 1

    @property
    def projection_weights(self) -> int:
        """Weights of all blocks' projections, biases left out."""
        heads = sum(self.query_heads) + sum(self.kv_heads)
        return self.hidden_size * (2 * self.head_dim * heads + 3 * sum(self.channels))

    def kv_cache_bytes_per_token(self, bytes_per_value: int) -> int:
        """Bytes of keys and values that one token adds to the cache, over all layers."""
        return 2 * sum(self.kv_heads) * self.head_dim * bytes_per_value

    def is_padding_of(self, other: "Geometry") -> bool:
        """Whether all layers are alike and no smaller than the other's, as zeros make them; families aside."""
        fixed = ("hidden_size", "head_dim", "num_layers")
        is_alike = all(getattr(self, name) == getattr(other, name) for name in fixed)
        return (
            is_alike
            and self.is_uniform
            and all(
                own >= kept
                for name in ("query_heads", "kv_heads", "channels")
                for own, kept in zip(getattr(self, name), getattr(other, name), strict=True)
            )
        )

    def difference(self, other: "Geometry") -> str | None:
        """Say in words where two geometries differ first; None where they are equal."""
        for name in ("family", "hidden_size", "head_dim", "num_layers"):
            if getattr(self, name) != getattr(other, name):
                return f"{name} {getattr(self, name)} against {getattr(other, name)}"
        for name in ("query_heads", "kv_heads", "channels"):
            for layer, (mine, theirs) in enumerate(zip(getattr(self, name), getattr(other, name), strict=True)):
                if mine != theirs:
                    return f"layer {layer} {name} {mine} against {theirs}"
        return None

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Geometry":
        """Build a geometry from `asdict`'s output as JSON gives it back."""
        try:
            return cls(
                family=_text(data["family"], "family"),
                hidden_size=_whole_numbers([data["hidden_size"]])[0],
                head_dim=_whole_numbers([data["head_dim"]])[0],
                query_heads=_whole_numbers(data["query_heads"]),
                kv_heads=_whole_numbers(data["kv_heads"]),
                channels=_whole_numbers(data["channels"]),
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"the plan's geometry is incomplete or of the wrong type ({error})") from None


@dataclass(frozen=True)
class KeptUnits:
    """The units that stay in one layer, as ascending indexes into the dense layer.

    Args:
        groups: kept GQA groups (KV heads).
        channels: kept MLP channels.
        queries: kept query heads, the same number in every kept group; None means all that the kept groups have.
    """

    groups: tuple[int, ...]
    channels: tuple[int, ...]
    queries: tuple[int, ...] | None = None


@dataclass(frozen=True)
class PruningPlan:
    """Which units of every layer stay, and where that choice came from.

    Args:
        geometry: shapes of the model that the plan was made for.
        layers: kept units of each layer.
        model: absolute path or name of that model.
        fingerprint: of that model's weights, by which another one under the name is told; empty where it is not known.
        criterion: criterion that scored the units.
        allocation: allocation that chose the counts.
        rate: share of parameters asked to be removed, 0 to 1.
        rate_base: what the rate is a share of, `decoder` (parameters of all decoder layers) or `all`.
        kv_rate: share of the KV heads asked to be removed, 0 to 1; 0 where it was not asked.
        seed: seed of the calibration windows.
        corpora: calibration corpora.

    Raises:
        ValueError: if the kept units do not fit the geometry.
    """

    geometry: Geometry
    layers: tuple[KeptUnits, ...]
    model: str = ""
    criterion: str = ""
    allocation: str = ""
    rate: float = 0.0
    rate_base: str = "decoder"
    kv_rate: float = 0.0
    seed: int = 0
    corpora: tuple[str, ...] = field(default=())
    fingerprint: str = ""

    def __post_init__(self) -> None:
        if len(self.layers) != self.geometry.num_layers:
            raise ValueError(f"the plan has {len(self.layers)} layers, its geometry {self.geometry.num_layers}")
        for layer, kept in enumerate(self.layers):
            _check_indexes(kept.groups, self.geometry.kv_heads[layer], f"layer {layer} GQA groups")
            if kept.channels or self.geometry.channels[layer]:  # none beside experts alone
                _check_indexes(kept.channels, self.geometry.channels[layer], f"layer {layer} MLP channels")
            if kept.queries is not None:
                _check_indexes(kept.queries, self.geometry.query_heads[layer], f"layer {layer} query heads")
                _check_same_number(kept.queries, kept.groups, self.geometry.ratios[layer], f"layer {layer} query heads")

    def list_queries(self, layer: int) -> tuple[int, ...]:
        """The query heads that stay in a layer, as ascending indexes into the dense layer."""
        kept = self.layers[layer]
        return list_query_heads(kept.groups, self.geometry.ratios[layer]) if kept.queries is None else kept.queries

    @property
    def pruned_geometry(self) -> Geometry:
        """Shapes of the model after surgery; every kept KV head keeps its own query heads, or as many as the others."""
        dense = self.geometry
        return Geometry(
            family=dense.family,
            hidden_size=dense.hidden_size,
            head_dim=dense.head_dim,
            query_heads=tuple(len(self.list_queries(layer)) for layer in range(dense.num_layers)),
            kv_heads=tuple(len(kept.groups) for kept in self.layers),
            channels=tuple(len(kept.channels) for kept in self.layers),
        )

    @property
    def removes_nothing(self) -> bool:
        """Whether every unit stays."""
        return self.pruned_geometry == self.geometry

    def leaves(self, geometry: Geometry) -> bool:
        """Whether files of these shapes can hold what the plan leaves, as it is or padded; families aside.

        A checkpoint is stored as the family whose stock class has its shapes.
        """
        pruned = replace(self.pruned_geometry, family=geometry.family)
        return geometry == pruned or geometry.is_padding_of(pruned)

    def check_fits(self, geometry: Geometry) -> None:
        """Refuse a model other than the one the plan was made for.

        Raises:
            ValueError: naming the first difference.
        """
        if difference := self.geometry.difference(geometry):
            raise ValueError(
                f"the plan was made for another model ({self.model or 'unnamed'}): plan against this model: "
                f"{difference}; apply it to the dense model it names, or calibrate a new plan"
            )

    def check_weights(self, model: str, fingerprint: str) -> None:
        """Refuse weights other than those of the model that the plan was made for, if the plan knows them.

        Args:
            model: name of the weights' model.
            fingerprint: of the weights.

        Raises:
            ValueError: with both fingerprints.
        """
        if self.fingerprint and fingerprint != self.fingerprint:
            raise ValueError(
                f"{model} is not the model that the plan was made for ({self.model}): its weights have the fingerprint "
                f"{fingerprint}, expected {self.fingerprint}"
            )

    def then(self, later: "PruningPlan") -> "PruningPlan":
        """The plan that does to the dense model what this plan and then a later one do.

        Where the choice came from (criterion, allocation, seed, corpora) is as in the later plan; rates compound, for
        each is a share of what its plan found.

        Args:
            later: a plan made for the model that this plan leaves.

        Raises:
            ValueError: if the later plan was made for another model.
        """
        later.check_fits(self.pruned_geometry)
        layers = []
        for layer, (first, second) in enumerate(zip(self.layers, later.layers, strict=True)):
            queries = None
            if first.queries is not None or second.queries is not None:
                queries = _pick(self.list_queries(layer), later.list_queries(layer))
            layers.append(
                KeptUnits(_pick(first.groups, second.groups), _pick(first.channels, second.channels), queries)
            )
        return replace(
            later,
            geometry=self.geometry,
            layers=tuple(layers),
            model=self.model,
            fingerprint=self.fingerprint,
            rate=1 - (1 - self.rate) * (1 - later.rate),
            kv_rate=1 - (1 - self.kv_rate) * (1 - later.kv_rate),
        )

    def describe_layer(self, layer: int) -> str:
        """One layer in words: `layer 12  9Q:3KV → 6Q:2KV  MLP 1536 → 1024`."""
        before, after = self.geometry, self.pruned_geometry
        width = len(str(before.num_layers - 1))
        attention = f"{before.query_heads[layer]}Q:{before.kv_heads[layer]}KV"
        attention += f" → {after.query_heads[layer]}Q:{after.kv_heads[layer]}KV"
        mlp = f"  MLP {before.channels[layer]} → {after.channels[layer]}" if before.channels[layer] else ""
        return f"layer {layer:>{width}}  {attention}{mlp}"

    def describe_ratio(self) -> str:
        """What became of the ratio of query heads to KV heads, in words; it is a whole number in every layer."""
        before, after = self.geometry.ratios, self.pruned_geometry.ratios
        if before == after:
            ratios = " and ".join(f"{ratio}:1" for ratio in sorted(set(before), reverse=True))
            return f"GQA ratio: ✅ every layer keeps {ratios}"
        changes = Counter(zip(before, after, strict=True))
        words = {(a, b): f"{a}:1 → {b}:1" if a != b else f"{a}:1 kept" for a, b in changes}
        if len(changes) == 1:
            return f"GQA ratio: ✅ {next(iter(words.values()))} in every layer"
        parts = (f"{words[change]} in {changes[change]} of {len(before)} layers" for change in sorted(changes))
        return f"GQA ratio: ✅ {', '.join(parts)}"

    def to_dict(self) -> dict[str, Any]:
        """Plain types only, as `plan.json` holds them: `queries` where a layer lost query heads of its own."""
        data: dict[str, Any] = json.loads(json.dumps({"format": FORMAT, **asdict(self)}))
        for kept in data["layers"]:
            if kept["queries"] is None:
                del kept["queries"]
        return data

    @classmethod
    def from_dict(cls, data: Any) -> "PruningPlan":
        """Read what `to_dict` wrote.

        Raises:
            ValueError: if it is not a plan, or not one that this version reads.
        """
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            found = data.get("format") if isinstance(data, dict) else type(data).__name__
            raise ValueError(f"not a pruning plan of format {FORMAT!r}: found {reprlib.repr(found)}")
        try:
            layers = tuple(
                KeptUnits(
                    groups=_whole_numbers(kept["groups"]),
                    channels=_whole_numbers(kept["channels"]),
                    queries=_whole_numbers(kept["queries"]) if "queries" in kept else None,
                )
                for kept in _list(data["layers"], "layers")
            )
            return cls(
                geometry=Geometry.from_dict(data["geometry"]),
                layers=layers,
                model=_text(data["model"], "model"),
                criterion=_text(data["criterion"], "criterion"),
                allocation=_text(data["allocation"], "allocation"),
                rate=_share(data["rate"], "rate"),
                rate_base=_text(data["rate_base"], "rate_base"),
                kv_rate=_share(data.get("kv_rate", 0.0), "kv_rate"),  # old plans have neither it nor a fingerprint
                seed=_seed(data["seed"]),
                corpora=tuple(_text(name, "corpora") for name in _list(data["corpora"], "corpora")),
                fingerprint=_text(data.get("fingerprint", ""), "fingerprint"),
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"the pruning plan is incomplete or of the wrong type ({error})") from None

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON, whole or not at all."""
        write_atomically(Path(path), (json.dumps(self.to_dict(), separators=(",", ":")) + "\n").encode())

    @classmethod
    def load(cls, path: str | Path) -> "PruningPlan":
        """Read a plan that `save` wrote.

        Raises:
            ValueError: if the file is missing, is not JSON that can be trusted, or is not a plan.
        """
        data = read_json(path, "pruning plan")
        try:
            return cls.from_dict(data)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None


def find_plan(source: str | Path, geometry: Geometry) -> PruningPlan | None:
    """The plan beside a model in a folder, if it is the one that made it.

    Args:
        source: name or folder of the model.
        geometry: its shapes.
    """
    file = Path(source) / PLAN_FILE
    plan = PruningPlan.load(file) if file.is_file() else None
    return plan if plan is not None and plan.leaves(geometry) else None


def list_query_heads(groups: Sequence[int], ratio: int) -> tuple[int, ...]:
    """All query heads of KV heads, in order: KV head k is read by the consecutive heads `k * ratio … + ratio - 1`."""
    return tuple(group * ratio + head for group in groups for head in range(ratio))


def _whole_numbers(values: Sequence[Any]) -> tuple[int, ...]:
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"units and shapes must be whole numbers, got {reprlib.repr(value)}")
    return tuple(values)


def _list(value: Any, name: str) -> list[Any]:
    if isinstance(value, list):
        return value
    _refuse(value, name, "a list")


def _text(value: Any, name: str) -> str:
    if isinstance(value, str) and len(value) <= _LONGEST_NAME:
        return value
    _refuse(value, name, f"text of at most {_LONGEST_NAME:,} characters")


def _share(value: Any, name: str) -> float:
    if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 1:
        return float(value)
    _refuse(value, name, "a number from 0 to 1")


def _seed(value: Any) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and value in _SEEDS:
        return value
    _refuse(value, "seed", "a whole number of at most 64 bits")


def _refuse(value: Any, name: str, expected: str) -> NoReturn:
    raise ValueError(f"the plan's {name} must be {expected}, got {reprlib.repr(value)}")


def _check_indexes(kept: tuple[int, ...], count: int, what: str) -> None:
    if not kept:
        raise ValueError(f"{what}: at least 1 of {count} must stay, got none")
    if any(a >= b for a, b in pairwise(kept)):
        raise ValueError(f"{what}: kept indexes must ascend without repeats")
    if kept[0] < 0 or kept[-1] >= count:
        outside = kept[0] if kept[0] < 0 else kept[-1]
        raise ValueError(f"{what}: index {outside} is outside 0 … {count - 1}")


def _check_same_number(queries: tuple[int, ...], groups: tuple[int, ...], ratio: int, what: str) -> None:
    heads = Counter(query // ratio for query in queries)
    if strangers := sorted(set(heads) - set(groups)):
        raise ValueError(f"{what}: some are of GQA group {strangers[0]}, which does not stay")
    if len({heads[group] for group in groups}) != 1:
        few, many = (choose(groups, key=heads.__getitem__) for choose in (min, max))
        raise ValueError(
            f"{what}: every GQA group has to keep the same number, got {heads[few]} of group {few} and {heads[many]} "
            f"of group {many}"
        )


def _pick(units: tuple[int, ...], positions: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(units[position] for position in positions)
