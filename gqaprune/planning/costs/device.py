"""How fast a device is, and the least time that work needs there."""

from dataclasses import dataclass

from gqaprune.planning.costs.base import Cost


@dataclass(frozen=True)
class Device:
    """Speeds of a device.

    Args:
        name: what it is called.
        flops: operations per second of dense products in the model's type.
        single_flops: in float32, without rounding to a narrower type.
        double_flops: in float64.
        bandwidth: bytes per second of its memory.
        host_bandwidth: bytes per second to and from the host; infinite where the host works itself.
    """

    name: str
    flops: float
    single_flops: float
    double_flops: float
    bandwidth: float
    host_bandwidth: float = float("inf")

    def find_least_seconds(self, cost: Cost) -> float:
        """Time of the products alone, of the memory alone or of the way to the host alone, whichever is longest."""
        products = cost.flops / self.flops + cost.single_flops / self.single_flops
        products += cost.double_flops / self.double_flops
        return max(products, cost.bytes_moved / self.bandwidth, cost.host_bytes / self.host_bandwidth)
