"""The pruning plan: the units that each layer keeps, as plain data.

Everything after a plan is mechanical: surgery cuts what it says, a checkpoint carries it, and a second run can apply it
again. This file does not import models, so that a plan can be checked without one.
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
        """Build a key from the output of `str`."""
        _, layer, kind = text.split()
        return cls(int(layer), cast(BlockKind, kind))


@dataclass(frozen=True)
class KeptUnits:
    """The units that one layer keeps, as ascending indexes into the dense layer.

    Args:
        groups: kept GQA groups (KV heads).
        channels: kept MLP channels.
        queries: kept query heads, the same number in every kept group; None keeps all of the kept groups.
    """

    groups: tuple[int, ...]
    channels: tuple[int, ...]
    queries: tuple[int, ...] | None = None


@dataclass(frozen=True)
class PruningPlan:
    """The units that each layer keeps, and how they were chosen.

    Args:
        geometry: shapes of the model that the plan was made for.
        layers: kept units of each layer.
        model: absolute path or name of that model.
        fingerprint: fingerprint of that model's weights, to detect other weights under the same name; empty if unknown.
        criterion: criterion that scored the units.
        allocation: allocation that chose the counts.
        rate: requested share of parameters to remove, 0 to 1.
        rate_base: what `rate` is a share of, `decoder` (parameters of all decoder layers) or `all`.
        kv_rate: requested share of KV heads to remove, 0 to 1; 0 if none was requested.
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
            raise ValueError(f"the plan has {len(self.layers)} layers, but its geometry has {self.geometry.num_layers}")
        for layer, kept in enumerate(self.layers):
            check_indexes(kept.groups, self.geometry.kv_heads[layer], f"layer {layer} GQA groups")
            if kept.channels or self.geometry.channels[layer]:  # a layer of experts alone has none
                check_indexes(kept.channels, self.geometry.channels[layer], f"layer {layer} MLP channels")
            if kept.queries is not None:
                check_indexes(kept.queries, self.geometry.query_heads[layer], f"layer {layer} query heads")
                check_same_number(kept.queries, kept.groups, self.geometry.ratios[layer], f"layer {layer} query heads")

    def list_queries(self, layer: int) -> tuple[int, ...]:
        """List the query heads that a layer keeps, as ascending indexes into the dense layer."""
        kept = self.layers[layer]
        return list_query_heads(kept.groups, self.geometry.ratios[layer]) if kept.queries is None else kept.queries

    @property
    def pruned_geometry(self) -> Geometry:
        """Shapes of the model after the cut. Each kept KV head keeps its query heads, or as many as every other one."""
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
        """Whether the plan keeps every unit."""
        return self.pruned_geometry == self.geometry

    def leaves(self, geometry: Geometry) -> bool:
        """Whether a checkpoint of these shapes can hold the pruned model, padded or not.

        The family is ignored, because a checkpoint is stored as any family whose stock class has its shapes.
        """
        pruned = replace(self.pruned_geometry, family=geometry.family)
        return geometry == pruned or geometry.is_padding_of(pruned)

    def check_fits(self, geometry: Geometry) -> None:
        """Check that the plan was made for a model of these shapes.

        Raises:
            ValueError: if not, naming the first difference.
        """
        if difference := self.geometry.difference(geometry):
            raise ValueError(
                f"the plan was made for another model ({self.model or 'unnamed'}): {difference} (plan against this "
                "model); apply it to the dense model that it was made for, or make a new plan"
            )

    def check_weights(self, model: str, fingerprint: str) -> None:
        """Check that weights are those that the plan was made for, if it has their fingerprint.

        Args:
            model: name of the model.
            fingerprint: fingerprint of its weights.

        Raises:
            ValueError: if they are not, with both fingerprints.
        """
        if self.fingerprint and fingerprint != self.fingerprint:
            raise ValueError(
                f"{model} is not the model that the plan was made for ({self.model}): its weights have the fingerprint "
                f"{fingerprint}, expected {self.fingerprint}"
            )

    def then(self, later: "PruningPlan") -> "PruningPlan":
        """Compose two plans into one that does the same to the dense model as this plan followed by a later one.

        Criterion, allocation, seed and corpora are those of the later plan. Rates compound, because each is a share of
        the model that its plan was made for.

        Args:
            later: a plan made for the model that this plan results in.

        Raises:
            ValueError: if the later plan was made for another model.
        """
        later.check_fits(self.pruned_geometry)
        layers = []
        for layer, (kept, kept_later) in enumerate(zip(self.layers, later.layers, strict=True)):
            queries = None
            if kept.queries is not None or kept_later.queries is not None:
                queries = _pick(self.list_queries(layer), later.list_queries(layer))
            layers.append(
                KeptUnits(_pick(kept.groups, kept_later.groups), _pick(kept.channels, kept_later.channels), queries)
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
        """Describe one layer in a line, such as `layer 12  9Q:3KV → 6Q:2KV  MLP 1536 → 1024`."""
        before, after = self.geometry, self.pruned_geometry
        width = len(str(before.num_layers - 1))
        attention = f"{before.query_heads[layer]}Q:{before.kv_heads[layer]}KV"
        attention += f" → {after.query_heads[layer]}Q:{after.kv_heads[layer]}KV"
        mlp = f"  MLP {before.channels[layer]} → {after.channels[layer]}" if before.channels[layer] else ""
        return f"layer {layer:>{width}}  {attention}{mlp}"

    def describe_ratio(self) -> str:
        """Describe how the ratio of query heads to KV heads changed; it is a whole number in every layer."""
        before, after = self.geometry.ratios, self.pruned_geometry.ratios
        if before == after:
            ratios = " and ".join(f"{ratio}:1" for ratio in sorted(set(before), reverse=True))
            return f"GQA ratio: ✅ every layer keeps {ratios}"
        changes = Counter(zip(before, after, strict=True))
        words = {(a, b): f"{a}:1 → {b}:1" if a != b else f"{a}:1 kept" for a, b in changes}
        if len(changes) == 1:
            return f"GQA ratio: ✅ {next(iter(words.values()))} in every layer"
        counts = (f"{words[change]} in {changes[change]} of {len(before)} layers" for change in sorted(changes))
        return f"GQA ratio: ✅ {', '.join(counts)}"

    def to_dict(self) -> dict[str, Any]:
        """Convert to plain types for `plan.json`; layers that lost single query heads have an entry `queries`."""
        data: dict[str, Any] = json.loads(json.dumps({"format": FORMAT, **asdict(self)}))
        for kept in data["layers"]:
            if kept["queries"] is None:
                del kept["queries"]
        return data

    @classmethod
    def from_dict(cls, data: Any) -> "PruningPlan":
        """Build a plan from the output of `to_dict`.

        Raises:
            ValueError: if it is not a plan, or of a format that this version does not read.
        """
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            actual = data.get("format") if isinstance(data, dict) else type(data).__name__
            raise ValueError(f"not a pruning plan of format {FORMAT!r}, got {reprlib.repr(actual)}")
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
                kv_rate=read_share(data.get("kv_rate", 0.0), "kv_rate"),  # old plans have no kv_rate and no fingerprint
                seed=read_seed(data["seed"]),
                corpora=tuple(read_text(name, "corpora") for name in read_list(data["corpora"], "corpora")),
                fingerprint=read_text(data.get("fingerprint", ""), "fingerprint"),
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"the pruning plan is incomplete or of the wrong type ({error})") from None

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON, atomically."""
        write_atomically(Path(path), (json.dumps(self.to_dict(), separators=(",", ":")) + "\n").encode())

    @classmethod
    def load(cls, path: str | Path) -> "PruningPlan":
        """Read a plan that `save` wrote.

        Raises:
            ValueError: if the file is missing, is not safe JSON, or is not a plan.
        """
        data = read_json(path, "pruning plan")
        try:
            return cls.from_dict(data)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None


def find_plan(source: str | Path, geometry: Geometry) -> PruningPlan | None:
    """Load the plan in a model's folder, if there is one that results in this model; otherwise return None.

    Args:
        source: name or folder of the model.
        geometry: shapes of the model.
    """
    file = Path(source) / PLAN_FILE
    plan = PruningPlan.load(file) if file.is_file() else None
    return plan if plan is not None and plan.leaves(geometry) else None


def list_query_heads(groups: Sequence[int], ratio: int) -> tuple[int, ...]:
    """List all query heads of some KV heads, in order: KV head k has the heads `k * ratio … k * ratio + ratio - 1`."""
    return tuple(group * ratio + head for group in groups for head in range(ratio))


def _pick(units: tuple[int, ...], positions: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(units[position] for position in positions)
