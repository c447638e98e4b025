"""A tiny base model, its student, and text, for the tests of the transfer."""

from pathlib import Path
from types import SimpleNamespace

from hydra_mlx import migrate
from hydra_mlx.sources import open_source
from hydra_mlx.teacher import load_teacher, open_base
from hydra_mlx.training.steps import Recipe, Trainer
from hydra_mlx.training.student import read_weights

import mlx.core as mx
import numpy as np

from .checkpoints import write_base
from .conftest import write_tokenizer

WORDS = "the sea was calm and two boats came in before dawn while a lamp burned on the wall".split()
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 260,
    "eos_token_id": 257,
    "tie_word_embeddings": True,
}


def prose(seed: int, words: int) -> str:
    """Random words with full stops."""
    rng = np.random.RandomState(seed)
    return " ".join(rng.choice(WORDS) + ("." if rng.rand() < 0.1 else "") for _ in range(words))


def write_world(folder: Path) -> SimpleNamespace:
    """A base with a tokenizer, a student migrated from it, text and held-out text."""
    base = write_base(folder / "base", "llama", 3, **SIZES)[0]
    write_tokenizer(base)
    texts = folder / "texts"
    texts.mkdir()
    for i in range(6):
        (texts / f"{i}.txt").write_text(prose(i, 150))
    (folder / "held-out.txt").write_text(prose(99, 80))
    student = folder / "student"
    flags = ["--select", "fixed", "--ratio", "3:1", "--gamma", "rms", "--text", texts]
    argv = [base, *flags, "--length", "64", "--out", student, "--quiet"]
    assert migrate.main([str(a) for a in argv]) == 0
    return SimpleNamespace(
        folder=folder, base=base, student=student, texts=texts, held_out=folder / "held-out.txt"
    )


def recipe(stage: str, **changes) -> Recipe:
    """A short stage in float32."""
    distil = stage == "distil"
    values = {
        "stage": stage, "steps": 8, "length": 32, "batch": 4, "accumulate": 1, "lr": 3e-3,
        "warmup": 2, "lr_end": 0.1, "clip": 1.0, "seed": 0, "kl": float(distil),
        "ce": float(not distil), "dtype": "float32", "logit_scale": False, "chunk": 50,
    }  # fmt: skip
    return Recipe(**{**values, **changes})


def parts(world: SimpleNamespace) -> tuple:
    """(student's config, its weights, the teacher in memory)."""
    source = open_source(world.student, None)
    return source.args, read_weights(source), load_teacher(open_base(world.base))


def trainer(world: SimpleNamespace, stage: str, compiled=False, checkpoint=False, **changes):
    """A Trainer of the world's student."""
    return Trainer(recipe(stage, **changes), *parts(world), checkpoint, compiled)


def tokens(batch: int = 4, length: int = 32, seed: int = 0) -> mx.array:
    """Random bytes, [batch, length + 1]."""
    return mx.array(np.random.RandomState(seed).randint(0, 256, (batch, length + 1)))
