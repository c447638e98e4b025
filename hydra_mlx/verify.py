"""Does the converted model still say what its source says? Reloads it from disk and measures."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx
import numpy as np

from .converter import Job, spec_layer
from .errors import CheckpointError
from .layouts import LAYER
from .loading import load_model, load_tokenizer
from .model import Model
from .tensors import to_float

TOKENS = {"quick": 128, "full": 1024}
WINDOW = 256
# Plain prose of several kinds; the same for every model, so that figures can be compared.
TEXT = """The harbour was quiet before dawn. Two boats had come in during the night, and their
crews were asleep below deck while the water moved slowly against the stones. A woman in a grey
coat walked along the wall, counted the lamps that were still burning, and wrote the number in a
small book. Nobody had asked her to do it; she had begun one winter and had never stopped.

To convert a temperature from Celsius to Fahrenheit, multiply it by nine, divide by five and add
thirty-two. Water freezes at 0 degrees Celsius, which is 32 degrees Fahrenheit, and boils at 100
degrees Celsius, which is 212 degrees Fahrenheit, at the pressure of the air at sea level.

def mean(values):
    total = 0.0
    for value in values:
        total += value
    return total / len(values)

The committee met on the third of March and again on the ninth. It agreed that the bridge should
be repaired before the road, because without the bridge the road leads nowhere. The cost was set
at 4,200 pounds, of which the town pays half. Three members wished to wait for the autumn; they
were outvoted, and their reasons were written down: the river is low in summer, stone is cheaper
after the harvest, and the mason who built the first bridge would be back by then.

Plants make sugar from carbon dioxide and water with the energy of light. The green pigment in
their leaves absorbs red and blue light and reflects green. At night they use some of the sugar
they have made, as animals do, and give off carbon dioxide. A forest therefore breathes in during
the day and out during the night, and over a year keeps a little more than it returns.
"""


@dataclass(frozen=True)
class Comparison:
    """How far a converted model is from its source on the same tokens.

    Attributes:
        tokens: Positions compared. max_logit_difference: Largest absolute one.
        kl: Mean KL(source || result) in nats per token. agreement: Share of positions with the
            same most likely token. perplexity_source, perplexity_result: On the fixed text, or
            None where the source has no tokenizer (random tokens have no meaningful one).
    """

    tokens: int
    max_logit_difference: float
    kl: float
    agreement: float
    perplexity_source: float | None
    perplexity_result: float | None

    def lines(self, quantised: bool) -> list:
        """The report in words."""
        out = [
            f"compared on {self.tokens} tokens: logits differ by at most "
            f"{self.max_logit_difference:.3g}, KL {self.kl:.3g} nats per token, "
            f"same top token {100 * self.agreement:.1f} %"
        ]
        if self.perplexity_source is not None and quantised:
            ratio = self.perplexity_result / self.perplexity_source
            out.append(
                f"perplexity {self.perplexity_source:.3f} -> {self.perplexity_result:.3f}, "
                f"ratio {ratio:.4f}"
            )
        return out


def source_model(job: Job) -> Model:
    """The source as a float32 model, unfused and unquantised where it is."""
    form = "fused" if job.source.form == "fused" else "spec"
    plain = replace(job, form=form, quant=None, dtype="float32", for_hf=True)
    model = Model(plain.args)
    weights = {n: job.source.get(n) for n in job.source.names("") if ".layers." not in n}
    for i in range(plain.args.num_hidden_layers):
        prefix = LAYER.format(i=i)
        weights.update({prefix + n: x for n, x in spec_layer(plain, i).items()})
    model.load_weights([(n, to_float(x)) for n, x in weights.items()], strict=True)
    model.eval()
    return model


def fixed_tokens(folder: Path, vocab: int, count: int) -> tuple:
    """Token windows [n, WINDOW] for the comparison, and whether they are real text."""
    try:
        ids = load_tokenizer(folder).encode(TEXT)
        real = len(ids) > 1 and max(ids) < vocab
    except CheckpointError:
        real = False
    if not real:
        ids = np.random.RandomState(0).randint(0, vocab, count).tolist()
    ids = ids[:count]
    width = min(WINDOW, len(ids))
    windows = [ids[s : s + width] for s in range(0, len(ids) - width + 1, width)]
    return mx.array(windows), real


def compare(job: Job, folder: Path, level: str, log: Callable[[str], None]) -> Comparison:
    """Compare a finished folder with its source.

    Args:
        level: "quick" (128 tokens) or "full" (up to 1024). log: Gets one line per step.

    Raises:
        CheckpointError: The result gives NaN or infinity.
    """
    log(f"verifying ({level}): reloading the result")
    result = load_model(folder)
    tokens, real = fixed_tokens(folder, job.args.vocab_size, TOKENS[level])
    source = source_model(job)
    worst = kl = same = nll_source = nll_result = 0.0
    for row in tokens:
        p = _log_probs(source, row)
        q = _log_probs(result, row)
        if not mx.isfinite(q).all().item():
            raise CheckpointError("The converted model gives NaN; nothing was written.")
        logit_gap = mx.abs((p - p.mean(-1, keepdims=True)) - (q - q.mean(-1, keepdims=True)))
        worst = max(worst, logit_gap.max().item())
        kl += (mx.exp(p) * (p - q)).sum().item()
        same += (p.argmax(-1) == q.argmax(-1)).sum().item()
        nll_source -= mx.take_along_axis(p[:-1], row[1:, None], -1).sum().item()
        nll_result -= mx.take_along_axis(q[:-1], row[1:, None], -1).sum().item()
    n = tokens.size
    predicted = n - tokens.shape[0]
    perplexity = [math.exp(x / predicted) if real else None for x in (nll_source, nll_result)]
    return Comparison(n, worst, max(kl / n, 0.0), same / n, *perplexity)


def _log_probs(model, row: mx.array) -> mx.array:
    logits = model(row[None])[0].astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)
