"""Loads a model folder: config checked, headers checked, then weights, then the dtype policy."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from . import default_model
from .config import MODEL_TYPE, HydraArgs
from .errors import CheckpointError, ConfigError, UsageError
from .folder import check_sizes, memory_bytes, read_config
from .manifest import check_files
from .model import Model
from .quantise import packed_format
from .registry import register
from .shards import FLOATS, load_arrays, read_headers
from .tensors import dequantise_array
from .text import first_line

DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}
# On a CPU, dequantised float32 weights may take up to this share of the machine's memory.
DEQUANTISE_SHARE = 0.4


@dataclass
class LoadReport:
    """What loading did, for --stats.

    Attributes:
        path: The folder. weights: One phrase on how the weights are kept and why.
        nbytes: Bytes of all parameters as they are in memory.
    """

    path: Path
    weights: str
    nbytes: int


def on_cpu() -> bool:
    """Whether MLX computes on the CPU here (no Metal, no CUDA)."""
    return mx.default_device() == mx.Device(mx.cpu)


def load_model(
    path: str | os.PathLike | None = None,
    dtype: str = "auto",
    lazy: bool = False,
    check: bool = False,
) -> nn.Module:
    """Load a model; no tokenizer is needed.

    Args:
        path: Folder with config.json and safetensors (spec layout or converted), or a hub id;
            None is the small model in this package.
        dtype: "auto", or "float32", "bfloat16", "float16" for unquantised weights. "auto" keeps
            what the files hold, except on a CPU, where float32 is several times faster: there
            weights become float32, quantised ones too when they fit.
        lazy: Leave the weights on disk until first use.
        check: Compare a converted folder's files with the checksums in its manifest first, which
            reads every byte; without a manifest that is an error.

    Returns:
        The model; `model(tokens[B, T], cache=None) -> logits[B, T, V]`. Its `load_report`
        says what was done.

    Raises:
        ConfigError, CheckpointError, UsageError: See the messages.
    """
    if dtype != "auto" and dtype not in DTYPES:
        raise UsageError(f"dtype is {dtype!r}, expected auto, {', '.join(DTYPES)}.")
    folder = resolve_path(path)
    config = read_config(folder)
    if check:
        check_files(folder)
    register()
    if config.get("model_type") == MODEL_TYPE:
        model = _load_hydra(folder, config)
    else:
        model = _load_other(folder, config)
    weights = _apply_dtype(model, dtype)
    if not lazy:
        mx.eval(model.parameters())
    model.eval()
    nbytes = sum(x.nbytes for _, x in tree_flatten(model.parameters()))
    object.__setattr__(model, "load_report", LoadReport(folder, weights, nbytes))
    return model


def load(
    path: str | os.PathLike | None = None, dtype: str = "auto", lazy: bool = False
) -> tuple[nn.Module, Any]:
    """Load a model and its tokenizer; arguments as in load_model.

    Returns:
        (model, tokenizer), the tokenizer wrapped as mlx-lm does it.

    Raises:
        ConfigError, CheckpointError, UsageError: See the messages.
    """
    folder = resolve_path(path)
    model = load_model(folder, dtype, lazy)
    return model, load_tokenizer(folder)


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model folder, wrapped as mlx-lm does it.

    Raises:
        CheckpointError: Absent or broken.
    """
    from mlx_lm.utils import load_tokenizer as stock

    register()
    if not any((folder / n).is_file() for n in ("tokenizer.json", "tokenizer.model")):
        raise CheckpointError(
            f"{folder} has no tokenizer.json.",
            "Use hydra_mlx.load_model for a model without a tokenizer.",
        )
    eos = read_config(folder).get("eos_token_id")
    try:
        return stock(folder, eos_token_ids=eos)
    except Exception as e:  # transformers raises many kinds on a broken tokenizer.json
        raise CheckpointError(f"{folder}: the tokenizer cannot be loaded ({first_line(e)}).") from e


def resolve_path(path: str | os.PathLike | None) -> Path:
    """A local folder as it is; anything that looks like a hub id is fetched.

    Args:
        path: None is the default model.

    Raises:
        UsageError: Neither a folder nor a hub id that can be had.
    """
    if path is None:
        return default_model.folder()
    text = os.fspath(path)
    try:
        local = Path(text).expanduser()
        if local.exists():
            return local
    except (OSError, ValueError, RuntimeError) as e:  # no permission, a NUL, no such user
        raise UsageError(f"{text!r} cannot be opened ({first_line(e)}).") from None
    if text.count("/") == 1 and not text.startswith((".", "/", "~")):
        from .fetch import fetch_hub

        return fetch_hub(text, None)
    raise UsageError(f"{text} does not exist.", "Give a model folder or a hub id (owner/name).")


