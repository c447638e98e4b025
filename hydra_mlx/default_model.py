"""The model that programs use without --model: fetched and converted once, then kept."""

import contextlib
import fcntl
from collections.abc import Callable, Iterator
from pathlib import Path

from . import __version__, fetch
from .errors import UsageError

NAME = "SmolLM2-135M-Instruct"


def folder(cache_dir: Path | None = None) -> Path:
    """Where the converted default model is, or will be."""
    base = fetch.user_cache_dir() if cache_dir is None else Path(cache_dir)
    return base / "models" / f"{NAME}-{__version__}"


@contextlib.contextmanager
def _locked(path: Path, log: Callable) -> Iterator[None]:
    """Hold a lock file, so that two processes do not convert at once; the system frees it."""
    with path.open("w") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log("Another process is preparing the default model; waiting for it.")
            fcntl.flock(f, fcntl.LOCK_EX)
        yield


def ensure(log: Callable, cache_dir: Path | None = None) -> Path:
    """The folder of the default model; downloads and converts it the first time.

    Args:
        log: Gets one line of text for each thing that takes time or network.
        cache_dir: Default fetch.user_cache_dir().

    Raises:
        UsageError: No source can be reached, or the folder cannot be written.
    """
    target = folder(cache_dir)
    if (target / "config.json").is_file():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target.parent / f".{target.name}.preparing", log):
            if (target / "config.json").is_file():
                return target
            log(f"No --model is given; getting {NAME}, a small model to try things with (once).")
            source = fetch.fetch_default_source(log, cache_dir)
            from .convert import convert_default

            convert_default(source, target, log)
    except OSError as e:
        raise UsageError(
            f"The default model cannot be put into {target} ({e.strerror or e}).",
            "Free some space, point HYDRA_MLX_CACHE at a folder that can be written, or give "
            "--model.",
        ) from e
    return target
