"""KL to the teacher and next-token loss over a large vocabulary, a slice of tokens at a time.

Value and gradient of a slice are computed together, so that logits never exist for more than one
slice: 4096 tokens x 49152 words are 0.4 GB in bfloat16, a whole batch would be 3 to 10 GB.
"""

from functools import cache

import torch
from torch import Tensor

from .blocks import compile_block

SLICE = 4096


def _slice_loss(s: Tensor, t: Tensor | None, labels: Tensor, kl: Tensor, ce: Tensor, count: int):
    """Losses [n] and the gradient of their weighted mean by the student's logits s [n, V].

    t: teacher logits or None; labels [n]; kl, ce [n] the weights of the two losses of each token.
    """
    dtype, s = s.dtype, s.float()
    log_p = s - s.logsumexp(-1, keepdim=True)
    p = log_p.exp()
    ce_loss = -log_p.gather(1, labels[:, None])[:, 0]
    words = torch.arange(s.shape[1], device=s.device)
    grad = ce[:, None] * (p - (words[None] == labels[:, None]).float())
    kl_loss = torch.zeros_like(ce_loss)
    if t is not None:
        t = t.float()
        log_q = t - t.logsumexp(-1, keepdim=True)
        q = log_q.exp()
        kl_loss = (q * (log_q - log_p)).sum(-1)
        grad = grad + kl[:, None] * (p - q)
    return kl_loss, ce_loss, (grad / count).to(dtype)


@cache
def _form(compiled: bool):
    return compile_block(_slice_loss, compiled)


class SlicedLoss(torch.autograd.Function):
    """kl * KL(teacher || student) + ce * next-token loss, mean over tokens."""

    @staticmethod
    def forward(ctx, h, embed, th, t_embed, labels, kl, ce, compiled):
        """Shapes: h, th [N, E]; embed, t_embed [V, E]; labels, kl, ce [N]; th None without teacher.

        Returns the loss, mean weighted KL, mean next-token loss; only the first has a gradient.
        """
        piece = _form(compiled)
        w = embed.to(h.dtype)
        dh, dw = torch.empty_like(h), torch.zeros_like(embed)
        total = torch.zeros(3, device=h.device)
        for a in range(0, len(h), SLICE):
            at = slice(a, a + SLICE)
            t = None if th is None else th[at] @ t_embed.T
            kl_loss, ce_loss, grad = piece(h[at] @ w.T, t, labels[at], kl[at], ce[at], len(h))
            kl_loss = kl[at] * kl_loss
            total += torch.stack([(kl_loss + ce[at] * ce_loss).sum(), kl_loss.sum(), ce_loss.sum()])
            dh[at] = grad @ w
            dw += grad.T @ h[at]
        ctx.save_for_backward(dh, dw)
        loss, kl_mean, ce_mean = (total / len(h)).unbind()
        ctx.mark_non_differentiable(kl_mean, ce_mean)
        return loss, kl_mean, ce_mean

    @staticmethod
    def backward(ctx, grad, *_):
        dh, dw = ctx.saved_tensors
        return dh * grad.to(dh.dtype), dw * grad, None, None, None, None, None, None


def distil_loss(h, embed, th, t_embed, labels, kl, ce, compiled=False):
    """(loss, mean KL, mean next-token loss) of hidden states [B, T, E]; see SlicedLoss.

    kl, ce [B, T]: weights of each token.
    """
    th = None if th is None else th.flatten(0, 1)
    return SlicedLoss.apply(
        h.flatten(0, 1), embed, th, t_embed, labels.flatten(), kl.flatten(), ce.flatten(), compiled
    )


@torch.no_grad()
def token_losses(h, embed, th, t_embed, labels) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Per token [N]: KL, next-token loss of student and of teacher, whether the student's first
    choice is the label. For evaluation."""
    h, th, labels, w = h.flatten(0, 1), th.flatten(0, 1), labels.flatten(), embed.to(h.dtype)
    out = []
    for a in range(0, len(h), SLICE):
        at = slice(a, a + SLICE)
        s, t, y = (h[at] @ w.T).float(), (th[at] @ t_embed.T).float(), labels[at, None]
        log_p, log_q = s.log_softmax(-1), t.log_softmax(-1)
        kl = (log_q.exp() * (log_q - log_p)).sum(-1)
        hit = s.argmax(-1) == y[:, 0]
        out.append((kl, -log_p.gather(1, y)[:, 0], -log_q.gather(1, y)[:, 0], hit))
    return tuple(torch.cat(x) for x in zip(*out, strict=True))
