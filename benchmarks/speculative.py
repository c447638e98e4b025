"""Drafts against plain decoding in one run: python benchmarks/speculative.py [MODEL] [--tokens N]

MODEL is the one in this package unless it is given; docs/speculative.md has the figures of its
plain base, which `python tools/base_model.py base.gguf` and `hydra-mlx convert --hf-path base.gguf
--head-map identity` make.

It answers prompts whose replies copy (quote a passage, edit code) and one whose reply does not:
tokens a pass, accepted guesses, and time beside plain decoding, the two in turn. What a pass over 1
to 8 tokens costs, on it and on a random hybrid of its size, and taking tokens back. What guesses
cost that are never right. Replies of small random models with and without drafts, in float32. The
last line is JSON.
"""

import argparse
import json
import time

import hydra_mlx
from hydra_mlx.checkpoints import Checkpoints
from hydra_mlx.config import HydraArgs
from hydra_mlx.drafts import Draft, LookupDrafts, ModelDrafts
from hydra_mlx.model import Model
from hydra_mlx.sequence import CachedSequence
from hydra_mlx.trial import Trial

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map_with_path

PASSAGE = """\
The lighthouse at Gull Point was built in 1871 by Josiah Penhallow, a mason from Truro who had \
never seen the sea before that spring. Its lamp burned whale oil until 1889, then paraffin, and \
from 1934 electric light. Three keepers lived there with their families, in rooms so narrow that \
the beds were made to the shape of the wall. On the night of 14 November 1902 the barque Ellen \
Mary struck the reef below it in fog; all nineteen of her crew were brought ashore on a line that \
the keeper's daughter, Hannah Tregenza, had thrown from the rocks."""
CODE = """\
def moving_average(values, window):
    if window < 1:
        raise ValueError("window must be positive")
    total = 0.0
    averages = []
    for index, value in enumerate(values):
        total += value
        if index >= window:
            total -= values[index - window]
        if index >= window - 1:
            averages.append(total / window)
    return averages"""
PROMPTS = {
    "quote": f"Repeat the following text word for word.\n\n{PASSAGE}",
    "edit": f"Rewrite this Python code with `values` renamed to `samples`.\n\n{CODE}",
    "prose": "Write a story about a boy who finds a map in an old clock.",
}
SIZE = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "vocab_size", "tie_word_embeddings",
)  # fmt: skip
TINY = {
    "model_type": "hydrahead", "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 97,
    "full_attention_heads": [[0], [1, 3], []],
}  # fmt: skip


class Wrong:
    """Lookup whose every guess is changed to be wrong."""

    def __init__(self, avoid: list):
        self.inner, self.avoid, self.tally = LookupDrafts(), avoid, None

    def propose(self, text: list, room: int, choose=None) -> Draft:
        draft = self.inner.propose(text, room)
        at = len(text) - self.end
        if draft.tokens and at < len(self.avoid) and draft.tokens[0] == self.avoid[at]:
            draft.tokens[0] += 1
        return draft

    def start(self, text: list, should_stop=None):
        self.end = len(text)
        self.inner.start(text)

    def hopeless(self, text: list) -> bool:
        return self.inner.hopeless(text)

    def heard(self, draft: Draft, right: int):
        self.inner.heard(draft, right)

    def cut(self, n: int):
        self.inner.cut(n)


def random_model(config: dict, seed: int = 0) -> Model:
    """A model with random weights, float32."""
    mx.random.seed(seed)
    model = Model(HydraArgs.from_dict(config))

    def fill(name, x):
        scale = 1.0 if "embed" in name else 1.5 * x.shape[-1] ** -0.5
        return x if x.ndim == 1 else mx.random.normal(x.shape) * scale

    model.update(tree_map_with_path(fill, model.parameters()))
    model.eval()
    mx.eval(model.parameters())
    return model


def replies(model, prompt: list, n: int, ends: set, kinds: dict) -> dict:
    """{kind: (ids, seconds of the reply without its first token, tally)}, two rounds in turn."""
    found, times = {}, {k: [] for k in kinds}
    base = CachedSequence(model)
    base.read(prompt[:-1])
    for _ in range(2):
        for kind, make in kinds.items():
            drafts, ids, start = make(), [], 0.0
            for token in base.fork().generate(prompt[-1:], n, drafts=drafts):
                ids.append(token)
                if len(ids) == 1:
                    start = time.perf_counter()
                if token in ends:
                    break
            times[kind].append(time.perf_counter() - start)
            found[kind] = ids, drafts.tally if drafts else None
    return {k: (ids, min(times[k]), tally) for k, (ids, tally) in found.items()}


