"""Figures of a converted model, computed in PyTorch: many times faster than MLX on a CPU.

usage: python -m tools.transfer_torch.measure needle MODEL [flags of hydra-mlx needle]
       python -m tools.transfer_torch.measure perplexity MODEL BASE.gguf --text TOKENS --out FILE

MODEL is a folder as `hydra-mlx convert` wrote it, quantised or not: its weights are dequantised
and taken apart into the checkpoint's layout. Its logits in float32 are first held to those of MLX
for the same folder. Texts, windows, flags and files are those of `hydra-mlx needle` and
tools/perplexity.py.

Needles are asked in bfloat16, as a GPU would, perplexities in float32.

A needle is right here if every token of the number is the first choice after the ones before it,
and what follows is no figure: what greedy decoding gives, unless a reply has words before the
number, which would count as wrong.
"""

# Before hydra_mlx, which loads a BLAS library that would take the place of PyTorch's own.
import torch  # isort: skip

import argparse
import contextlib
import io
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import hydra_mlx
from hydra_mlx import cli, convert, needle
from hydra_mlx.errors import UsageError
from hydra_mlx.loading import load_tokenizer, read_config, resolve_path
from hydra_mlx.quantise import packed_format
from hydra_mlx.tensors import Packed, to_float

import mlx.core as mx
import numpy as np

from tools import perplexity

from . import checkpoint
from .delta import CHUNK
from .model import Student, Teacher

PROGRAM = "python -m tools.transfer_torch.measure"
CHECKED = 192  # tokens whose logits are compared with MLX
TOLERANCE = 2e-3  # of logits, 2-norm


def dequantised(folder: Path, target: Path) -> None:
    """Write an MLX folder again without quantisation, in float32."""
    config, stored, tensors = read_config(folder), {}, {}
    for file in sorted(folder.glob("*.safetensors")):
        stored |= mx.load(str(file))
    for name, tensor in stored.items():
        path, _, part = name.rpartition(".")
        packed = f"{path}.scales" in stored
        if packed and part == "weight":
            biases = stored.get(f"{path}.biases")
            form = packed_format(config, path)
            tensor = Packed(tensor, stored[f"{path}.scales"], biases, **form)
        if not packed or part not in ("scales", "biases"):
            tensors[name] = to_float(tensor)
    config = {k: v for k, v in config.items() if k not in ("quantization", "quantization_config")}
    target.mkdir()
    mx.save_safetensors(str(target / "model.safetensors"), tensors, metadata={"format": "mlx"})
    (target / "config.json").write_text(json.dumps(config | {"torch_dtype": "float32"}), "utf-8")
    for file in folder.glob("tokenizer*"):
        shutil.copy(file, target)


def student_of(folder: Path) -> tuple[Student, float]:
    """The PyTorch student with the weights of an MLX folder, and how far it is from MLX."""
    with tempfile.TemporaryDirectory() as temporary:
        plain, spec = Path(temporary) / "plain", Path(temporary) / "spec"
        dequantised(folder, plain)
        with contextlib.redirect_stderr(io.StringIO()) as told:
            code = convert.main(["--mlx-path", str(plain), "--to-hf", str(spec)])
        if code:
            raise UsageError(told.getvalue().strip())
        config, tensors = checkpoint.load_model(spec)
    student = Student(config, tensors, torch.float32, False)
    student.scaled = True
    return student, held_to_mlx(student, folder)


@torch.no_grad()
def logits(model: Student | Teacher, ids: list[int] | np.ndarray, last: int = 0) -> torch.Tensor:
    """[T, V] of a text, or of its last tokens."""
    n = len(ids)
    whole = np.pad(np.asarray(ids, np.int64), (0, -n % CHUNK))  # nothing looks ahead
    h = model.hidden(torch.from_numpy(whole)[None])[0, :n]
    return (h[-last:] @ model.embed.to(h.dtype).T).float()


def held_to_mlx(student: Student, folder: Path) -> float:
    """The largest relative difference of logits to MLX's.

    Raises:
        UsageError: It is beyond TOLERANCE.
    """
    ids = np.random.default_rng(0).integers(3, student.config["vocab_size"], CHECKED)
    wanted = np.array(hydra_mlx.load_model(folder)(mx.array(ids[None]))[0].astype(mx.float32))
    got = logits(student, ids).numpy()
    worst = float((np.linalg.norm(got - wanted, axis=1) / np.linalg.norm(wanted, axis=1)).max())
    if not worst < TOLERANCE:
        raise UsageError(f"PyTorch's logits are {worst:.1e} away from MLX's, at most {TOLERANCE}.")
    return worst


def device(dtype: str, worst: float) -> str:
    """What computed, for the files."""
    return (
        f"cpu, PyTorch {torch.__version__.split('+')[0]}, dequantised weights in {dtype} "
        f"(logits in float32 within {worst:.0e} of MLX's)"
    )


def answer(student: Student, tokenizer: Any, asked: Any) -> str:
    """The reply to a probes.Needle, up to where it leaves the right answer."""
    ids = tokenizer.encode(asked.body)
    whole = tokenizer.encode(f"{asked.body} {asked.answer}")
    if whole[: len(ids)] != ids:
        raise UsageError("The tokenizer joins the number with what is before it.")
    guess = whole[len(ids) :]
    chosen = logits(student, whole, len(guess) + 1).argmax(-1).tolist()
    right = next((i for i, x in enumerate(guess) if chosen[i] != x), len(guess))
    return tokenizer.decode(chosen[: right + 1])


def needles(words: list[str]) -> int:
    """`hydra-mlx needle` with other arithmetic; returns the exit code."""

    def work(args: argparse.Namespace) -> int:
        if args.chat:
            raise UsageError("--chat is only in `hydra-mlx needle`.")
        needle.check_files(args)
        folder = resolve_path(args.model)
        exact, worst = student_of(folder)
        student = Student(exact.config, exact.tensors, torch.bfloat16, False)
        student.scaled = True
        tokenizer, name = load_tokenizer(folder), device("bfloat16", worst)
        reply = lambda asked: answer(student, tokenizer, asked)  # noqa: E731
        return needle.measure(
            args, folder, tokenizer, name, reply=reply, program=f"{PROGRAM} needle"
        )

    return cli.run(needle.build_parser(), work, words)


class Read:
    """A PyTorch model as tools/perplexity.py reads one."""

    def __init__(self, model: Student | Teacher):
        self.model = model

    def log_probabilities(self, ids: np.ndarray):
        """[n, V] in float32 for each piece of perplexity.STEP tokens."""
        found = logits(self.model, ids).log_softmax(-1)
        for piece in found.split(perplexity.STEP):
            yield piece.numpy()


def main(argv=None) -> int:
    """Entry point; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["needle"]:
        return needles(words[1:])
    if words[:1] != ["perplexity"]:
        print(__doc__)
        return 2

    def pair(folder: Path, base: Path) -> tuple[Read, Read, str]:
        student, worst = student_of(folder)
        teacher = Teacher(*checkpoint.load_base(base), torch.float32, False)
        return Read(student), Read(teacher), device("float32", worst)

    return perplexity.main(words[1:], f"{PROGRAM} perplexity", pair)


if __name__ == "__main__":
    raise SystemExit(main())
