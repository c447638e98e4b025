"""How much memory this process may still take: of the GPU that MLX uses, or of the machine."""

import os
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

# What a cgroup may take and takes, by version of the interface.
CGROUPS = (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes"))


@dataclass(frozen=True)
class Machine:
    """Memory in bytes.

    Attributes:
        free: What is left for this process, what it holds already not counted. what: In words,
            to go after the number.
    """

    free: int
    what: str


def machine(root: Path = Path("/")) -> Machine | None:
    """What there is; None where nothing says.

    Args:
        root: Of the file system, for tests.
    """
    if mx.default_device().type == mx.gpu:
        return _gpu(mx.device_info(), mx.get_active_memory())
    found = [x for x in (_available(root), *_cgroups(root)) if x is not None]
    if not found and hasattr(os, "sysconf"):
        physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        found = [Machine(physical, "is all that this machine has")]
    return min(found, key=lambda m: m.free, default=None)


def _gpu(info: dict, active: int) -> Machine | None:
    if "max_recommended_working_set_size" in info:
        # Metal shares memory with the system, which wants some of it.
        free = info["max_recommended_working_set_size"] - active
        return Machine(free, "is left of what Metal recommends for its work")
    if "free_memory" in info:
        return Machine(info["free_memory"], "is free on the GPU")
    total = info.get("total_memory", info.get("memory_size"))
    return None if total is None else Machine(total - active, "is left on the GPU")


def _available(root: Path) -> Machine | None:
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        kib = next(int(s.split()[1]) for s in lines if s.startswith("MemAvailable:"))
    except (OSError, ValueError, IndexError, StopIteration):
        return None
    return Machine(kib * 1024, "is free on this machine")


def _cgroups(root: Path) -> list:
    """Limits of the cgroups of this process and of those around them."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    found = []
    for _, kinds, path in (s.split(":", 2) for s in lines if s.count(":") >= 2):
        if kinds and "memory" not in kinds.split(","):
            continue
        mount = root / "sys/fs/cgroup" / ("memory" if kinds else "")
        inner = mount / path.lstrip("/")
        # In a container the path may be one of the host, and its own group the mount itself.
        folders = [f for f in (inner, *inner.parents) if f == mount or mount in f.parents]
        for folder in folders:
            found += [_limit(folder / a, folder / b) for a, b in CGROUPS]
    return found


def _limit(limit: Path, current: Path) -> Machine | None:
    try:
        most, used = limit.read_text().strip(), int(current.read_text())
    except (OSError, ValueError):
        return None
    if not most.isdigit() or int(most) >= 2**60:  # "max", or version 1's way to say so
        return None
    return Machine(max(0, int(most) - used), "is left of this container's limit")
