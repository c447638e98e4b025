"""Results of a long run, one JSON line each, so that a killed run goes on where it stopped."""

import fcntl
import json
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import __version__
from .errors import UsageError
from .files import write_json


class Journal:
    """An append-only file of (key, value) lines under a header that says what they belong to.

    Args:
        path: Made if absent; otherwise its lines are taken over, a half-written last one dropped.
            In a `with` block Ctrl-C says that it can be gone on with.
        header: Must equal that of an existing file.

    Raises:
        UsageError: The file belongs to another run, or cannot be read or written.
    """

    def __init__(self, path: Path, header: dict):
        self.path, self.values = path, {}
        try:
            lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
        except OSError as e:
            raise UsageError(f"{path} cannot be read ({e.strerror}).") from None
        whole, good = 0, []
        for line in lines:
            try:
                good.append(json.loads(line))
            except ValueError:
                break
            whole += len(line) + 1
        if lines and not good:
            raise UsageError(f"{path} is no journal of this program.", "Move it away.")
        if good and good[0] != json.loads(json.dumps(header)):
            raise UsageError(
                f"{path} was left by a run with other settings or another model.",
                "Give the flags of that run to go on with it, or --overwrite to give it up.",
            )
        try:
            self._file = path.open("r+b" if path.exists() else "xb")
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._file.truncate(whole)
            self._file.seek(whole)
        except BlockingIOError:
            raise UsageError(f"Another run is writing {path}.", "Wait for it to end.") from None
        except OSError as e:
            raise UsageError(f"{path} cannot be written ({e.strerror}).") from None
        for entry in good[1:]:
            self.values[entry[0]] = entry[1]
        if not good:
            self._write(header)

    def _write(self, value: Any):
        self._file.write(json.dumps(value).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def add(self, key: str, value: Any):
        """Keep a value; it is on the disk when this returns."""
        self._write([key, value])
        self.values[key] = value

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any):
        self.close()
        if kind is KeyboardInterrupt and self.path.exists():
            goes_on = f"Interrupted; the same command without --overwrite goes on from {self.path}."
            raise KeyboardInterrupt(goes_on) from None

    def close(self):
        """Close the file and leave it."""
        self._file.close()

    def discard(self):
        """Close the file and remove it: what it holds leads nowhere."""
        self.close()
        self.path.unlink(missing_ok=True)

    def finish(self, target: Path, result: dict):
        """Write the result beside `target`, give it that name, then remove the journal.

        Raises:
            UsageError: It cannot be written; the journal is left.
        """
        self.close()
        write_json(target, result)
        self.discard()


def partial_path(target: Path, forget: bool) -> Path:
    """Where the journal of a result file is; with `forget` both are removed first."""
    partial = target.with_name(target.name + ".partial")
    if forget:
        target.unlink(missing_ok=True)
        partial.unlink(missing_ok=True)
    return partial


def versions() -> dict:
    """Of what the figures depend on."""
    from importlib.metadata import version

    return {"hydra_mlx": __version__, "mlx": version("mlx"), "mlx_lm": version("mlx-lm")}


def command_line(program: str, argv: Sequence) -> str:
    """A command as it was typed, files without the folders they are in.

    Args:
        program: What begins it, such as "python tools/perplexity.py". argv: Its arguments.
    """
    named = [str(a) for a in argv]
    near = [Path(a).name if "/" in a and Path(a).parent.is_dir() else a for a in named]
    return f"{program} {shlex.join(near)}"
