"""A Llama whose retrieval heads are put in by hand, so that scoring can be checked against them.

A text is a list of tokens; somewhere in it stand "key value ;", at its end stands the key again,
and the model answers with the value:
  layer 0 head 1  moves the token one back (the value) to the place of ";": the sender
  layer 0 head 2  moves the token two back (the key) there
  layer 1 head 0  a decoy: reads the fact as the receiver does and writes the value to the output,
                  from where the MLP of its layer takes it away again
  layer 2 head 3  finds ";" by its key and writes the value to the output: the receiver
All other heads write nothing. The residual stream has blocks of one entry for each token.
"""

import json
from pathlib import Path

import hydra_mlx  # noqa: F401  (before mlx: it chooses the BLAS library)
from hydra_mlx.probes import Pair

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models import llama

from .checkpoints import write_checkpoint

V, H, D, L = 32, 4, 64, 4
NOW, VALUE, KEY, OUT, ONE = 0, 32, 64, 96, 128  # blocks: own token, moved ones, output, a constant
E = 160  # 28 entries stay empty: quantisation wants whole groups of 32
CONST = 50.0  # dwarfs the rest, so that the norms divide everything by nearly the same number
SENDER, KEY_MOVER, DECOY, RECEIVER = (0, 1), (0, 2), (1, 0), (2, 3)
UNIT = float(np.sqrt(E) / CONST)  # what an entry of 1 is after a norm
THETA = 1e6
FAST, SLOW = range(6), [*range(16, 32), *range(48, 64)]  # rotary pairs; entries that hardly turn


def _lag(wq, wk, head: int, lag: int):
    """Attend `lag` tokens back: the query is the key, turned back by that angle."""
    for f in FAST:
        angle = -lag * THETA ** (-f / 32)
        wq[head * D + f, ONE] = 12 * np.cos(angle)
        wq[head * D + 32 + f, ONE] = 12 * np.sin(angle)
        wk[head * D + f, ONE] = 1.0


def _copy(wv, wo, head: int, source: int, target: int):
    """Carry a block through a head's values; entries come out as 1."""
    for i in range(V):
        wv[head * D + i, source + i] = 1 / UNIT
        wo[target + i, head * D + i] = 1.0


def planted_model() -> llama.Model:
    """The model of the module docstring; with random choice of nothing."""
    args = llama.ModelArgs(
        model_type="llama", hidden_size=E, num_hidden_layers=L, intermediate_size=V,
        num_attention_heads=H, num_key_value_heads=H, head_dim=D, rms_norm_eps=1e-6, vocab_size=V,
        rope_theta=THETA, tie_word_embeddings=False, max_position_embeddings=512,
    )  # fmt: skip
    model, w = llama.Model(args), {}
    embed = np.zeros((V, E), np.float32)
    embed[:, NOW : NOW + V], embed[:, ONE] = np.eye(V), CONST
    head = np.zeros((V, E), np.float32)
    head[:, OUT : OUT + V] = 10 * np.eye(V)
    w["model.embed_tokens.weight"], w["lm_head.weight"] = embed, head
    for layer in range(L):
        q, k, v = (np.zeros((H * D, E), np.float32) for _ in range(3))
        o = np.zeros((E, H * D), np.float32)
        gate, up = np.zeros((V, E), np.float32), np.zeros((V, E), np.float32)
        down = np.zeros((E, V), np.float32)
        if layer == 0:
            for (_, h), lag, block in ((SENDER, 1, VALUE), (KEY_MOVER, 2, KEY)):
                _lag(q, k, h, lag)
                _copy(v, o, h, NOW, block)
        for at, h in (DECOY, RECEIVER):
            if layer == at:
                for i, row in enumerate(SLOW):
                    q[h * D + row, NOW + i] = 20 / UNIT
                    k[h * D + row, KEY + i] = 20 / UNIT
                _copy(v, o, h, VALUE, OUT)
        if layer == DECOY[0]:
            gate[:, ONE] = 1.0  # after the norm sqrt(E), where SiLU is the identity
            for i in range(V):
                up[i, OUT + i] = 1 / UNIT
                down[OUT + i, i] = -1 / np.sqrt(E)
        prefix = f"model.layers.{layer}."
        for name, x in (("q", q), ("k", k), ("v", v), ("o", o)):
            w[f"{prefix}self_attn.{name}_proj.weight"] = x
        for name, x in (("gate", gate), ("up", up), ("down", down)):
            w[f"{prefix}mlp.{name}_proj.weight"] = x
    model.load_weights([(n, mx.array(x)) for n, x in w.items()], strict=False)
    mx.eval(model.parameters())
    return model


def planted_pair(rng: np.random.RandomState, length: int = 40, facts: int = 1) -> Pair:
    """Filler tokens with `facts` of "key value ;" in it, then the first fact's key."""
    ids = rng.permutation(V - 1)
    names, values, minus, filler = ids[:facts], ids[4 : 4 + facts], ids[8], ids[9:]
    text = rng.choice(filler, length)
    places = rng.permutation(np.arange(2, length - 4, 5))[:facts]
    for i, at in enumerate(places):
        text[at : at + 3] = names[i], values[i], V - 1
    clean = [*text.tolist(), int(names[0]), int(values[0])]
    corrupt = list(clean)
    corrupt[places[0] + 1] = int(minus)
    return Pair(tuple(clean), tuple(corrupt), len(clean) - 1, (int(minus),))


def planted_text(rng: np.random.RandomState, questions: int = 8) -> list:
    """Tokens of a text to learn from: three facts among filler, then keys with their values."""
    ids = rng.permutation(V - 1)
    names, values, filler = ids[:3], ids[3:6], ids[6:]
    parts = [[names[i], values[i], V - 1, rng.choice(filler)] for i in range(3)]
    parts += [[names[i], values[i]] for i in rng.choice(3, questions)]
    return [int(x) for part in parts for x in part]


def write_planted(folder: Path) -> Path:
    """The model as a Llama checkpoint whose tokenizer has a word "w0" to "w31" for each token."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    model = planted_model()
    config = {**vars(model.args), "hidden_act": "silu", "eos_token_id": None}
    weights = dict(tree_flatten(model.parameters()))
    write_checkpoint(folder, {k: v for k, v in config.items() if v is not None}, weights)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(V)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.save(str(folder / "tokenizer.json"))
    kind = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(kind))
    return folder
