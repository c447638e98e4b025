"""Reading JSON that a person gave, writing files whole or not at all, and where ours are kept."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .errors import ConfigError, UsageError


def user_cache_dir() -> Path:
    """Where files of this program are kept that nobody named; not created here.

    $HYDRA_MLX_CACHE, else $XDG_CACHE_HOME/hydra_mlx, else ~/Library/Caches/hydra_mlx on macOS
    and ~/.cache/hydra_mlx elsewhere.
    """
    if os.environ.get("HYDRA_MLX_CACHE"):
        return Path(os.environ["HYDRA_MLX_CACHE"]).expanduser()
    if os.environ.get("XDG_CACHE_HOME"):
        return Path(os.environ["XDG_CACHE_HOME"]).expanduser() / "hydra_mlx"
    base = "Library/Caches" if sys.platform == "darwin" else ".cache"
    return Path.home() / base / "hydra_mlx"


def sync_folder(folder: Path, files: bool = True):
    """Push a folder's names, and every byte of its files unless told otherwise, to the disk."""
    for path in [*(folder.iterdir() if files else ()), folder]:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def read_json(path: Path, what: str, hint: str) -> Any:
    """The content of a JSON file.

    Args:
        what: What the file is, as the errors call it. hint: Where such a file comes from.

    Raises:
        UsageError: It cannot be read. ConfigError: It is not JSON.
    """
    try:
        return json.loads(path.read_text("utf-8"))
    except OSError as e:
        why = e.strerror or type(e).__name__
        raise UsageError(f"{what} {path} cannot be read ({why}).", hint) from None
    except (ValueError, RecursionError):
        raise ConfigError(f"{what} {path} is not valid JSON.", hint) from None


def write_whole(path: Path, write: Callable[[Path], Any]):
    """Have `write` fill a file beside `path`, then give it that name.

    Raises:
        UsageError: It cannot be written; what was there before still is.
    """
    beside = path.with_name(f".{path.name}.writing")
    try:
        write(beside)
        os.replace(beside, path)
    except OSError as e:
        raise UsageError(f"{path} cannot be written ({e.strerror or e}).") from None


def write_json(path: Path, value: Any):
    """Write a JSON file whole or not at all.

    Raises:
        UsageError: It cannot be written.
    """
    write_whole(path, lambda beside: beside.write_text(json.dumps(value, indent=1) + "\n", "utf-8"))