def copying(model, tokenizer, n: int) -> dict:
    """One row for each prompt."""
    rows = {}
    for name, text in PROMPTS.items():
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True
        )
        ends = set(tokenizer.eos_token_ids)
        kinds = {"plain": lambda: None, "lookup": LookupDrafts}
        if name == "prose":
            plain = replies(model, ids, n, ends, {"plain": lambda: None})["plain"][0]
            kinds["never right"] = lambda reply=plain: Wrong(reply)
        found = replies(model, ids, n, ends, kinds)
        plain, seconds, _ = found.pop("plain")
        for kind, (reply, took, tally) in found.items():
            row = rows[f"{name}, {kind}"] = {
                "prompt_tokens": len(ids),
                "reply_tokens": len(reply),
                "equal": reply == plain,
                "tokens_per_pass": round(tally.tokens / tally.passes, 2),
                "accepted": f"{tally.accepted}/{tally.drafted}",
                "speed_up": round(seconds / took, 2),
            }
            print(f"{name}, {kind}: {row}", flush=True)
    return rows


def pass_costs(model, context: int = 1000) -> dict:
    """Time of a pass over T tokens as a part of one over 1, and of a pass taken back to one."""
    cache = model.make_cache()
    vocab = model.args.vocab_size
    mx.eval(model(mx.random.randint(0, vocab, (1, context)), cache=cache))
    times = {}

    def timed(key, T: int, keep: int):
        start = time.perf_counter()
        trial = Trial(model, cache, list(range(T)))
        mx.eval(trial.logits)
        trial.keep(keep)
        mx.eval([c.state for c in cache])
        times.setdefault(key, []).append(time.perf_counter() - start)
        trial.keep(0)

    for _ in range(9):
        for T in range(1, 9):
            timed(T, T, T)
        timed("8, 5 kept", 8, 5)
    best = {k: min(v) for k, v in times.items()}
    return {str(k): round(v / best[1], 2) for k, v in best.items()}


def equality(models: int, prompts: int, n: int = 48) -> dict:
    """How many greedy replies of random models are the same with drafts; ties where not."""
    same, total, drafted, gaps = 0, 0, 0, []
    for seed in range(models):
        model, other = random_model(TINY, seed), random_model(TINY, seed)
        near = tree_map_with_path(
            lambda name, x: x + 0.02 * mx.random.normal(x.shape) * (x.ndim > 1), other.parameters()
        )
        other.update(near)
        rng = np.random.RandomState(seed)
        for _ in range(prompts):
            prompt = rng.randint(0, TINY["vocab_size"], rng.randint(2, 60)).tolist()
            points = {"every": 16, "most": 8}
            plain = list(CachedSequence(model, Checkpoints(**points)).generate(prompt, n))
            for drafts in (LookupDrafts(), ModelDrafts(CachedSequence(other), 5)):
                mine = CachedSequence(model, Checkpoints(**points))
                found = list(mine.generate(prompt, n, drafts=drafts))
                total, same = total + 1, same + (found == plain)
                drafted += drafts.tally.drafted
                if found != plain:
                    pairs = zip(found, plain, strict=True)
                    at = next(i for i, (a, b) in enumerate(pairs) if a != b)
                    logits = model(mx.array([[*prompt, *plain[:at]]]))[0, -1]
                    gap = logits[plain[at]] - logits[found[at]]
                    gaps.append(abs(gap.item()) / mx.abs(logits).max().item())
    return {"replies": total, "same": same, "drafted_tokens": drafted, "gaps": gaps}


def main(argv=None) -> int:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", metavar="MODEL")
    parser.add_argument("--tokens", type=int, default=160, help="longest reply")
    parser.add_argument("--models", type=int, default=10, help="random models for equality")
    parser.add_argument("--prompts", type=int, default=20, help="prompts for each of them")
    parser.add_argument("--only", choices=("costs", "replies", "equality"), help="one part")
    args = parser.parse_args(argv)
    parts = (args.only,) if args.only else ("costs", "replies", "equality")
    model, tokenizer = hydra_mlx.load(args.model)
    result = {"device": str(mx.default_device()), "pass_costs": {}}
    H, L = model.args.num_attention_heads, model.args.num_hidden_layers
    heads = [sorted({2 * i % H, (2 * i + 4) % H}) for i in range(L)]
    hybrid = {k: getattr(model.args, k) for k in SIZE} | {"full_attention_heads": heads}
    hybrid |= {"model_type": "hydrahead", "weights_form": "fused"}
    models = {"model": model, f"random hybrid, 2 FA heads of {H}": random_model(hybrid)}
    for name, m in models.items() if "costs" in parts else ():
        costs = result["pass_costs"][name] = pass_costs(m)
        print(f"a pass over T tokens, T=1 is 1, {name}:\n  {costs}")
    if "replies" in parts:
        result["replies"] = copying(model, tokenizer, args.tokens)
    if "equality" in parts:
        result["equality"] = equality(args.models, args.prompts)
        print(f"random models, float32: {result['equality']}")
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
