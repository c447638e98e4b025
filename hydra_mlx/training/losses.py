"""Forward passes and losses of the stages (spec section 4).

Axes: B batch, T tokens, E hidden size, V vocabulary, N = B*T positions.
"""

import mlx.core as mx
import mlx.nn as nn

from ..mixer import Step
from ..model import Model


def first_step(T: int) -> Step:
    """What the layers share in a pass over T tokens without a cache."""
    return Step(0, "causal" if T > 1 else None, None)


def hidden_states(model: Model, tokens: mx.array, checkpoint: bool = False) -> mx.array:
    """Tokens [B, T] to the last norm's output [B, T, E].

    Args:
        checkpoint: Keep only each layer's input and compute the rest again in the backward pass.
    """
    h, step = model.model.embed_tokens(tokens), first_step(tokens.shape[1])
    for layer in model.layers:
        run = lambda x, layer=layer: layer(x, step)  # noqa: E731
        h = (nn.utils.checkpoint(layer, run) if checkpoint else run)(h)
    return model.model.norm(h)


def output_matrix(model: Model) -> mx.array:
    """The matrix [V, E] that makes logits of hidden states."""
    tied = model.args.tie_word_embeddings
    return model.model.embed_tokens.weight if tied else model.lm_head.weight


def teacher_layer(layer: nn.Module, h: mx.array) -> tuple:
    """One layer of the teacher.

    Args:
        h: [B, T, E], the layer's input before its norm.

    Returns:
        (attention output after o_proj, the next layer's input), both [B, T, E].
    """
    out = layer.self_attn(layer.input_layernorm(h), first_step(h.shape[1]))
    after = h + out
    return out, after + layer.mlp(layer.post_attention_layernorm(after))


def attention_error(layer: nn.Module, h: mx.array, target: mx.array) -> mx.array:
    """MSE of one student layer's attention on the teacher's layer input, float32 scalar.

    Args:
        layer: The student's. h: [B, T, E], the teacher's layer input. target: [B, T, E].
    """
    y = layer.self_attn(layer.input_layernorm(h), first_step(h.shape[1]))
    return mx.square(y.astype(mx.float32) - target.astype(mx.float32)).mean()


def _log_softmax(h, w):
    z = (h @ w.T).astype(mx.float32)
    return z - mx.logsumexp(z, axis=-1, keepdims=True)


def _divergence(log_p, log_q):
    return (mx.exp(log_p) * (log_p - log_q)).sum()


def _surprise(log_q, targets):
    return -mx.take_along_axis(log_q, targets[:, None], axis=-1).sum()


def position_losses(
    h: mx.array,
    w: mx.array,
    targets: mx.array,
    h_teacher: mx.array | None = None,
    w_teacher: mx.array | None = None,
    chunk: int = 1024,
) -> tuple:
    """Sums over positions of KL(teacher || student) and of the cross-entropy, in nats; without a
    gradient.

    Args:
        h: [N, E] student's last hidden states. w: [V, E]. targets: [N] next tokens.
        h_teacher, w_teacher: The teacher's; None leaves the KL at 0.
        chunk: Positions whose logits exist at a time.

    Returns:
        (kl, ce), float32 scalars.
    """
    kl, ce = mx.zeros(()), mx.zeros(())
    for i in range(0, h.shape[0], chunk):
        cut = slice(i, i + chunk)
        # MLX would start several chunks at once; each waits for the one before.
        one = mx.depends([h[cut]], [kl, ce])[0]
        log_q = _log_softmax(one, w)
        ce = ce + _surprise(log_q, targets[cut])
        if h_teacher is not None:
            log_p = _log_softmax(mx.depends([h_teacher[cut]], [one])[0], w_teacher)
            kl = kl + _divergence(log_p, log_q)
    return kl, ce


def training_loss(
    h: mx.array,
    w: mx.array,
    targets: mx.array,
    teacher: tuple | None,
    weights: tuple,
    chunk: int,
) -> tuple:
    """The loss of distil and long: weights[0] * KL + weights[1] * cross-entropy, per position.

    The forward pass makes the gradient of h and w too, chunk by chunk, because logits are dear:
    they are computed once and never kept. With q, p the distributions of student and teacher,
    dKL/dlogits = q - p and dCE/dlogits = q - onehot(target).

    Args:
        h: [N, E]. w: [V, E]. targets: [N]. teacher: (h_teacher [N, E], w_teacher [V, E]) or None.
        chunk: Positions whose logits exist at a time.

    Returns:
        (loss, kl, ce), float32 scalars; only loss has a gradient, for h and w.
    """
    N, (kl_weight, ce_weight) = h.shape[0], (x / h.shape[0] for x in weights)

    @mx.custom_function
    def run(h, w):
        kl, ce = mx.zeros(()), mx.zeros(())
        dh, dw = [], mx.zeros(w.shape, mx.float32)
        for i in range(0, N, chunk):
            cut = slice(i, i + chunk)
            one = mx.depends([h[cut]], [kl, ce, dw, *dh[-1:]])[0]
            at = targets[cut]
            log_q = _log_softmax(one, w)
            q = mx.exp(log_q)
            dz = (kl_weight + ce_weight) * q if teacher is not None else ce_weight * q
            ce = ce + _surprise(log_q, at)
            if teacher is not None:
                log_p = _log_softmax(mx.depends([teacher[0][cut]], [one])[0], teacher[1])
                kl = kl + _divergence(log_p, log_q)
                dz = dz - kl_weight * mx.exp(log_p)
            if ce_weight:
                rows = mx.take_along_axis(dz, at[:, None], axis=-1) - ce_weight
                dz = mx.put_along_axis(dz, at[:, None], rows, axis=-1)
            dz = dz.astype(h.dtype)
            dh.append(dz @ w)
            dw = dw + (dz.T @ one).astype(mx.float32)
        return kl_weight * kl + ce_weight * ce, kl / N, ce / N, mx.concatenate(dh), dw

    @run.vjp
    def run_vjp(primals, cotangents, outputs):
        scale = cotangents[0]
        return (
            (outputs[3] * scale).astype(primals[0].dtype),
            (outputs[4] * scale).astype(primals[1].dtype),
        )

    return run(h, w)[:3]
