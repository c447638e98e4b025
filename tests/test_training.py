"""Losses and steps of the transfer against their literal definitions (spec section 4)."""

import hydra_mlx  # noqa: F401  (before mlx: it chooses the BLAS library)
from hydra_mlx import mixer, ops, reference
from hydra_mlx.training.evaluate import compare
from hydra_mlx.training.losses import (
    hidden_states,
    output_matrix,
    position_losses,
    training_loss,
)
from hydra_mlx.training.steps import learning_rate

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from . import students


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return students.write_world(tmp_path_factory.mktemp("world"))


def gradient_of(fn, *arrays):
    return mx.grad(fn, argnums=list(range(len(arrays))))(*arrays)


def same(a, b, limit=1e-5):
    a, b = np.array(a, np.float64), np.array(b, np.float64)
    assert np.abs(a - b).max() <= limit * max(np.abs(b).max(), 1e-12)


# Losses


@pytest.mark.parametrize("shares", [(1.0, 0.0), (0.0, 1.0), (0.7, 0.3)])
@pytest.mark.parametrize("chunk", [1, 7, 16, 29, 64])
def test_chunked_losses_equal_unchunked_ones(chunk, shares):
    rng = np.random.RandomState(0)
    h, ht = (mx.array(rng.standard_normal((29, 8)), mx.float32) for _ in "st")
    w, wt = (mx.array(rng.standard_normal((50, 8)), mx.float32) for _ in "st")
    targets = mx.array(rng.randint(0, 50, 29))

    def whole(h, w):
        log_q = nn.log_softmax(h @ w.T, axis=-1)
        log_p = nn.log_softmax(ht @ wt.T, axis=-1)
        kl = (mx.exp(log_p) * (log_p - log_q)).sum(-1).mean()
        ce = nn.losses.cross_entropy(h @ w.T, targets).mean()
        return shares[0] * kl + shares[1] * ce, kl, ce

    def ours(h, w):
        return training_loss(h, w, targets, (ht, wt), shares, chunk)

    for a, b in zip(ours(h, w), whole(h, w), strict=True):
        same(a, b)
    one = gradient_of(lambda h, w: 3 * ours(h, w)[0], h, w)
    other = gradient_of(lambda h, w: 3 * whole(h, w)[0], h, w)
    for a, b in zip(one, other, strict=True):
        same(a, b)
    sums = position_losses(h, w, targets, ht, wt, chunk)
    for a, b in zip(sums, whole(h, w)[1:], strict=True):
        same(a, 29 * b)
    if not shares[0]:
        loss, kl, ce = training_loss(h, w, targets, None, shares, chunk)
        assert kl.item() == 0 and loss.item() == pytest.approx(ce.item())
        alone = gradient_of(lambda h, w: training_loss(h, w, targets, None, shares, chunk)[0], h, w)
        for a, b in zip(alone, gradient_of(lambda h, w: whole(h, w)[0], h, w), strict=True):
            same(a, b)


def test_logits_of_the_whole_batch_never_exist():
    """1024 positions of 16384 logits would be 67 MB a copy, and the KL needs several."""
    h, ht = (mx.random.normal((1024, 8)) for _ in "st")
    w = mx.random.normal((16384, 8))
    targets = mx.zeros(1024, mx.int32)

    def peak(fn):
        mx.eval(h, ht, w)
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        mx.eval(fn())
        return mx.get_peak_memory() - before

    def train(chunk):
        loss = lambda h, w: training_loss(h, w, targets, (ht, w), (1, 1), chunk)[0]  # noqa: E731
        return peak(lambda: gradient_of(loss, h, w))

    logits = 4 * 1024 * 16384
    assert 2 * train(32) < 2 * logits < train(1024)
    assert peak(lambda: position_losses(h, w, targets, ht, w, 32)) < logits