def _load_hydra(folder: Path, config: dict) -> Model:
    args = HydraArgs.from_dict(config)
    headers = read_headers(folder)
    check_sizes(args, headers)
    model = Model(args)
    names = {n: i for n, i in headers.items() if n in model.sanitize(dict.fromkeys(headers))}
    _quantise_modules(model, config, names)
    expected = dict(tree_flatten(model.parameters()))
    check_names(folder, expected, names)
    weights = {}
    for file in sorted({i.file for i in names.values()}):
        weights.update({n: x for n, x in load_arrays(file).items() if n in names})
    model.load_weights(list(weights.items()), strict=True)
    return model


def _quantise_modules(model: Model, config: dict, names: dict):
    if not any(n.endswith(".scales") for n in names):
        return

    def predicate(path, module):
        if not hasattr(module, "to_quantized") or f"{path}.scales" not in names:
            return False
        return packed_format(config, path)

    try:
        nn.quantize(model, class_predicate=predicate)
    except (ValueError, TypeError, KeyError, RuntimeError) as e:
        raise ConfigError(f"config.json: quantization cannot be used ({first_line(e)}).") from None


def check_names(where: Path, expected: dict, found: dict):
    """Compare parameters {name: array} with headers {name: TensorInfo}.

    Raises:
        CheckpointError: A tensor is missing, unexpected, of the wrong shape or no number type.
    """
    for problem, names in (
        ("missing", sorted(set(expected) - set(found))),
        ("unexpected", sorted(set(found) - set(expected))),
    ):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise CheckpointError(f"{where}: tensor {names[0]}{more} {problem} in the weights.")
    for name, info in found.items():
        want = tuple(expected[name].shape)
        if info.shape != want:
            raise CheckpointError(
                f"{where}: {name} has shape {list(info.shape)}, the config asks for {list(want)}."
            )
        packed = {mx.uint32: ("U32",), mx.uint8: ("U8",)}
        if info.dtype not in packed.get(expected[name].dtype, FLOATS):
            raise CheckpointError(f"{where}: {name} has dtype {info.dtype}, which does not fit.")


def _load_other(folder: Path, config: dict) -> nn.Module:
    from mlx_lm.utils import load_model as stock

    read_headers(folder)
    try:
        return stock(folder, lazy=True)[0]
    except Exception as e:  # any model of mlx-lm may raise anything
        kind = config.get("model_type")
        raise CheckpointError(
            f"{folder}: mlx-lm cannot load this {kind!r} model ({first_line(e)})."
        ) from e


def _apply_dtype(model: nn.Module, dtype: str) -> str:
    """Cast or dequantise by the policy of load_model; returns the phrase for the report."""
    flat = dict(tree_flatten(model.parameters()))
    quantised = any(n.endswith(".scales") for n in flat)
    kept = {str(x.dtype).rsplit(".", 1)[-1] for x in flat.values() if _is_float(x.dtype)}
    held = "quantised" if quantised else "/".join(sorted(kept))
    if dtype == "auto":
        if not on_cpu():
            return f"{held}, as stored"
        if quantised:
            need = 4 * sum(_logical_size(m) for _, m in model.named_modules())
            room = DEQUANTISE_SHARE * memory_bytes()
            if need > room:
                return f"quantised, as stored (float32 would need {need / 2**30:.1f} GiB)"
            _dequantise(model)
        _cast(model, mx.float32)
        return f"float32 ({held} in the files; float32 is the fast one on a CPU)"
    _cast(model, DTYPES[dtype])
    return f"{dtype}, as asked" if not quantised else f"quantised, the rest {dtype}, as asked"


def _is_float(dtype: mx.Dtype) -> bool:
    return mx.issubdtype(dtype, mx.floating)


def _logical_size(module: nn.Module) -> int:
    if not isinstance(module, (nn.QuantizedLinear, nn.QuantizedEmbedding)):
        return 0
    return module.weight.shape[0] * module.weight.shape[1] * 32 // module.bits


def _cast(model: nn.Module, dtype: mx.Dtype):
    keep = getattr(model, "cast_predicate", lambda _: True)
    scales = _microscale_names(model)
    cast = [
        (n, x.astype(dtype))
        for n, x in tree_flatten(model.parameters())
        if _is_float(x.dtype) and keep(n) and n not in scales
    ]
    model.load_weights(cast, strict=False)


def _microscale_names(model: nn.Module) -> set:
    # The scales of mxfp4, nvfp4 and mxfp8 are bytes with a meaning of their own.
    return {
        f"{n}.scales" for n, m in model.named_modules() if getattr(m, "mode", "affine") != "affine"
    }


def _dequantise(model: nn.Module):
    """Replace every quantised Linear and Embedding by its float32 twin, in place."""
    changed = []
    for name, module in model.named_modules():
        if isinstance(module, nn.QuantizedLinear):
            twin = nn.Linear(1, 1, bias="bias" in module)
            if "bias" in module:
                twin.bias = module.bias
        elif isinstance(module, nn.QuantizedEmbedding):
            twin = nn.Embedding(1, 1)
        else:
            continue
        twin.weight = dequantise_array(
            module.weight,
            module.scales,
            module.get("biases"),
            module.group_size,
            module.bits,
            module.mode,
        )
        changed.append((name, twin))
    model.update_modules(tree_unflatten(changed))
