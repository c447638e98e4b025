"""Turns a checkpoint into another form, layer by layer, and never leaves half a model.

Memory: one layer and one output shard. Everything is written into a hidden folder beside the
target, which is renamed at the end; a killed conversion leaves the target as it was.
"""

import json
import math
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from . import __version__
from .cache import kv_bytes_per_token, state_bytes
from .config import ARCHITECTURE, HydraArgs
from .errors import CheckpointError, UsageError
from .files import sync_folder
from .forms import fuse_layer, migrate_layer, unfuse_layer
from .layouts import LAYER, model_shapes
from .loading import DTYPES, memory_bytes
from .manifest import MANIFEST, manifest
from .protected import FLOAT32_NAMES
from .quantise import QuantPlan, quantise_matrix
from .registry import SHIM, SHIM_NAME
from .shards import ShardWriter
from .sources import TOKEN_KEYS, Source, blank
from .target import check_target, locked, put_in_place, real_path, recover
from .tensors import Packed, to_float

GIB = 1 << 30
GATES = {"ab_proj", "a_proj", "b_proj"}  # float16 has too few digits near gate 1


@dataclass(frozen=True)
class Job:
    """One conversion.

    Attributes:
        source: An opened checkpoint. form: "fused" or "spec", the form to write.
        quant: How to quantise, or None. dtype: Of unquantised tensors, or None to keep the
            source's. keep_packed: Pass the source's own quantisation through (used when neither
            quant nor dtype is given). seed: Of tensors that a migration adds; None makes them zero.
        shard_bytes: Most bytes of an output shard. for_hf: Write the spec layout for others:
            PyTorch metadata and no MLX extras. gamma: [L, H] head scales that a migration starts
            with, None for ones. conv: How its convolutions start, see migrate_layer.
    """

    source: Source
    form: str
    quant: QuantPlan | None
    dtype: str | None
    seed: int | None
    shard_bytes: int
    for_hf: bool = False
    gamma: Sequence | None = None
    conv: str = "identity"

    @property
    def keep_packed(self) -> bool:
        """Whether packed source matrices may pass through."""
        return self.quant is None and self.dtype is None and not self.for_hf

    @property
    def args(self) -> HydraArgs:
        """The config that is written."""
        return replace(self.source.args, weights_form=self.form)


def spec_layer(job: Job, i: int) -> dict:
    """Layer i of the source in the form that is written, before casting and quantising."""
    source, args = job.source, job.source.args
    prefix = LAYER.format(i=i)
    keep = job.keep_packed or (job.quant is not None and source.form == job.form)
    w = {n[len(prefix) :]: source.get(n, keep) for n in source.names(prefix)}
    if not keep:
        w = {n: to_float(x, _float_type(w)) if isinstance(x, Packed) else x for n, x in w.items()}
    if source.form == "base":
        gamma = None if job.gamma is None else job.gamma[i]
        w = migrate_layer(args, i, w, job.seed, gamma, job.conv)
    if source.form == job.form:
        return w
    if job.form == "fused":
        return fuse_layer(args, i, w)
    if source.form == "fused":
        return unfuse_layer(args, i, w)
    return w  # base -> spec: migrated above


def _float_type(layer: dict) -> mx.Dtype:
    return layer["input_layernorm.weight"].dtype


def finish(job: Job, name: str, x: Any) -> tuple:
    """Cast and quantise one tensor.

    Returns:
        {name: array} to write, and the quantisation parameters or None.
    """
    stem = name.removesuffix(".weight")
    params = None
    if isinstance(x, Packed) and not (job.keep_packed or job.quant):
        x = to_float(x)
    if job.quant is not None and len(x.shape) == 2 and stem != name:
        params = job.quant.params(stem, x.shape[1])
    if params is not None:
        if job.dtype is not None and not isinstance(x, Packed):
            x = x.astype(DTYPES[job.dtype])
        x = quantise_matrix(x, params)
    if isinstance(x, Packed):
        arrays = {f"{stem}.{part}": a for part, a in x.arrays().items()}
        return arrays, {"group_size": x.group_size, "bits": x.bits, "mode": x.mode}
    keep = name.rsplit(".", 1)[-1] in FLOAT32_NAMES
    if keep:
        x = x.astype(mx.float32)
    elif job.dtype is not None:
        small = job.dtype == "float16" and not GATES.isdisjoint(name.split("."))
        x = x.astype(mx.float32 if small else DTYPES[job.dtype])
    return {name: x}, None


def _units(job: Job):
    """The model in order, one piece at a time: (label, {name: weight})."""
    source = job.source
    top = [n for n in source.names("") if not n.startswith("model.layers.")]
    yield "embedding", {n: source.get(n) for n in top if "embed_tokens" in n}
    for i in range(source.args.num_hidden_layers):
        prefix = LAYER.format(i=i)
        yield f"layer {i}", {prefix + n: x for n, x in spec_layer(job, i).items()}
    yield "output", {n: source.get(n) for n in top if "embed_tokens" not in n}


def _finite(x: Any) -> bool:
    if isinstance(x, Packed):
        if x.mode != "affine":  # its scales are bytes, one of which stands for NaN
            return _finite(to_float(x))
        return _finite(x.scales) and _finite(x.biases)
    return not mx.issubdtype(x.dtype, mx.floating) or mx.isfinite(x).all().item()


def _checked(job: Job, name: str, x: Any) -> tuple:
    """finish, but refuse weights that are not numbers: a damaged source must not become a model.

    Asked before rounding too, because quantising would hide a NaN.
    """
    if not _finite(x):
        raise CheckpointError(
            f"{name} holds NaN or infinity.", "The source is damaged; fetch it again."
        )
    arrays, params = finish(job, name, x)
    if job.dtype == "float16" and not all(_finite(a) for a in arrays.values()):
        raise CheckpointError(f"{name} is too large for float16.", "Use --dtype bfloat16.")
    return arrays, params


