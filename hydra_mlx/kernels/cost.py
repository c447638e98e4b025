"""What a launch costs, counted by hand; the host runtime's counts check these figures."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Cost:
    """Work of one operation.

    Attributes:
        read, written: Bytes of device memory that lanes load and store (logical traffic).
        flops: Floating-point operations, a multiply-add as two.
        threadgroup_bytes: Largest threadgroup memory of its launches.
        dispatches: Launches.
    """

    read: int
    written: int
    flops: int
    threadgroup_bytes: int
    dispatches: int

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(
            self.read + other.read,
            self.written + other.written,
            self.flops + other.flops,
            max(self.threadgroup_bytes, other.threadgroup_bytes),
            self.dispatches + other.dispatches,
        )
