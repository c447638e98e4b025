"""Checkpoints: the HydraHead layout in safetensors, GGUF bases, and parts small enough to carry.

A packed checkpoint holds, for each matrix, the difference to the freshly migrated model in int8
with one scale a row. That model follows from the base, the head map and the seed, so the parts
suffice to go on from. The error is 0.8 % of what training changed: less than rounding the weights
to bfloat16, which costs 0.2 % of the weights, until training has moved a matrix by a quarter.
"""

import hashlib
import json
import lzma
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

PART_BYTES = 15 << 20


def save_model(folder: Path, config: dict, tensors: dict[str, Tensor], dtype=torch.float32) -> None:
    """Writes config.json and model.safetensors of the HydraHead layout."""
    folder.mkdir(parents=True, exist_ok=True)
    out = {n: t.detach().to("cpu", dtype).contiguous() for n, t in tensors.items()}
    save_file(out, folder / "model.safetensors", metadata={"format": "pt"})
    config = config | {"torch_dtype": str(dtype).removeprefix("torch.")}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def load_model(folder: Path) -> tuple[dict, dict[str, Tensor]]:
    """config and float32 tensors of a folder in Hugging Face's layout."""
    config = json.loads((folder / "config.json").read_text())
    return config, {n: t.float() for n, t in load_file(folder / "model.safetensors").items()}


def load_base(path: Path) -> tuple[dict, dict[str, Tensor]]:
    """The base model of a .gguf file or a Hugging Face folder, in float32."""
    if path.suffix != ".gguf":
        return load_model(path)
    from hydra_mlx.gguf import GGUFFile
    from hydra_mlx.gguf_llama import config_from_gguf, iter_llama_tensors

    gguf = GGUFFile.open(path)
    tensors = iter_llama_tensors(gguf, affine=False)
    return config_from_gguf(gguf.metadata, gguf.tensors), {
        n: torch.from_numpy(np.array(t, np.float32)) for n, t in tensors
    }


def pack(tensors: dict[str, Tensor], start: dict[str, Tensor], levels: int = 127) -> bytes:
    """The tensors as differences to `start`: int8 rows for matrices, float32 for the rest."""
    header, blobs, at = {}, [], 0
    for name, tensor in tensors.items():
        change = (tensor.detach().cpu().float() - start[name].detach().cpu().float()).numpy()
        if change.ndim == 2:
            scale = np.abs(change).max(1, keepdims=True) / levels
            codes = np.rint(change / np.where(scale > 0, scale, 1)).astype(np.int8)
            parts = [scale.astype(np.float32).tobytes(), codes.tobytes()]
        else:
            parts = [change.astype(np.float32).tobytes()]
        header[name] = {"at": at, "shape": list(change.shape)}
        at += sum(len(p) for p in parts)
        blobs += parts
    head = json.dumps(header).encode()
    return len(head).to_bytes(8, "little") + head + b"".join(blobs)


def unpack(data: bytes, start: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of pack, up to the rounding of the differences."""
    size = int.from_bytes(data[:8], "little")
    header, body, out = json.loads(data[8 : 8 + size]), memoryview(data)[8 + size :], {}
    for name, entry in header.items():
        shape, at = entry["shape"], entry["at"]
        if len(shape) == 2:
            scale = np.frombuffer(body, np.float32, shape[0], at)[:, None]
            codes = np.frombuffer(body, np.int8, shape[0] * shape[1], at + 4 * shape[0])
            change = codes.reshape(shape) * scale
        else:
            change = np.frombuffer(body, np.float32, int(np.prod(shape)), at).reshape(shape).copy()
        out[name] = start[name].detach().cpu().float() + torch.from_numpy(change)
    return out


def write_parts(folder: Path, name: str, data: bytes, part: int = PART_BYTES) -> list[Path]:
    """Splits data into files NAME.000, NAME.001, ... and NAME.json with their hashes.

    Slices are compressed with xz where that makes them smaller; a part holds whole slices.
    """
    folder.mkdir(parents=True, exist_ok=True)
    slices = [data[i : i + part] for i in range(0, len(data), part)]
    with ThreadPoolExecutor() as pool:
        packed = list(pool.map(lambda s: lzma.compress(s, preset=1), slices))
    joined = b"".join(packed)
    pieces = [joined[i : i + part] for i in range(0, len(joined), part)]
    files = [folder / f"{name}.{i:03}" for i in range(len(pieces))]
    for file, piece in zip(files, pieces, strict=True):
        file.write_bytes(piece)
    listing = {f.name: hashlib.sha256(p).hexdigest() for f, p in zip(files, pieces, strict=True)}
    (folder / f"{name}.json").write_text(json.dumps({"parts": listing}, indent=1) + "\n")
    return files


def read_parts(folder: Path, name: str) -> bytes:
    """The data that write_parts split; ValueError names a part that is missing or damaged."""
    listing = json.loads((folder / f"{name}.json").read_text())["parts"]
    pieces = []
    for part, digest in listing.items():
        piece = (folder / part).read_bytes() if (folder / part).exists() else b""
        if hashlib.sha256(piece).hexdigest() != digest:
            raise ValueError(f"{folder / part} is {'damaged' if piece else 'missing'}")
        pieces.append(piece)
    # Concatenated xz streams read as one.
    return lzma.decompress(b"".join(pieces))
