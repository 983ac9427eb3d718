"""The speed of a device, and the least time that work needs on it."""

from dataclasses import dataclass

from gqaprune.planning.costs.base import Cost


@dataclass(frozen=True)
class Device:
    """Speeds of a device.

    Args:
        name: name of the device.
        flops: operations per second of dense products in the model's dtype.
        single_flops: operations per second in float32, without rounding to a narrower type.
        double_flops: operations per second in float64.
        bandwidth: bytes per second to and from its memory.
        host_bandwidth: bytes per second to and from the host; infinite if the device is the host's CPU.
        memory: free bytes of a GPU; infinite if the device is the host's CPU, whose room for matrices is fixed.
    """

    name: str
    flops: float
    single_flops: float
    double_flops: float
    bandwidth: float
    host_bandwidth: float = float("inf")
    memory: float = float("inf")

    def find_least_seconds(self, cost: Cost) -> float:
        """Return the longest of the times for products, for memory and for transfers to the host, in seconds."""
        products = cost.flops / self.flops + cost.single_flops / self.single_flops
        products += cost.double_flops / self.double_flops
        return max(products, cost.bytes_moved / self.bandwidth, cost.host_bytes / self.host_bandwidth)
