"""What config.json and the headers of the weights say about a model; no weight is read.

For `hydra-mlx info` and `doctor`. Importing this loads neither mlx_lm nor transformers.
"""

import importlib.metadata
import importlib.util
import math
import os
import warnings
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

from . import default_model
from .config import MODEL_TYPE, HydraArgs, layer_heads
from .errors import CheckpointError, ConfigError, UsageError
from .folder import check_sizes, read_config
from .layouts import base_shapes, model_shapes
from .quantise import packed_format
from .shards import read_headers
from .sizes import kv_bytes_per_token, state_bytes
from .sources import BASE_TYPES, key_report, migrated_args, open_source

# Types of mlx-lm whose every layer caches keys and values of all tokens; what BASE_TYPES are, too.
PLAIN_TYPES = (*BASE_TYPES, "qwen2", "qwen3_moe", "olmo2", "smollm3")
# Llama-like configs with these are not what migrated_args can describe.
ODD_KEYS = ("mlp_bias", "rope_traditional")
ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "F64": 4}
GB = 1 << 30  # machines are sold in these
WORK_BYTES = 1 << 30  # set aside for the work of a step


@dataclass(frozen=True)
class Facts:
    """A model as its files describe it.

    Attributes:
        path: Folder or .gguf file. model_type: As in config.json. form: "spec", "fused" or "plain".
        args: None where only mlx-lm knows the model; for a plain Llama or Qwen3 the same model with
            every head FA. parameters: Numbers, packed ones counted singly. nbytes: Of all tensors
            read. dtypes: {safetensors type: bytes}. dtype: Type of the activations ("BF16").
        bits: {"4-bit, groups of 64": matrices} of packed ones. positions: max_position_embeddings.
        kv_heads: Key/value heads that a layer caches, for every layer; None where not known.
        head_dim: D, None where not known. notes: Lines for people.
    """

    path: Path
    model_type: str
    form: str
    args: HydraArgs | None
    parameters: int
    nbytes: int
    dtypes: dict
    dtype: str
    bits: dict
    positions: int | None
    kv_heads: tuple | None
    head_dim: int | None
    notes: tuple = ()

    @property
    def bits_per_weight(self) -> float:
        """Of all tensors, scales and biases of packed ones included."""
        return 8 * self.nbytes / max(self.parameters, 1)

    def kv_bytes(self, bits: int | None = None) -> float | None:
        """Bytes a token adds to the cache; None where not known or not to be had in these bits."""
        if self.kv_heads is None:
            return None
        item = ITEM_BYTES[self.dtype]
        if bits is not None:
            group = next((g for g in (64, 32) if self.head_dim % g == 0), None)
            if group is None or not any(self.kv_heads):
                return None
            item = bits / 8 + 2 * item / group
        if self.args is not None:
            return kv_bytes_per_token(self.args, item)
        return 2 * sum(self.kv_heads) * self.head_dim * item

    @property
    def state_bytes(self) -> int | None:
        """Bytes of recurrent states and conv tails of a sequence; None where not known."""
        if self.kv_heads is None:
            return None
        return 0 if self.args is None else state_bytes(self.args, ITEM_BYTES[self.dtype])

    def fits(self, gigabytes: int, bits: int | None = None) -> int | None:
        """Tokens of one sequence that fit in a machine's memory; None where not known.

        Counts weights, states, keys and values, and 1 GiB for the work of a step, in the share of
        memory that macOS lets a GPU use (reported: 2/3 up to 32 GB, 3/4 above).
        """
        a_token = self.kv_bytes(bits)
        if a_token is None:
            return None
        room = gigabytes * GB * (2 / 3 if gigabytes <= 32 else 3 / 4)
        room -= self.nbytes + self.state_bytes + WORK_BYTES
        return max(int(room / a_token), 0)


def find(text: str | None) -> Path:
    """A local path as it is; a hub id from the hub's cache, which is never filled here.

    Args:
        text: None is the default model.

    Raises:
        UsageError: Neither.
    """
    if text is None:
        return default_model.folder()
    try:
        local = Path(text).expanduser()
        if local.exists():
            return local
    except (OSError, ValueError, RuntimeError) as e:
        raise UsageError(f"{text!r} cannot be opened ({type(e).__name__}).") from None
    if text.count("/") != 1 or text.startswith((".", "/", "~")):
        raise UsageError(f"{text} does not exist.", "Give a model folder or a hub id (owner/name).")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(text, local_files_only=True))
    except Exception:  # the hub's errors share no base
        raise UsageError(
            f"{text} is neither a folder nor in the hub's cache on this machine.",
            f"Download it first: hf download {text}",
        ) from None


def read(path: Path) -> Facts:
    """The facts of a model folder or GGUF file.

    Raises:
        ConfigError, CheckpointError, UsageError: Broken in one of many ways, or of no known type.
    """
    if path.is_file():
        return _read_gguf(path)
    config = read_config(path)
    kind = config.get("model_type")
    if not isinstance(kind, str) or not kind:
        raise ConfigError(f"{path / 'config.json'} has the model_type {kind!r}, expected a name.")
    infos = read_headers(path)
    if kind == MODEL_TYPE:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            args = HydraArgs.from_dict(config)
        check_sizes(args, infos)
        facts = _checked(path, config, infos, args, args.weights_form, model_shapes(args))
        return replace(facts, notes=tuple(str(w.message) for w in said))
    odd = _windowed(config) or any(config.get(k) for k in ODD_KEYS)
    if kind in BASE_TYPES and not odd:
        config.setdefault("tie_word_embeddings", "lm_head.weight" not in infos)
        args = migrated_args(config, "identity")
        check_sizes(args, infos)
        shapes = base_shapes(args, kind == "qwen3")
        return _checked(path, config, infos, args, "plain", shapes)
    return _other(path, config, infos)


