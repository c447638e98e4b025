"""One training step of each stage: loss and gradient, then the optimizer; compiled where it can be.

Weights live in a flat dict {name: float32 array} outside the model. The model is a template that a
step fills with them, cast to the type of the arithmetic, so both functions are pure and compile.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import mlx.core as mx
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from ..loading import DTYPES
from ..model import Model
from ..protected import FLOAT32_NAMES
from .losses import attention_error, hidden_states, output_matrix, teacher_layer, training_loss

STAGES = ("align", "distil", "long")


@dataclass(frozen=True)
class Recipe:
    """What decides the course of a stage; equal recipes continue each other exactly.

    Attributes:
        stage: One of STAGES. steps: Optimizer steps. length: T. batch: Sequences in a step.
        accumulate: Parts a batch is cut into, each with a gradient of its own; they are summed.
        lr: Peak learning rate. warmup: Steps up to it. lr_end: Last rate over the peak.
        clip: Largest gradient norm. seed: Of the order of the text. kl, ce: Weights of the two
            losses (distil and long). dtype: Of the arithmetic; weights stay float32.
        logit_scale: Whether the log-length scale is on while training. chunk: Positions whose
            logits exist at a time.
    """

    stage: str
    steps: int
    length: int
    batch: int
    accumulate: int
    lr: float
    warmup: int
    lr_end: float
    clip: float
    seed: int
    kl: float
    ce: float
    dtype: str
    logit_scale: bool
    chunk: int

    @property
    def tokens_per_step(self) -> int:
        """Tokens an optimizer step sees."""
        return self.batch * self.length


def learning_rate(recipe: Recipe) -> Callable:
    """Warm-up in a straight line, then a half cosine to lr * lr_end; step (from 0) -> rate."""
    rest = max(recipe.steps - recipe.warmup, 1)

    def at(step):
        warm = (step + 1) / max(recipe.warmup, 1)
        done = mx.clip((step - recipe.warmup) / rest, 0.0, 1.0)
        cosine = recipe.lr_end + (1 - recipe.lr_end) * 0.5 * (1 + mx.cos(math.pi * done))
        return recipe.lr * mx.where(step < recipe.warmup, warm, cosine)

    return at


def trained(recipe: Recipe, weights: dict) -> dict:
    """The weights a stage changes: attention only in align, everything after."""
    if recipe.stage != "align":
        return dict(weights)
    return {n: x for n, x in weights.items() if ".self_attn." in n}


def cast_weights(weights: dict, dtype: mx.Dtype) -> dict:
    """The weights in the type of the arithmetic; what must stay float32 does."""
    keep = {n for n in weights if n.rsplit(".", 1)[-1] in FLOAT32_NAMES}
    return {n: x if n in keep else x.astype(dtype) for n, x in weights.items()}


class Trainer:
    """The state of a stage in memory: weights, optimizer, and the functions that move them.

    Attributes:
        weights: {name: float32} that this stage trains. step: Optimizer steps done.

    Args:
        args: The student's config (its log-length scale stays on outside training).
        weights: {name: float32 array}, all of the student's. teacher: Or None for next tokens.
        checkpoint: Compute each layer again in the backward pass. compiled: Use mx.compile.
    """

    def __init__(
        self,
        recipe: Recipe,
        args,
        weights: dict,
        teacher: Model | None,
        checkpoint: bool = False,
        compiled: bool = True,
    ):
        self.recipe, self.teacher, self.checkpoint = recipe, teacher, checkpoint
        scale = args.fa_logit_scale if recipe.logit_scale else None
        self.model = Model(replace(args, fa_logit_scale=scale))
        # Gradients have no kernels: train() is the word for that, and for mlx's own layers.
        self.model.train()
        self.dtype = DTYPES[recipe.dtype]
        self.weights = trained(recipe, weights)
        frozen = cast_weights(
            {n: x for n, x in weights.items() if n not in self.weights}, self.dtype
        )
        self._fill(frozen)
        self.optimizer = optim.AdamW(
            learning_rate(recipe), betas=[0.9, 0.95], weight_decay=0.0, bias_correction=True
        )
        self.optimizer.init(self.weights)
        mx.eval(self.weights, frozen, self.optimizer.state)
        gradient = self._align if recipe.stage == "align" else self._predict
        state = [self.optimizer.state]
        self.gradient, self.update = gradient, self._update
        if compiled:
            self.gradient = mx.compile(gradient)
            self.update = mx.compile(self._update, inputs=state, outputs=state)

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.optimizer.step.item()

    def _fill(self, weights: dict):
        self.model.update(tree_unflatten(list(weights.items())))

    def _align(self, weights: dict, tokens: mx.array) -> tuple:
        """Sum over layers of the attention's MSE. Layers share nothing but the teacher's pass, so
        each has a gradient of its own, made before the next layer begins."""
        total, power, grads = mx.zeros(()), mx.zeros(()), {}
        h = self.teacher.model.embed_tokens(tokens[:, :-1])
        for i, layer in enumerate(self.teacher.layers):
            target, after = teacher_layer(layer, h)
            prefix = f"model.layers.{i}."
            own = {n: x for n, x in weights.items() if n.startswith(prefix)}

            def error(own, layer=self.model.layers[i], h=h, target=target):
                self._fill(cast_weights(own, self.dtype))
                return attention_error(layer, h, target)

            one, grad = mx.value_and_grad(error)(own)
            total, grads = total + one, {**grads, **grad}
            # MLX would keep several layers under way, and their activations.
            h = mx.depends([after], list(grad.values()))[0]
            power = power + mx.square(target.astype(mx.float32)).mean()
        return {"loss": total, "relative": total / power}, grads

    def _predict(self, weights: dict, tokens: mx.array) -> tuple:
        """KL to the teacher and cross-entropy, weighted, in nats per token."""
        recipe, teacher = self.recipe, self.teacher if self.recipe.kl else None
        inputs, targets = tokens[:, :-1], tokens[:, 1:].flatten()
        learned = None
        if teacher is not None:
            learned = hidden_states(teacher, inputs).flatten(0, 1), output_matrix(teacher)

        def loss(weights):
            self._fill(cast_weights(weights, self.dtype))
            h = hidden_states(self.model, inputs, self.checkpoint).flatten(0, 1)
            w, shares = output_matrix(self.model), (recipe.kl, recipe.ce)
            return training_loss(h, w, targets, learned, shares, recipe.chunk)

        (total, kl, ce), grads = mx.value_and_grad(loss)(weights)
        losses = {"loss": total, "ce": ce}
        return (losses if teacher is None else {**losses, "kl": kl}), grads

    def _update(self, weights: dict, grads: dict) -> tuple:
        grads, norm = optim.clip_grad_norm(grads, self.recipe.clip)
        return self.optimizer.apply_gradients(grads, weights), norm

    def advance(self, tokens: mx.array) -> dict:
        """One optimizer step, not waited for.

        Args:
            tokens: [batch, T + 1].

        Returns:
            {"loss", "grad_norm", ...}: scalar arrays.
        """
        parts = mx.split(tokens, self.recipe.accumulate)
        losses, grads = self.gradient(self.weights, parts[0])
        for part in parts[1:]:
            mx.eval(losses, grads)
            more, grad = self.gradient(self.weights, part)
            losses, grads = tree_map(mx.add, losses, more), tree_map(mx.add, grads, grad)
        if len(parts) > 1:
            losses, grads = tree_map(lambda x: x / len(parts), (losses, grads))
        self.weights, norm = self.update(self.weights, grads)
        losses["grad_norm"] = norm
        mx.async_eval(self.weights, self.optimizer.state, losses)
        return losses

    def arrays(self) -> dict:
        """Everything a later process needs to go on, {name: array}; see restore."""
        out = {f"w:{n}": x for n, x in self.weights.items()}
        for n in self.weights:
            out.update({f"{k}:{n}": x for k, x in self.optimizer.state[n].items()})
        return out

    def restore(self, arrays: dict, step: int):
        """Go back to what `arrays` gave after `step` steps."""
        for name in self.weights:
            self.weights[name] = arrays[f"w:{name}"]
            for k in ("m", "v"):
                self.optimizer.state[name][k] = arrays[f"{k}:{name}"]
        self.optimizer.state["step"] = mx.array(step, mx.uint64)
        mx.eval(self.weights, self.optimizer.state)


def parameter_count(weights: dict) -> int:
    """Numbers in a dict of arrays."""
    return sum(x.size for _, x in tree_flatten(weights))
