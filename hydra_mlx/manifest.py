"""hydra_manifest.json: where a converted folder came from, and a checksum of every file."""

import hashlib
import json
from pathlib import Path

from . import __version__
from .errors import CheckpointError
from .layouts import KeyReport

MANIFEST = "hydra_manifest.json"
BLOCK = 1 << 22


def file_digest(path: Path) -> str:
    """SHA-256 of a file, hex."""
    digest = hashlib.sha256()
    with path.open("rb") as f:
        while block := f.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def model_name(given: str | None, path: Path) -> str:
    """What a result calls a model: the hub id, or the last part of a local path."""
    return path.name if given is None or Path(given).expanduser().exists() else given


def model_hash(path: Path) -> str:
    """SHA-256 over the weights of a model folder or of a GGUF file, hex."""
    if path.is_file():
        return file_digest(path)
    digest = hashlib.sha256()
    for file in sorted(path.glob("model*.safetensors")):
        digest.update(file_digest(file).encode())
    return digest.hexdigest()


def manifest(folder: Path, source: str, report: KeyReport) -> dict:
    """The manifest of a finished folder.

    Args:
        source: Name of what it was made from; only its last part is kept.
    """
    files = {
        p.name: {"bytes": p.stat().st_size, "sha256": file_digest(p)}
        for p in sorted(folder.iterdir())
        if p.is_file()
    }
    return {
        "hydra_mlx_version": __version__,
        "source": Path(source).name,
        "keys": {
            "mapped": len(report.mapped),
            "dropped": report.dropped,
            "missing": report.missing,
            "unexpected": report.unexpected,
        },
        "files": files,
    }


def check_files(folder: Path):
    """Compare the weights of a folder with its manifest, byte for byte.

    Raises:
        CheckpointError: There is no manifest, or a file is missing or has other content.
    """
    path = folder / MANIFEST
    again = "Convert the model again."
    try:
        files = json.loads(path.read_text("utf-8"))["files"]
        wanted = {str(n): str(f["sha256"]) for n, f in files.items()}
    except FileNotFoundError:
        raise CheckpointError(f"{folder} has no {MANIFEST} to check its weights with.") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise CheckpointError(f"{path}: not a valid manifest.", again) from None
    for name, digest in wanted.items():
        file = folder / name
        if "/" in name or not name.endswith(".safetensors"):
            continue  # text files may be edited
        if not file.is_file():
            raise CheckpointError(f"{folder}: {name} is missing.", again)
        if file_digest(file) != digest:
            raise CheckpointError(f"{file}: the content has changed since it was written.", again)
