"""The shapes of a decoder-only model that pruning changes or depends on, as plain data."""

from dataclasses import dataclass
from typing import Any

from gqaprune.plan_fields import read_text, read_whole_numbers

_LARGEST_SIZE = 2**24
"""Largest width or count of a layer that is read, about a hundred times that of the largest models."""
_MOST_HEADS = 2**20
"""Largest number of query heads of all layers. Without a limit, a plan of a few bytes could fill memory with lists."""


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
                f"a geometry needs one count per layer of each kind, got lists for {sorted(lengths)} layers"
            )
        largest = max(self.hidden_size, self.head_dim, *self.query_heads, *self.kv_heads, *self.channels)
        if largest > _LARGEST_SIZE or sum(self.query_heads) > _MOST_HEADS:
            raise ValueError(
                f"no model has such a geometry: sizes must be at most {_LARGEST_SIZE:,} with at most {_MOST_HEADS:,} "
                f"query heads in total, got {largest:,} and {sum(self.query_heads):,}"
            )
        for layer, (query, kv) in enumerate(zip(self.query_heads, self.kv_heads, strict=True)):
            if kv < 1 or query < kv or query % kv:
                raise ValueError(f"layer {layer} has {query} query heads on {kv} KV heads, which is not a whole ratio")
        has_mlps = any(self.channels)  # a mixture of experts may have no shared MLP
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
        """Whether all layers have the same shapes, so that a stock config can describe the model."""
        return len(set(zip(self.query_heads, self.kv_heads, self.channels, strict=True))) == 1

    @property
    def projection_weights(self) -> int:
        """Number of weights of all blocks' projections, without biases."""
        heads = sum(self.query_heads) + sum(self.kv_heads)
        return self.hidden_size * (2 * self.head_dim * heads + 3 * sum(self.channels))

    def kv_cache_bytes_per_token(self, bytes_per_value: int) -> int:
        """Count the bytes of keys and values that one token adds to the cache, over all layers."""
        return 2 * sum(self.kv_heads) * self.head_dim * bytes_per_value

    def is_padding_of(self, other: "Geometry") -> bool:
        """Whether all layers are equal and at least as large as the other's, as after padding; ignores the family."""
        fixed = ("hidden_size", "head_dim", "num_layers")
        is_alike = all(getattr(self, name) == getattr(other, name) for name in fixed)
        return (
            is_alike
            and self.is_uniform
            and all(
                padded >= count
                for name in ("query_heads", "kv_heads", "channels")
                for padded, count in zip(getattr(self, name), getattr(other, name), strict=True)
            )
        )

    def difference(self, other: "Geometry") -> str | None:
        """Describe the first difference between two geometries; None if they are equal."""
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
        """Build a geometry from the output of `asdict` after a round trip through JSON.

        Raises:
            ValueError: if a field is missing, of the wrong type or out of bounds.
        """
        try:
            return cls(
                family=read_text(data["family"], "family"),
                hidden_size=read_whole_numbers([data["hidden_size"]])[0],
                head_dim=read_whole_numbers([data["head_dim"]])[0],
                query_heads=read_whole_numbers(data["query_heads"]),
                kv_heads=read_whole_numbers(data["kv_heads"]),
                channels=read_whole_numbers(data["channels"]),
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"the plan's geometry is incomplete or of the wrong type ({error})") from None
