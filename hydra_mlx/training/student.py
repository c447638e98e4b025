"""The student on disk: a HydraHead checkpoint in the spec's layout, opened and written again."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..config import MODEL_TYPE
from ..converter import Job, run
from ..errors import UsageError
from ..loading import read_config
from ..manifest import file_digest
from ..selection import write_heads
from ..sources import Source, open_source
from ..tensors import to_float

SHARD_BYTES = 2 * 10**9


@dataclass
class _Trained(Source):
    """A source whose weights are replaced by trained ones."""

    real: Source
    weights: dict

    def get(self, name: str, keep_packed: bool = True) -> Any:
        """See Source.get."""
        return self.weights[name]

    def blank(self, name: str, keep_packed: bool = True) -> Any:
        """See Source.blank."""
        return self.real.blank(name, keep_packed)

    def write_tokenizer(self, folder: Path) -> bool:
        """See Source.write_tokenizer."""
        return self.real.write_tokenizer(folder)


def open_student(path: Path) -> Source:
    """A HydraHead checkpoint that can be trained.

    Raises:
        UsageError: It is fused, quantised or no HydraHead checkpoint.
    """
    if not path.is_dir():
        raise UsageError(f"{path} is no folder.", "`hydra-mlx migrate` makes a student.")
    if read_config(path).get("model_type") != MODEL_TYPE:
        raise UsageError(f"{path} is no HydraHead model.", "`hydra-mlx migrate` makes a student.")
    source = open_source(path, None)
    if source.form != "spec":
        raise UsageError(
            f"{path} is fused for inference and cannot be trained.",
            "Give the checkpoint it was converted from, or `hydra-mlx convert --to-hf` it.",
        )
    if source.config.get("quantization"):
        raise UsageError(f"{path} is quantised and cannot be trained.", "Give the original.")
    return source


def read_weights(source: Source) -> dict:
    """Every weight as {name: float32 array}."""
    weights = {n: to_float(source.get(n, False)) for n in source.names("")}
    mx.eval(weights)
    return weights


def fingerprint(path: Path) -> str:
    """Changes with any weight or config key of a folder or file."""
    files = [path] if path.is_file() else [path / "config.json", *path.glob("model*.safetensors")]
    return "-".join(file_digest(f)[:8] for f in sorted(files) if f.is_file())


def write_student(
    source: Source,
    weights: dict,
    target: Path,
    dtype: str,
    overwrite: bool,
    progress: Callable[[str, int, int], None],
) -> Path:
    """Write trained weights as a checkpoint in the spec's layout (section 2), whole or not at all.

    Args:
        source: The opened student: config, tokenizer and names. weights: Of every name.
        dtype: "float32", "bfloat16" or "float16".
    """
    s = source
    new = _Trained(s.path, s.args, s.form, s.config, s.report, s.infos, s, weights)
    job = Job(new, "spec", None, dtype, None, SHARD_BYTES, for_hf=True)

    def add_map(folder: Path):
        write_heads(folder, {"full_attention_heads": s.args.full_attention_heads})

    return run(job, target, overwrite, progress, add_map)