def _checked(
    path: Path, config: dict, infos: dict, args: HydraArgs, form: str, shapes: dict
) -> Facts:
    """Facts of a model whose every tensor is known by name and shape."""
    report = key_report(infos, shapes, args, form, config)
    report.require_whole(str(path))
    dropped = set(report.dropped)
    infos = {n: i for n, i in infos.items() if n not in dropped}
    layers = range(args.num_hidden_layers)
    parameters = sum(math.prod(shapes[n]) for n, _ in report.mapped)
    kv_heads = tuple(len(layer_heads(args, i).kv) for i in layers)
    norm = infos["model.norm.weight"].dtype
    return _facts(path, config, infos, args, form, parameters, norm, kv_heads, args.head_dim)


def _other(path: Path, config: dict, infos: dict) -> Facts:
    """Facts of a model that only mlx-lm knows."""
    kind = config["model_type"]
    require_known(kind)
    ours = [n for n in infos if ".self_attn.fa." in n or ".self_attn.la." in n]
    if ours:
        raise ConfigError(
            f"model_type is {kind!r}, but {ours[0]} is a tensor of a {MODEL_TYPE!r} model.",
            "Put the config.json beside the weights that belongs to them.",
        )
    parameters = 0
    for name, info in infos.items():
        stem, _, part = name.rpartition(".")
        if part in ("scales", "biases") and f"{stem}.weight" in infos:
            continue
        n = math.prod(info.shape)
        if part == "weight" and f"{stem}.scales" in infos and info.dtype in ("U32", "U8"):
            n = n * 8 * (4 if info.dtype == "U32" else 1) // packed_format(config, stem)["bits"]
        parameters += n
    floats = Counter(i.dtype for i in infos.values() if i.dtype in ITEM_BYTES)
    norm = floats.most_common(1)[0][0] if floats else "BF16"
    kv_heads, D = None, None
    if kind in PLAIN_TYPES and not _windowed(config):
        H, E = _count(config, "num_attention_heads"), _count(config, "hidden_size")
        D = config.get("head_dim") or E // H
        heads = config.get("num_key_value_heads") or H
        if type(D) is not int or D < 1 or type(heads) is not int or heads < 1:
            raise ConfigError(f"{path / 'config.json'}: head_dim or num_key_value_heads is wrong.")
        kv_heads = (heads,) * _count(config, "num_hidden_layers")
    return _facts(path, config, infos, None, "plain", parameters, norm, kv_heads, D)


def _facts(
    path: Path,
    config: dict,
    infos: dict,
    args: HydraArgs | None,
    form: str,
    parameters: int,
    norm: str,
    kv_heads: tuple | None,
    D: int | None,
) -> Facts:
    dtypes, bits = Counter(), Counter()
    for name, info in infos.items():
        dtypes[info.dtype] += info.nbytes
        if name.endswith(".scales"):
            q = packed_format(config, name.removesuffix(".scales"))
            mode = "" if q["mode"] == "affine" else f" ({q['mode']})"
            bits[f"{q['bits']}-bit{mode}, groups of {q['group_size']}"] += 1
    if norm not in ITEM_BYTES:
        raise CheckpointError(f"{path}: the last norm has dtype {norm}, expected a float type.")
    positions = config.get("max_position_embeddings")
    return Facts(
        path,
        config["model_type"],
        form,
        args,
        parameters,
        sum(i.nbytes for i in infos.values()),
        dict(dtypes.most_common()),
        norm,
        dict(bits.most_common()),
        positions if type(positions) is int else None,
        kv_heads,
        D,
    )


def _read_gguf(path: Path) -> Facts:
    if path.suffix.lower() != ".gguf":
        raise UsageError(
            f"{path} is a file, expected a model folder or a .gguf file.",
            "Give the folder that holds config.json and the weights.",
        )
    source = open_source(path, "identity")
    shapes = base_shapes(source.args, source.config["model_type"] == "qwen3")
    parameters = sum(math.prod(s) for n, s in shapes.items() if n in source.infos)
    args = source.args
    kv_heads = (args.num_key_value_heads,) * args.num_hidden_layers
    facts = _facts(
        path, source.config, source.infos, args, "plain", parameters, "F32", kv_heads, args.head_dim
    )
    note = "A GGUF file: hydra-mlx convert turns it into a folder that can be run."
    return replace(
        facts, nbytes=os.path.getsize(path), dtypes={"GGUF": facts.nbytes}, notes=(note,)
    )


def _windowed(config: dict) -> bool:
    """Whether some layers forget tokens; then they cache less than the others."""
    return bool(config.get("sliding_window") and config.get("use_sliding_window", True))


def _count(config: dict, name: str) -> int:
    value = config.get(name)
    if type(value) is not int or not 0 < value < 2**28:
        raise ConfigError(f"config.json: {name} is {value!r}, expected a positive whole number.")
    return value


def require_known(kind: str):
    """Refuse a model type that neither hydra_mlx nor the installed mlx-lm has.

    Raises:
        ConfigError: Nobody knows it.
    """
    spec = importlib.util.find_spec("mlx_lm")  # looks it up, does not import it
    places = spec.submodule_search_locations if spec else []
    if kind.isidentifier() and any(
        (Path(place) / "models" / f"{kind}.py").is_file() for place in places
    ):
        return
    from mlx_lm.utils import MODEL_REMAPPING

    if kind not in MODEL_REMAPPING:
        version = importlib.metadata.version("mlx-lm")
        raise ConfigError(
            f"model_type is {kind!r}, which is neither {MODEL_TYPE!r} nor one of mlx-lm {version}.",
            "Check the spelling in config.json, or install a newer mlx-lm.",
        )