def write_model(job: Job, folder: Path, progress: Callable[[str, int, int], None]) -> dict:
    """Write weights and config.json into a folder.

    Args:
        progress: Called with (label, done, total) after each piece.

    Returns:
        {module path: quantisation parameters} of what was quantised.
    """
    writer = ShardWriter(folder, job.shard_bytes, "pt" if job.for_hf else "mlx")
    total = job.source.args.num_hidden_layers + 2
    quantised: dict = {}
    for done, (label, tensors) in enumerate(_units(job)):
        for name in list(tensors):
            arrays, params = _checked(job, name, tensors.pop(name))
            if params:
                quantised[name.removesuffix(".weight")] = params
            writer.add(arrays)
        progress(label, done + 1, total)
    writer.close()
    config = output_config(job, quantised)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    return quantised


def output_config(job: Job, quantised: dict) -> dict:
    """config.json of the written model."""
    config = {"architectures": [ARCHITECTURE], **asdict(job.args)}
    for key in ("rope_parameters", "rope_scaling"):  # transformers warns about a null
        if config[key] is None:
            del config[key]
    config.update({k: job.source.config[k] for k in TOKEN_KEYS if k in job.source.config})
    if job.for_hf:
        del config["weights_form"]
        config["torch_dtype"] = job.dtype or _source_dtype(job.source)
        return config
    config["model_file"] = SHIM_NAME
    config["hydra_mlx_version"] = __version__
    if quantised:
        # The commonest format is the default; the rest are named one by one.
        kinds = [tuple(sorted(p.items())) for p in quantised.values()]
        common = dict(max(set(kinds), key=kinds.count))
        own = {path: p for path, p in quantised.items() if p != common}
        config["quantization"] = {**common, **own}
        config["quantization_config"] = config["quantization"]
    return config


def _source_dtype(source: Source) -> str:
    names = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
    kinds = [i.dtype for n, i in source.infos.items() if n.endswith("proj.weight")]
    return names.get(max(set(kinds), key=kinds.count) if kinds else "F32", "float32")


@dataclass(frozen=True)
class Plan:
    """What a conversion needs and gives; sizes in bytes.

    Attributes:
        parameters: Of the written model. weights: Bytes of its weights. bits_per_weight.
        memory: Most memory the conversion needs. memory_here, disk_free: What there is.
        kv_per_token: Key/value bytes a token adds at bf16. state: Recurrent state of a sequence.
    """

    parameters: int
    weights: int
    bits_per_weight: float
    memory: int
    memory_here: int
    disk_free: int
    kv_per_token: int
    state: int


def plan(job: Job, target: Path) -> Plan:
    """Work the figures of a job out from headers alone; reads no weight, writes nothing."""
    weights = piece = 0
    for _, tensors in _units(replace(job, source=blank(job.source), seed=None)):
        # The piece as read, once more in float32 while it is folded or quantised.
        read = sum(x.nbytes + 4 * math.prod(x.shape) for x in tensors.values())
        piece = max(piece, read)
        for name, x in tensors.items():
            weights += sum(a.nbytes for a in finish(job, name, x)[0].values())
    parameters = sum(math.prod(shape) for shape in model_shapes(job.args).values())
    memory = piece + min(job.shard_bytes, weights) + GIB // 4
    parent = next(p for p in [target.absolute(), *target.absolute().parents] if p.exists())
    return Plan(
        parameters,
        weights,
        8 * weights / parameters,
        memory,
        memory_bytes(),
        shutil.disk_usage(parent).free,
        int(kv_bytes_per_token(job.args)),
        state_bytes(job.args),
    )


def require_room(needs: Plan):
    """Refuse a conversion that cannot finish.

    Raises:
        UsageError: Too little disk or memory, with the numbers.
    """
    for what, need, have in (
        ("of disk", needs.weights + GIB // 16, needs.disk_free),
        ("of memory", needs.memory, needs.memory_here),
    ):
        if need > have:
            raise UsageError(
                f"The conversion needs {need / GIB:.2f} GiB {what}, there are {have / GIB:.2f}.",
                "Choose a smaller --max-shard-size, fewer bits, or another disk.",
            )


def run(
    job: Job,
    target: Path,
    overwrite: bool,
    progress: Callable[[str, int, int], None],
    check: Callable[[Path], None] | None = None,
) -> Path:
    """Convert, then put the finished folder in place in one rename.

    Args:
        check: Called with the finished folder before it gets its name; raising leaves the
            target as it was.

    Raises:
        UsageError: The target exists and overwrite is false, or there is no room.
        CheckpointError: The source is damaged.
    """
    target = real_path(target)
    with locked(target):
        return _run(job, target, overwrite, progress, check)


def _run(job: Job, target: Path, overwrite: bool, progress, check) -> Path:
    recover(target)
    check_target(job.source.path, target, overwrite)
    require_room(plan(job, target))
    try:
        partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
    except OSError as e:
        raise UsageError(f"Cannot write beside {target}: {e.strerror or e}.") from None
    try:
        job.source.write_tokenizer(partial)  # first: it is quick, and may be broken
        write_model(job, partial, progress)
        if not job.for_hf:
            (partial / SHIM_NAME).write_text(SHIM, "utf-8")
            data = manifest(partial, str(job.source.path), job.source.report)
            (partial / MANIFEST).write_text(json.dumps(data, indent=1) + "\n", "utf-8")
        if check is not None:
            check(partial)
        sync_folder(partial)
        partial.chmod(0o755)
        put_in_place(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target
