"""Where a conversion reads from: safetensors folders and GGUF files, one tensor at a time."""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import mlx.core as mx

from .config import MODEL_TYPE, HydraArgs, check_head_map
from .errors import CheckpointError, ConfigError, UsageError
from .files import read_json
from .folder import read_config
from .gguf import AffineTensor, GGUFFile
from .gguf_blocks import AFFINE_BITS
from .gguf_llama import config_from_gguf, llama_names, read_llama_tensor
from .layouts import KeyReport, base_shapes, check_keys, model_shapes
from .quantise import packed_format
from .shards import FLOATS, TensorInfo, load_arrays, read_headers
from .tensors import Packed

MLX_TYPES = {
    "F32": mx.float32,
    "BF16": mx.bfloat16,
    "F16": mx.float16,
    "F64": mx.float32,
    "U32": mx.uint32,
    "U8": mx.uint8,
}
BASE_TYPES = ("llama", "mistral", "qwen3")
MAX_COUNT = 4096  # layers, and heads of one: the identity map of a damaged file must not be huge
# With these the migrated model is the base model, logit for logit (spec section 6).
IDENTITY = {
    "fa_rope": True,
    "fa_logit_scale": None,
    "fa_gate": None,
    "fusion_norm": None,
    "fusion_scale": False,
}
COPIED = (
    "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
    "head_dim rms_norm_eps vocab_size rope_theta rope_scaling rope_parameters "
    "tie_word_embeddings max_position_embeddings hidden_act attention_bias"
).split()
TOKEN_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")
TOKENIZER_FILES = (
    "tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json vocab.json "
    "merges.txt tokenizer.model chat_template.jinja chat_template.json generation_config.json"
).split()


@dataclass
class Source:
    """An opened checkpoint.

    Attributes:
        path: Folder or file. args: Config of what it will be read as. form: "spec", "fused" or
            "base" (a plain Transformer that migrate_layer turns into spec form).
        config: The original config.json. report: What its keys are.
        infos: {name: TensorInfo} of all tensors; empty sizes for a GGUF.
    """

    path: Path
    args: HydraArgs
    form: str
    config: dict
    report: KeyReport
    infos: dict

    def get(self, name: str, keep_packed: bool = True) -> Any:
        """One tensor, an mx.array or Packed; lazy, and not held by the source afterwards.

        Raises:
            CheckpointError: Unreadable.
        """
        raise NotImplementedError

    def blank(self, name: str, keep_packed: bool = True) -> Any:
        """Zeros of the shape and type that `get` gives, never computed unless used."""
        raise NotImplementedError

    def names(self, prefix: str) -> list:
        """Mapped names below a prefix, packed matrices once, by their weight."""
        return [n for n, _ in self.report.mapped if n.startswith(prefix)]

    def write_tokenizer(self, folder: Path) -> bool:
        """Put the tokenizer's files into a folder; False when the source has none."""
        raise NotImplementedError


@dataclass
class _Blank(Source):
    real: Source

    def get(self, name: str, keep_packed: bool = True) -> Any:
        """See Source.blank."""
        return self.real.blank(name, keep_packed)


def blank(source: Source) -> Source:
    """A source of zeros in the shapes and types of another: for sizes without reading."""
    s = source
    return _Blank(s.path, s.args, s.form, s.config, s.report, s.infos, s)


def _load(info: TensorInfo) -> mx.array:
    # Opened anew each time: MLX keeps an evaluated array alive as long as its dict lives.
    x = load_arrays(info.file)[info.name]
    return x.astype(mx.float32) if info.dtype == "F64" else x


def _zeros(info: TensorInfo) -> mx.array:
    return mx.zeros(info.shape, MLX_TYPES[info.dtype])


class SafetensorsSource(Source):
    """A folder with config.json and one or many safetensors shards."""

    def get(self, name: str, keep_packed: bool = True) -> Any:
        """See Source.get."""
        weight = _load(self.infos[name])
        scales = name.removesuffix("weight") + "scales"
        if name.endswith(".weight") and scales in self.infos:
            return self._packed(name, weight)
        return weight

    def blank(self, name: str, keep_packed: bool = True) -> Any:
        """See Source.blank."""
        weight = _zeros(self.infos[name])
        scales = name.removesuffix("weight") + "scales"
        if name.endswith(".weight") and scales in self.infos:
            return self._packed(name, weight, _zeros)
        return weight

    def _packed(self, name: str, weight: mx.array, read: Callable = _load) -> Packed:
        stem = name.removesuffix("weight")
        parts = {}
        for part in ("scales", "biases"):
            info = self.infos.get(stem + part)
            parts[part] = None if info is None else read(info)
        q = packed_format(self.config, stem.rstrip("."))
        return Packed(weight, parts["scales"], parts["biases"], **q)

    def write_tokenizer(self, folder: Path) -> bool:
        """See Source.write_tokenizer."""
        found = False
        for name in TOKENIZER_FILES:
            if (self.path / name).is_file():
                (folder / name).write_bytes((self.path / name).read_bytes())
                found = found or name in ("tokenizer.json", "tokenizer.model")
        return found


