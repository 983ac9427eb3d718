"""The pruning plan: which units of which layer stay, as plain data.

Everything after a plan is mechanical: surgery cuts what it says, a checkpoint carries it, a second run re-applies it.
This file imports no sibling but those that read and write files, so that a plan can be checked without a model.
"""

import json
import reprlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

from gqaprune.common.atomic_files import write_atomically
from gqaprune.common.json_files import read_json
from gqaprune.geometry import Geometry
from gqaprune.plan_fields import (
    check_indexes,
    check_same_number,
    read_list,
    read_seed,
    read_share,
    read_text,
    read_whole_numbers,
)

PLAN_FILE = "plan.json"
FORMAT = "gqaprune-plan/1"

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
            check_indexes(kept.groups, self.geometry.kv_heads[layer], f"layer {layer} GQA groups")
            if kept.channels or self.geometry.channels[layer]:  # none beside experts alone
                check_indexes(kept.channels, self.geometry.channels[layer], f"layer {layer} MLP channels")
            if kept.queries is not None:
                check_indexes(kept.queries, self.geometry.query_heads[layer], f"layer {layer} query heads")
                check_same_number(kept.queries, kept.groups, self.geometry.ratios[layer], f"layer {layer} query heads")

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
                    groups=read_whole_numbers(kept["groups"]),
                    channels=read_whole_numbers(kept["channels"]),
                    queries=read_whole_numbers(kept["queries"]) if "queries" in kept else None,
                )
                for kept in read_list(data["layers"], "layers")
            )
            return cls(
                geometry=Geometry.from_dict(data["geometry"]),
                layers=layers,
                model=read_text(data["model"], "model"),
                criterion=read_text(data["criterion"], "criterion"),
                allocation=read_text(data["allocation"], "allocation"),
                rate=read_share(data["rate"], "rate"),
                rate_base=read_text(data["rate_base"], "rate_base"),
                kv_rate=read_share(data.get("kv_rate", 0.0), "kv_rate"),  # old plans have neither it nor a fingerprint
                seed=read_seed(data["seed"]),
                corpora=tuple(read_text(name, "corpora") for name in read_list(data["corpora"], "corpora")),
                fingerprint=read_text(data.get("fingerprint", ""), "fingerprint"),
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


def _pick(units: tuple[int, ...], positions: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(units[position] for position in positions)
