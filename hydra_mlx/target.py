"""Where a finished model folder goes: checked before the work, put in place in one rename.

Two renames replace a folder; a kill between them is mended by the next run (recover).
"""

import fcntl
import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import UsageError
from .text import first_line


def real_path(target: Path) -> Path:
    """The target without links, "." and "..": the name beside which everything happens.

    Raises:
        UsageError: A link to itself, or no path at all.
    """
    try:
        return target.expanduser().resolve()
    except (OSError, RuntimeError, ValueError) as e:
        raise UsageError(f"{str(target)!r} cannot be written to ({first_line(e)}).") from None


def check_target(source: Path, target: Path, overwrite: bool):
    """Refuse a target that must not be written to or, with --overwrite, deleted.

    Args:
        source: What the target is made from. target: From real_path.

    Raises:
        UsageError: It must not.
    """
    if target == source.resolve():
        raise UsageError("Source and target are the same; choose another target.")
    if not target.exists():
        return
    if target in source.resolve().parents:
        raise UsageError(f"The source lies inside {target}; choose another target.")
    if not overwrite:
        raise UsageError(f"{target} exists already.", "Choose another target, or add --overwrite.")
    if not target.is_dir() or (any(target.iterdir()) and not (target / "config.json").is_file()):
        raise UsageError(
            f"{target} is not a model folder; --overwrite does not delete it.",
            "Choose another target.",
        )


@contextmanager
def locked(target: Path) -> Iterator[None]:
    """Keep a second conversion away from the same target; the lock dies with its process."""
    path = target.parent / f".{target.name}.lock"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as e:
        raise UsageError(f"Cannot write beside {target}: {e.strerror or e}.") from None
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # One that ended since we opened the file has unlinked it: then it guards nothing.
            if os.fstat(fd).st_ino != path.stat().st_ino:
                raise OSError
        except OSError:
            raise UsageError(f"Another conversion to {target} is running.") from None
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
    finally:
        os.close(fd)


def _old(target: Path) -> Path:
    return target.parent / f".{target.name}.replaced"


def recover(target: Path):
    """After a kill between the two renames of an overwrite: give the old model its name back;
    and sweep up what killed conversions left."""
    old = _old(target)
    if old.exists():
        if target.exists():
            _discard(old, target)
        else:
            old.rename(target)
    for partial in target.parent.glob(f".{glob.escape(target.name)}.partial-*"):
        shutil.rmtree(partial, ignore_errors=True)


def _discard(old: Path, target: Path):
    """Delete a replaced model, under a name that `recover` never gives back: a kill may leave
    half of it."""
    doomed = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
    old.rename(doomed / "old")
    shutil.rmtree(doomed, ignore_errors=True)


def put_in_place(partial: Path, target: Path):
    """Give a finished folder its name; what had it before is deleted."""
    if target.exists():
        target.rename(_old(target))
        partial.rename(target)
        _discard(_old(target), target)
    else:
        partial.rename(target)