def test_align_is_its_literal_definition(world):
    """Run the teacher, record what goes into and comes out of each attention, replay."""
    trainer = students.trainer(world, "align")
    _, weights, teacher = students.parts(world)
    batch = students.tokens(2, 17)
    seen = []

    class Spy(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def __call__(self, x, *rest):
            seen.append((x, self.inner(x, *rest)))
            return seen[-1][1]

    for layer in teacher.layers:
        layer.self_attn = Spy(layer.self_attn)
    teacher(batch[:, :-1])
    total = 0.0
    w = {n: np.array(x, np.float64) for n, x in weights.items()}
    positions = np.broadcast_to(np.arange(17.0), (2, 17))
    args = students.parts(world)[0]
    args.fa_logit_scale = None
    for i, (x, target) in enumerate(seen):
        prefix = f"model.layers.{i}.self_attn."
        own = {n.removeprefix(prefix): v for n, v in w.items() if n.startswith(prefix)}
        y = reference.attention(args, i, own, np.array(x, np.float64), positions)
        total += ((y - np.array(target)) ** 2).mean()
    losses, grads = trainer.gradient(trainer.weights, batch)
    same(losses["loss"], total, 1e-4)
    assert set(grads) == set(trainer.weights) == {n for n in weights if ".self_attn." in n}


def test_the_distil_loss_is_its_literal_definition(world):
    trainer = students.trainer(world, "distil", kl=0.7, ce=0.3, logit_scale=True)
    args, weights, teacher = students.parts(world)
    batch = students.tokens(2, 17)
    inputs, targets = np.array(batch[:, :-1]), np.array(batch[:, 1:])
    z = reference.forward(args, {n: np.array(x) for n, x in weights.items()}, inputs)
    zt = np.array(teacher(batch[:, :-1]), np.float64)

    def log_softmax(z):
        z = z - z.max(-1, keepdims=True)
        return z - np.log(np.exp(z).sum(-1, keepdims=True))

    log_q, log_p = log_softmax(z), log_softmax(zt)
    kl = (np.exp(log_p) * (log_p - log_q)).sum(-1).mean()
    ce = -np.take_along_axis(log_q, targets[..., None], -1).mean()
    losses, _ = trainer.gradient(trainer.weights, batch)
    same(losses["kl"], kl, 1e-4)
    same(losses["ce"], ce, 1e-4)
    same(losses["loss"], 0.7 * kl + 0.3 * ce, 1e-4)


# Gradients


@pytest.mark.parametrize("T, chunk", [(3, 16), (16, 16), (21, 8), (70, 64)])
def test_gradient_of_the_gated_delta_rule(T, chunk):
    """Against float64 central differences of the reference, in random directions."""
    rng = np.random.RandomState(T)
    Hl, Dk, Dv = 2, 4, 6
    q, k = (rng.standard_normal((1, T, Hl, Dk)) for _ in "qk")
    k = k / np.linalg.norm(k, axis=-1, keepdims=True)
    v = rng.standard_normal((1, T, Hl, Dv))
    g, beta = -rng.rand(1, T, Hl) * 0.5, rng.rand(1, T, Hl)
    S = rng.standard_normal((1, Hl, Dv, Dk))
    seed_o, seed_S = rng.standard_normal(v.shape), rng.standard_normal(S.shape)
    inputs = [q, k, v, g, beta, S]

    def exact(*x):
        o, last = reference.gated_delta(*x)
        return (o * seed_o).sum() + (last * seed_S).sum()

    def ours(*x):
        o, last = ops.gated_delta(*x, chunk=chunk)
        return (o * mx.array(seed_o)).sum() + (last * mx.array(seed_S)).sum()

    arrays = [mx.array(x, mx.float32) for x in inputs]
    grads = [np.array(x, np.float64) for x in gradient_of(ours, *arrays)]
    for i, x in enumerate(inputs):
        direction, eps = rng.standard_normal(x.shape), 1e-5
        ends = [[*inputs[:i], x + s * eps * direction, *inputs[i + 1 :]] for s in (1, -1)]
        numeric = (exact(*ends[0]) - exact(*ends[1])) / (2 * eps)
        scale = np.linalg.norm(grads[i]) * np.linalg.norm(direction)
        assert abs((grads[i] * direction).sum() - numeric) < 2e-5 * scale, i


@pytest.mark.parametrize("T, block", [(16, 8), (21, 8), (9, 8), (30, 4)])
def test_gradient_of_blocked_attention(T, block):
    """Ragged grouping, blocks that do not divide T: the same as MLX's own gradient."""
    rng = np.random.RandomState(T)
    q, k, v = (mx.array(rng.standard_normal((2, n, T, 6)), mx.float32) for n in (5, 2, 2))
    seed = mx.array(rng.standard_normal(q.shape), mx.float32)
    runs = ((0, 4, 0, 1), (4, 1, 1, 1))
    results = []
    for size in (None, block):
        attend = lambda *x, size=size: ops.ragged_attention(*x, runs, 0.4, "causal", block=size)  # noqa: E731
        loss = lambda *x, attend=attend: (attend(*x) * seed).sum()  # noqa: E731
        results.append([attend(q, k, v), *gradient_of(loss, q, k, v)])
    for a, b in zip(*results, strict=True):
        same(b, a)


@pytest.mark.parametrize("stage", ["align", "distil"])
def test_gradients_of_a_stage_against_differences(world, stage):
    """Along each kind of tensor, one step of the loss up and down."""
    trainer = students.trainer(world, stage)
    batch = students.tokens(2, 20)
    _, grads = trainer.gradient(trainer.weights, batch)
    rng = np.random.RandomState(1)
    kinds = {n.split(".", 4)[-1]: n for n in trainer.weights}
    for name in kinds.values():
        x = trainer.weights[name]
        direction = mx.array(rng.standard_normal(x.shape).astype(np.float32))
        direction = direction + 3 * grads[name] / (mx.abs(grads[name]).max() + 1e-20)
        slope = (grads[name] * direction).sum().item()
        size = 2e-3 * max(mx.abs(x).max().item(), 0.3) / mx.abs(direction).max().item()
        values = []
        for s in (1, -1):
            moved = {**trainer.weights, name: x + s * size * direction}
            values.append(trainer.gradient(moved, batch)[0]["loss"].item())
        numeric = (values[0] - values[1]) / (2 * size)
        noise = 1e-6 * abs(values[0]) / size
        assert abs(numeric - slope) < 0.02 * abs(slope) + noise, name


@pytest.mark.parametrize("stage", ["align", "distil", "long"])
def test_checkpointing_and_accumulation_change_nothing(world, stage):
    batch = students.tokens()
    plain = students.trainer(world, stage)
    want, grads = plain.gradient(plain.weights, batch)
    kept = students.trainer(world, stage, checkpoint=True)
    got, other = kept.gradient(kept.weights, batch)
    same(got["loss"], want["loss"])
    for n in grads:
        same(other[n], grads[n], 1e-4)
    one = students.trainer(world, stage)
    two = students.trainer(world, stage, accumulate=2)
    same(one.advance(batch)["loss"], two.advance(batch)["loss"])
    same(one.advance(batch)["grad_norm"], two.advance(batch)["grad_norm"], 1e-3)


def test_compiled_is_eager(world, monkeypatch):
    """With checkpointed layers and attention in blocks on the compiled side."""
    batch = students.tokens(2, 16)
    values = {}
    for compiled in (False, True):
        if compiled:
            monkeypatch.setattr(mixer, "TRAIN_BLOCK", 8)
        trainer = students.trainer(world, "distil", compiled, compiled, batch=2, length=16)
        values[compiled] = [trainer.advance(batch)["loss"].item() for _ in range(4)]
    same(values[True], values[False], 1e-4)
    assert values[True][3] < values[True][0]


# Steps


@pytest.mark.parametrize("stage", ["align", "distil", "long"])
def test_the_loss_falls(world, stage):
    trainer = students.trainer(world, stage, steps=20)
    batch = students.tokens()
    values = [trainer.advance(batch)["loss"].item() for _ in range(20)]
    assert values[-1] < 0.9 * values[0]
    assert trainer.step == 20


def test_align_leaves_the_rest_alone(world):
    trainer = students.trainer(world, "align")
    trainer.advance(students.tokens())
    rest = {n: x for n, x in tree_flatten(trainer.model.parameters()) if ".self_attn." not in n}
    weights = students.parts(world)[1]
    assert rest and all(mx.array_equal(x, weights[n]).item() for n, x in rest.items())


def test_bfloat16_arithmetic_keeps_float32_weights(world):
    trainer = students.trainer(world, "long", dtype="bfloat16")
    before = dict(trainer.weights)
    values = [trainer.advance(students.tokens())["loss"].item() for _ in range(6)]
    assert values[-1] < values[0]
    assert {x.dtype for x in trainer.weights.values()} == {mx.float32}
    moved = [n for n, x in trainer.weights.items() if not mx.array_equal(x, before[n]).item()]
    assert len(moved) > 0.9 * len(before)


def test_the_log_length_scale_is_off_unless_asked(world):
    batch = students.tokens()
    losses = {}
    for scale in (False, True):
        trainer = students.trainer(world, "long", logit_scale=scale)
        losses[scale] = trainer.gradient(trainer.weights, batch)[0]["loss"].item()
    assert losses[False] != losses[True]


def test_warm_up_and_cosine():
    at = learning_rate(students.recipe("long", steps=100, warmup=10, lr=1.0, lr_end=0.1))
    rates = [at(mx.array(i)).item() for i in range(101)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == pytest.approx(1.0)
    assert rates[10] == pytest.approx(1.0) and rates[55] == pytest.approx(0.55)
    assert rates[100] == pytest.approx(0.1) and rates == sorted(rates[:10]) + rates[10:]


def test_gradients_are_clipped_and_the_optimizer_is_the_papers(world):
    """The first AdamW step moves every weight by the learning rate, whatever the gradient."""
    trainer = students.trainer(world, "long", warmup=0, lr=1e-3, steps=10**6)
    assert trainer.optimizer.betas == [0.9, 0.95] and trainer.optimizer.weight_decay == 0
    before = dict(trainer.weights)
    losses, grads = trainer.gradient(trainer.weights, students.tokens())
    norm = trainer.advance(students.tokens())["grad_norm"].item()
    assert norm == pytest.approx(np.sqrt(sum((g * g).sum().item() for g in grads.values())), 1e-4)
    name = "model.layers.0.mlp.up_proj.weight"
    moved = mx.abs(trainer.weights[name] - before[name])
    assert mx.abs(moved - 1e-3).max().item() < 1e-4
    m = trainer.optimizer.state[name]["m"]
    same(m, 0.1 * grads[name] * min(1.0, 1.0 / norm), 1e-3)


def test_evaluation_is_its_definition(world):
    args, weights, teacher = students.parts(world)
    windows = np.array(students.tokens(3, 20))
    found = compare(teacher, teacher, windows, 7)
    assert found["kl"] == pytest.approx(0, abs=1e-6) and found["perplexity_ratio"] == 1.0
    log_q = nn.log_softmax(teacher(mx.array(windows[:, :-1])), axis=-1)
    ce = -mx.take_along_axis(log_q, mx.array(windows[:, 1:, None]), -1).mean().item()
    assert found["perplexity"] == pytest.approx(np.exp(ce), 1e-4) and found["tokens"] == 60
    assert set(compare(teacher, None, windows, 7)) == {"tokens", "perplexity"}


def test_hidden_states_are_the_models(world):
    _, _, teacher = students.parts(world)
    batch = students.tokens(1, 9)
    same(hidden_states(teacher, batch) @ output_matrix(teacher).T, teacher(batch))