class GGUFSource(Source):
    """A Llama-family GGUF file; q and k rows are put back in half-split rotary order."""

    gguf: GGUFFile
    gguf_names: dict

    def get(self, name: str, keep_packed: bool = True) -> Any:
        """See Source.get; types that MLX can hold exactly stay packed unless told otherwise."""
        x = read_llama_tensor(self.gguf, self.config, self.gguf_names[name], keep_packed)
        if isinstance(x, AffineTensor):
            return Packed(
                mx.array(x.weight), mx.array(x.scales), mx.array(x.biases), x.bits, x.group_size
            )
        return mx.array(x)

    def blank(self, name: str, keep_packed: bool = True) -> Any:
        """See Source.blank."""
        t = self.gguf.tensors[self.gguf_names[name]]
        if not keep_packed or t.type not in AFFINE_BITS or len(t.shape) != 2:
            return mx.zeros(t.shape)
        bits, group = AFFINE_BITS[t.type], 32
        (rows, width), groups = t.shape, mx.zeros((t.shape[0], t.shape[1] // group))
        weight = mx.zeros((rows, width * bits // 32), mx.uint32)
        return Packed(weight, groups, groups, bits, group)

    def write_tokenizer(self, folder: Path) -> bool:
        """See Source.write_tokenizer."""
        from .gguf_tokenizer import write_tokenizer

        write_tokenizer(self.gguf.metadata, folder)
        return True


def read_head_map(text: str | dict, layers: int, num_heads: int) -> dict:
    """A head map: a JSON file with full_attention_heads and, if wanted, other keys of section 2.

    Args:
        text: Path of the file, its content as a dict, or "identity" for every head full
            attention and the base model's own mathematics.

    Returns:
        HydraHead config keys.

    Raises:
        UsageError: No such file. ConfigError: Its content is wrong.
    """
    if text == "identity":
        heads = [list(range(num_heads)) for _ in range(layers)]
        return {"full_attention_heads": heads, **IDENTITY}
    if isinstance(text, dict):
        return _checked_head_map("The head map", text, layers, num_heads)
    path = Path(text).expanduser()
    like = 'It is a JSON file: {"full_attention_heads": [[0, 3], [], ...]}, or `identity`.'
    data = read_json(path, "The head map", like)
    return _checked_head_map(f"The head map {path}", data, layers, num_heads)


def _checked_head_map(where: str, data: Any, layers: int, num_heads: int) -> dict:
    if isinstance(data, list):
        data = {"full_attention_heads": data}
    if not isinstance(data, dict) or "full_attention_heads" not in data:
        raise ConfigError(f'{where} has no "full_attention_heads".')
    check_head_map(data["full_attention_heads"], layers, num_heads)
    allowed = {f.name for f in fields(HydraArgs)} - set(COPIED) - {"weights_form", "model_type"}
    extra = sorted(set(data) - allowed)
    if extra:
        raise ConfigError(
            f"{where} has the unknown key {extra[0]!r}.",
            f"Known: {', '.join(sorted(allowed))}.",
        )
    return data


def migrated_args(config: dict, head_map: str | dict) -> HydraArgs:
    """HydraHead config for a plain Llama or Qwen3 config and a head map.

    Raises:
        ConfigError: The base model is of a kind that cannot be migrated.
    """
    kind = config.get("model_type")
    if kind not in BASE_TYPES:
        raise ConfigError(
            f"model_type {kind!r} cannot be migrated; known are {', '.join(BASE_TYPES)}."
        )
    if kind == "mistral" and config.get("sliding_window"):
        raise ConfigError("This Mistral model has sliding-window attention, which is not plain.")
    for key in ("num_hidden_layers", "num_attention_heads"):
        if type(config.get(key)) is not int or not 0 < config[key] < MAX_COUNT:
            raise ConfigError(
                f"config.json: {key} is {config.get(key)!r}, expected a number from 1 to "
                f"{MAX_COUNT - 1}."
            )
    out = {k: config[k] for k in COPIED if config.get(k) is not None}
    out.setdefault("num_key_value_heads", config["num_attention_heads"])
    if kind == "mistral":
        out["attention_bias"] = False
    for name in ("mlp_bias", "rope_traditional"):
        if config.get(name):
            raise ConfigError(f"{name} is {config[name]!r}; hydra_mlx supports only false.")
    qk_norm = kind == "qwen3"
    heads = read_head_map(head_map, out["num_hidden_layers"], out["num_attention_heads"])
    return HydraArgs.from_dict({**out, "fa_qk_norm": qk_norm, "la_qk_norm": qk_norm, **heads})


def open_source(path: Path, head_map: str | dict | None) -> Source:
    """Open a checkpoint: HydraHead (spec or converted), Llama, Qwen3, or a Llama GGUF.

    Args:
        path: Folder or .gguf file. head_map: See read_head_map; needed for plain models only.

    Raises:
        ConfigError, CheckpointError, UsageError: See the messages.
    """
    if path.is_file():
        return _open_gguf(path, head_map)
    config = read_config(path)
    infos = read_headers(path)
    if config.get("model_type") == MODEL_TYPE:
        if head_map is not None:
            raise UsageError("--head-map is for plain models; this is a HydraHead checkpoint.")
        args = HydraArgs.from_dict(config)
        form = args.weights_form
        expected = model_shapes(args)
    else:
        if head_map is None:
            raise UsageError(
                f"{path} is a plain {config.get('model_type')!r} model, not a HydraHead one.",
                "Add --head-map FILE (JSON with full_attention_heads), or --head-map identity.",
            )
        # Where config.json is silent, exporters disagree; the weights do not.
        config.setdefault("tie_word_embeddings", "lm_head.weight" not in infos)
        args, form = migrated_args(config, head_map), "base"
        expected = base_shapes(args, config["model_type"] == "qwen3")
    report = key_report(infos, expected, args, form, config)
    report.require_whole(str(path))
    return SafetensorsSource(path, args, form, config, report, infos)


def key_report(infos: dict, expected: dict, args: HydraArgs, form: str, config: dict) -> KeyReport:
    """Key report of a folder; packed matrices count by their weight.

    Args:
        infos: {name: TensorInfo}. expected: {name: shape} of the layout.
        form: Source.form; a "base" may not be packed.

    Raises:
        CheckpointError: A tensor's shape or type does not fit.
    """
    plain, packed = {}, []
    for name, info in infos.items():
        stem, _, part = name.rpartition(".")
        if part in ("scales", "biases") and f"{stem}.weight" in infos:
            packed.append(name)
        elif f"{stem}.scales" in infos and part == "weight" and name in expected:
            _check_packed(infos, stem, expected[name], packed_format(config, stem))
            plain[name] = TensorInfo(name, info.file, info.dtype, expected[name], info.nbytes)
        else:
            if info.dtype not in FLOATS:
                raise CheckpointError(
                    f"{info.file.name}: {name} has dtype {info.dtype}, expected a float type."
                )
            plain[name] = info
    if packed and form == "base":
        raise CheckpointError(
            "This checkpoint is quantised already; migrate the unquantised one or a GGUF."
        )
    return check_keys(plain, expected, args.tie_word_embeddings)


def _check_packed(infos: dict, stem: str, shape: tuple, q: dict):
    """Refuse a quantised matrix whose parts do not belong together."""
    rows, width = shape if len(shape) == 2 else (0, 0)
    affine = q["mode"] == "affine"
    groups = (rows, width // q["group_size"])
    want = {
        "weight": ((rows, width * q["bits"] // 32), ("U32",)),
        "scales": (groups, FLOATS if affine else ("U8",)),
        "biases": (groups, FLOATS),
    }
    for part, (size, kinds) in want.items():
        info = infos.get(f"{stem}.{part}")
        if part == "biases" and not affine:
            if info is not None:
                raise CheckpointError(f"{stem}.biases is there, but {q['mode']} has none.")
        elif info is None or info.shape != size or info.dtype not in kinds:
            found = "missing" if info is None else f"{info.dtype} {list(info.shape)}"
            raise CheckpointError(
                f"{stem}.{part} is {found}, expected {'/'.join(kinds)} {list(size)} for "
                f"{q['bits']} bits in groups of {q['group_size']}."
            )


def _open_gguf(path: Path, head_map: str | dict | None) -> Source:
    gguf = GGUFFile.open(path)
    config = config_from_gguf(gguf.metadata, gguf.tensors)
    if head_map is None:
        raise UsageError(
            f"{path} is a plain {config['model_type']} model, not a HydraHead one.",
            "Add --head-map FILE (JSON with full_attention_heads), or --head-map identity.",
        )
    args = migrated_args(config, head_map)
    names = {ours: theirs for theirs, ours in llama_names(config, gguf.tensors).items()}
    infos = {}
    for ours, theirs in names.items():
        t = gguf.tensors[theirs]
        nbytes = 4 * math.prod(t.shape)
        if t.type in AFFINE_BITS and len(t.shape) == 2:
            # Bits, and a float32 scale and bias for 32 weights, as Packed keeps them.
            nbytes = nbytes * (AFFINE_BITS[t.type] + 2) // 32
        infos[ours] = TensorInfo(ours, path, "F32", t.shape, nbytes)
    dropped = [n for n in gguf.tensors if n not in set(names.values())]
    expected = base_shapes(args, config["model_type"] == "qwen3")
    report = check_keys(infos, expected, args.tie_word_embeddings)
    report.mapped = [(names[n], n) for n, _ in report.mapped]
    report.dropped += dropped
    report.require_whole(str(path))
    source = GGUFSource(path, args, "base", config, report, infos)
    source.gguf, source.gguf_names = gguf, names
    source.report.mapped = [(n, n) for _, n in source.report.mapped]
    return source
