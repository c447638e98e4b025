"""A tiny random model with a byte tokenizer, so that no test downloads anything."""

import io
import json
import sys
from pathlib import Path

import hydra_mlx  # noqa: F401  (before mlx: it chooses the BLAS library)

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten, tree_map_with_path

TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}"
    "{% if not (continue_final_message and loop.last) %}{{ '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|pad|>"]
CONFIG = {
    "model_type": "hydrahead",
    "architectures": ["HydraHeadForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 260,
    "max_position_embeddings": 4096,
    "full_attention_heads": [[0, 1, 2, 3], [], [1, 2]],
    "eos_token_id": 257,
}


def write_tokenizer(folder: Path, template: bool = True):
    """One token for each byte, and four special ones (ids 256 to 259)."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    vocab = {c: i for i, c in enumerate(sorted(alphabet))}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(s, special=True) for s in SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"}
    config["clean_up_tokenization_spaces"] = False
    if template:
        config["chat_template"] = TEMPLATE
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def write_model(folder: Path, seed: int = 0, template: bool = True, **changes) -> Path:
    """A spec-form model folder; `changes` are config keys. Mostly prints ASCII letters."""
    from hydra_mlx.config import HydraArgs
    from hydra_mlx.model import Model

    folder.mkdir(parents=True, exist_ok=True)
    config = {**CONFIG, **changes}
    mx.random.seed(seed)
    model = Model(HydraArgs.from_dict(config))

    def fill(name, x):
        scale = 2.0 if "embed" in name else 1.5 / x.shape[-1] ** 0.5
        return x if x.ndim == 1 else mx.random.normal(x.shape) * scale

    model.update(tree_map_with_path(fill, model.parameters()))
    if "lm_head" in model:
        ids = mx.arange(config["vocab_size"])
        letters = (ids >= 32) & (ids < 94)  # "A" to "~"; greedy replies never take another
        model.lm_head.weight = model.lm_head.weight * letters[:, None] * 4
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(config))
    write_tokenizer(folder, template)
    return folder


@pytest.fixture(scope="session")
def make_model_dir(tmp_path_factory):
    """make_model_dir(seed=0, template=True, **config keys) -> folder; each kind is made once."""
    made = {}

    def make(seed: int = 0, template: bool = True, **changes) -> Path:
        key = json.dumps([seed, template, changes], sort_keys=True)
        if key not in made:
            folder = tmp_path_factory.mktemp("models") / f"m{len(made)}"
            made[key] = write_model(folder, seed, template, **changes)
        return made[key]

    return make


@pytest.fixture(scope="session")
def tiny_model_dir(make_model_dir) -> Path:
    """The folder of a random model of three layers: all FA heads, all LA heads, both."""
    return make_model_dir()


@pytest.fixture(scope="session")
def tiny(tiny_model_dir) -> tuple:
    """(model, tokenizer) of tiny_model_dir."""
    return hydra_mlx.load(tiny_model_dir)


@pytest.fixture
def stdin(monkeypatch):
    """stdin(bytes) makes them piped input; without a call there is none."""

    def feed(data: bytes):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), "utf-8"))

    feed(b"")
    return feed


@pytest.fixture
def program(tiny_model_dir, stdin, capsys):
    """program("generate", flags...) -> (exit code, stdout, stderr), in this process.

    --model is the tiny model unless it is given or `model` is False.
    """
    from hydra_mlx.__main__ import main

    def run(command: str, *argv, model: bool = True):
        named = ["--model", tiny_model_dir] if model and "--model" not in argv else []
        code = main([str(a) for a in (command, *named, *argv)])
        out, err = capsys.readouterr()
        return code, out, err

    return run
