"""What a prompt will take in memory, said before it is read: weights, cache, one prefill step.

Keys, values, states and weights are exact. The working set of a step is an estimate, compared with
measured ones on a CPU and predicted for a GPU: see docs/cache.md.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from .cache import bytes_per_number, kv_bytes_per_token, state_bytes
from .config import HydraArgs, layer_heads
from .errors import UsageError
from .kv_cache import STEP, in_words
from .machine import Machine
from .model import LAYERS_AHEAD
from .ops.attention import SCORES
from .ops.delta import CHUNK, GROUP
from .ops.partial import LEAST_KEYS
from .text import count, size

LONG = 8192  # tokens to read from which on the plan is printed


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of a run, and what they were worked out from.

    Attributes:
        args: The model's. tokens: The cache at its longest. step: Tokens of a prefill call.
        weights: Bytes of all parameters. k_bits, v_bits, group_size: As of HydraKVCache.
        itemsize: Of activations and of unquantised keys and values. checkpoints: Their budget.
        kernels: Whether they run, on a GPU. rows: Sequences, each with states of its own; `tokens`
            are those of all.
    """

    args: HydraArgs
    tokens: int
    step: int
    weights: int
    k_bits: int | None = None
    v_bits: int | None = None
    group_size: int = 64
    itemsize: int = 2
    checkpoints: int = 0
    kernels: bool = False
    rows: int = 1

    @property
    def token_bytes(self) -> float:
        """Bytes of keys and values of a token."""
        both = (self.k_bits, self.v_bits)
        mean = sum(bytes_per_number(n, self.group_size, self.itemsize) for n in both) / 2
        return kv_bytes_per_token(self.args, mean)

    @property
    def kv(self) -> int:
        """Keys and values."""
        return int(-(-self.tokens // STEP) * STEP * self.token_bytes)

    @property
    def state(self) -> int:
        """Recurrent states and conv tails."""
        return self.rows * state_bytes(self.args, self.itemsize)

    @property
    def working(self) -> int:
        """The rest of a prefill step, about."""
        return working_bytes(self.args, min(self.step, self.tokens), self.itemsize, self.kernels)

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.rest + self.kv

    @property
    def rest(self) -> int:
        """What does not grow with the tokens, weights not counted."""
        return self.state + self.checkpoints + self.working

    def fits(self, free: int) -> int:
        """Tokens for which `free` bytes are enough when the weights are loaded already."""
        return max(0, int((free - self.rest) // self.token_bytes) // STEP * STEP)

    def text(self) -> str:
        """One line."""
        kept = "" if self.k_bits is None else f" in {in_words(self.k_bits, self.v_bits)} bits"
        points = f", checkpoints {size(self.checkpoints)}" if self.checkpoints else ""
        states = "states" if self.rows == 1 else f"states of {self.rows} rows"
        return (
            f"{size(self.total)}: weights {size(self.weights)}, keys and values{kept} of "
            f"{count(self.tokens, 'token')} {size(self.kv)}, {states} {size(self.state)}{points}, "
            f"a step of {self.step:,} tokens about {size(self.working)}"
        )


def working_bytes(args: HydraArgs, T: int, itemsize: int, kernels: bool) -> int:
    """Bytes that a prefill step of T tokens holds besides weights and cache, about.

    With kernels MLX holds what LAYERS_AHEAD layers need at once; by operations, on a CPU, the
    largest part of one layer.
    """
    E, D, H = args.hidden_size, args.head_dim, args.num_attention_heads
    mlp = T * itemsize * (2 * E + 4 * args.intermediate_size)
    most = whole = 0
    for layer in range(args.num_hidden_layers):
        heads = layer_heads(args, layer)
        Hf, Hl, Hk = len(heads.fa), len(heads.la), len(heads.kv)
        rows = (4 * Hl + 2 * Hf + 2 * Hk) * D
        mixer = T * itemsize * (2 * E + rows + H * D)
        linear = T * itemsize * 9 * Hl * D
        if kernels:
            linear += T * 8 * CHUNK * Hl  # R and M of la_prefill, float32
            whole = max(whole, mlp + mixer + linear)
            continue
        some = min(T, GROUP * CHUNK)
        linear += 4 * some * Hl * (12 * D + 12 * CHUNK)
        attention = 4 * 8 * max(SCORES, Hf * T * LEAST_KEYS) if Hf else 0
        most = max(most, mlp, mixer + max(linear, attention))
    residual = 2 * T * E * itemsize
    logits = 3 * 4 * args.vocab_size
    return residual + logits + (whole * (LAYERS_AHEAD + 1) if kernels else most)


def plan_of(
    model: Any,
    tokens: int,
    step: int,
    few: tuple | None = None,
    checkpoints: int = 0,
    rows: int = 1,
) -> MemoryPlan:
    """The plan of a loaded HydraHead model.

    Args:
        few: kv_format of its cache, None for full precision. checkpoints: Bytes of their budget.
        rows: As in MemoryPlan.
    """
    from mlx.utils import tree_flatten

    from .kernels.dispatch import backend

    k_bits, v_bits, group = few or (None, None, 64)
    return MemoryPlan(
        args=model.args,
        tokens=tokens,
        step=step,
        weights=sum(x.nbytes for _, x in tree_flatten(model.parameters())),
        k_bits=k_bits,
        v_bits=v_bits,
        group_size=group,
        itemsize=model.model.norm.weight.dtype.size,
        checkpoints=checkpoints,
        kernels=backend() is not None,
        rows=rows,
    )


def check(plan: MemoryPlan, there: Machine | None, to_read: int, note: Callable, held: int = 0):
    """Say what a long prompt will take, and refuse one that cannot fit.

    Args:
        there: What the machine has, the weights loaded. to_read: Tokens of the prompt not yet
            cached. note: Prints a line. held: Bytes of the cache that are there already.

    Raises:
        UsageError: It does not fit; the message has the numbers, the hint what would fit.
    """
    held = min(held, plan.kv + plan.state)
    needed = plan.total - plan.weights - held
    if there is None or needed <= there.free:
        if to_read >= LONG:
            left = "" if there is None else f"; {size(there.free)} {there.what}, weights loaded"
            note(f"memory: {plan.text()}{left}.")
        return
    raise UsageError(
        f"This needs {plan.text()}. Besides what is loaded that is {size(needed)}, but "
        f"{size(there.free)} {there.what}.",
        "What fits, " + "; ".join(alternatives(plan, there.free + held)) + ".",
    )


def alternatives(plan: MemoryPlan, free: int) -> list:
    """What would fit into `free` bytes, in words: fewer tokens or bits, smaller steps, ratios."""
    out = []

    def offer(words: str, other: MemoryPlan, always: bool = False):
        n = other.fits(free)
        if always or n > max(plan.fits(free), 0):
            out.append(f"{words}: {count(n, 'token')}")

    offer("as it is", plan, True)
    small = replace(plan, step=min(plan.step, 512))
    if small.step < plan.step:
        offer("with --prefill-step-size 512", small)
    for bits in (8, 4):
        if plan.k_bits is None or max(plan.k_bits, plan.v_bits) > bits:
            offer(f"with --kv-bits {bits}", replace(plan, k_bits=bits, v_bits=bits))
    if small.step < plan.step and (plan.k_bits is None or max(plan.k_bits, plan.v_bits) > 4):
        offer("with both", replace(small, k_bits=4, v_bits=4))
    mine = kv_bytes_per_token(plan.args, 1)
    for ratio in (3, 7):
        args = at_ratio(plan.args, ratio)
        if kv_bytes_per_token(args, 1) < mine:
            offer(f"the model at {ratio}:1 (hydra-mlx migrate)", replace(plan, args=args))
    return out


def at_ratio(args: HydraArgs, ratio: int) -> HydraArgs:
    """The same geometry with one FA head to `ratio` LA heads, each on keys of its own if it can."""
    H, Hk = args.num_attention_heads, args.num_key_value_heads
    n = max(1, H // (ratio + 1))
    heads = [[i * H // n // (H // Hk) * (H // Hk) for i in range(n)]] * args.num_hidden_layers
    if len({*heads[0]}) < n:  # more FA heads than key/value heads
        heads = [list(range(n))] * args.num_hidden_layers
    return replace(args, full_attention_heads=heads)
