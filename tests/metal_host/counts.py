"""What one launch did, counted: the numbers that cost models are checked against."""

from __future__ import annotations

from dataclasses import dataclass, field

# Operations that are not simd operations in `LaunchCounts.simd_operations`.
_NOT_SIMD = frozenset(
    {"none", "threadgroup_barrier", "simdgroup_barrier", "simdgroup_multiply"}
    | {"simdgroup_load", "simdgroup_store"}
)


@dataclass(frozen=True)
class BufferCounts:
    """Traffic of one buffer in bytes.

    Attributes:
        space: "device" or "constant".
        size: bytes of the buffer.
        read, written: what all lanes loaded and stored together.
        unique_read, unique_written: bytes touched at least once.
    """

    space: str
    size: int
    read: int
    written: int
    unique_read: int
    unique_written: int


@dataclass(frozen=True)
class LaunchCounts:
    """Counts of one launch.

    Byte counts are logical traffic: each lane's loads and stores as clang left them at -O1, so a
    value kept in a register counts once and there is no cache. They are None unless the launch ran
    with check=True or count=True. Simd operations, simdgroup multiplies, loads, stores and
    simdgroup barriers count once for each SIMD-group that executes them.

    Attributes:
        threads, simdgroups, threadgroups: what the grid held.
        threadgroup_memory: bytes declared, each variable rounded up to 16.
        operations: executions by name, such as {"simd_sum": 8, "threadgroup_barrier": 1}.
        atomics: atomic operations of all lanes.
        buffers: traffic by buffer name.
        threadgroup_bytes_read, threadgroup_bytes_written: traffic of threadgroup memory.
    """

    threads: int
    simdgroups: int
    threadgroups: int
    threadgroup_memory: int
    operations: dict[str, int]
    atomics: int
    buffers: dict[str, BufferCounts] | None = None
    threadgroup_bytes_read: int | None = None
    threadgroup_bytes_written: int | None = None
    fiber_switches: int = field(default=0, repr=False)

    @property
    def simd_operations(self) -> int:
        """Reductions, shuffles, scans and votes."""
        return sum(n for name, n in self.operations.items() if name not in _NOT_SIMD)

    @property
    def simdgroup_multiplies(self) -> int:
        """8 x 8 x 8 matrix multiplies (1024 floating-point operations each)."""
        return self.operations.get("simdgroup_multiply", 0)

    @property
    def threadgroup_barriers(self) -> int:
        """Barriers passed, each counted once for its threadgroup."""
        return self.operations.get("threadgroup_barrier", 0)

    @property
    def simdgroup_barriers(self) -> int:
        return self.operations.get("simdgroup_barrier", 0)

    def _sum(self, what: str, space: str) -> int | None:
        if self.buffers is None:
            return None
        return sum(getattr(b, what) for b in self.buffers.values() if b.space == space)

    @property
    def device_bytes_read(self) -> int | None:
        return self._sum("read", "device")

    @property
    def device_bytes_written(self) -> int | None:
        return self._sum("written", "device")

    @property
    def constant_bytes_read(self) -> int | None:
        return self._sum("read", "constant")

    @property
    def unique_device_bytes_read(self) -> int | None:
        """Compulsory reads: each byte of device memory once a launch."""
        return self._sum("unique_read", "device")

    @property
    def unique_device_bytes_written(self) -> int | None:
        """Compulsory writes: each byte of device memory once a launch."""
        return self._sum("unique_written", "device")
