"""Needle in a haystack: the grid of texts, the replies, and how many are right."""

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .text import count


@dataclass(frozen=True)
class NeedleSettings:
    """What decides the texts.

    Attributes:
        lengths: Tokens of a text, answer included. depths: 0 is the beginning, 1 the end.
        keys: Facts in a text. trials: Texts of each kind. digits: Of an answer. seed: Of all.
        chat: Put the text into the tokenizer's chat template.
    """

    lengths: tuple = (1024, 2048, 4096)
    depths: tuple = (0.0, 0.25, 0.5, 0.75, 1.0)
    keys: tuple = (1,)
    trials: int = 1
    digits: int = 7
    seed: int = 0
    chat: bool = False

    @property
    def cells(self) -> list:
        """(keys, length, depth) of every cell."""
        return [(k, n, d) for k in self.keys for n in self.lengths for d in self.depths]


def is_right(reply: str, answer: str) -> bool:
    """Whether the first number in a reply is the answer."""
    found = re.search(r"\d+", reply)
    return found is not None and found.group() == answer


def ask(model: Any, tokenizer: Any, body: str, digits: int, chat: bool) -> str:
    """The greedy reply to a text that ends with the beginning of its answer."""
    from .generation import generate

    if not chat:
        ids = tokenizer.encode(body)
    else:
        content, lead = body.rsplit("\nAnswer: ", 1)
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        ids = tokenizer.encode(text + lead, add_special_tokens=False)
    # Room for a blank or a word before the number, and to see that it ends.
    room = len(tokenizer.encode(" " + "7" * digits, add_special_tokens=False)) + 8
    return generate(model, tokenizer, ids, room)


def evaluate(
    model: Any,
    tokenizer: Any,
    settings: NeedleSettings,
    source: Sequence | None = None,
    kept: Any = None,
    progress: Callable = lambda label, done, total: None,
    reply: Callable | None = None,
) -> list:
    """Ask every text of the grid.

    Args:
        model, tokenizer: From hydra_mlx.load. source: Haystack sentences, or None for made ones.
        kept: A Journal, or None. progress: (label, done, total).
        reply: Called with a probes.Needle instead of asking `model`; gives the text of the reply.

    Returns:
        For each cell {"keys", "length", "depth", "tokens": of the first prompt, "trials",
        "right", "wrong": [[expected, reply], ...]}.

    Raises:
        UsageError: A length is too short for the question.
    """
    from .probes import make_needle

    values = {} if kept is None else kept.values
    total, done, out = len(settings.cells) * settings.trials, 0, []
    for keys, length, depth in settings.cells:
        cell = {"keys": keys, "length": length, "depth": depth, "tokens": 0}
        cell.update(trials=settings.trials, right=0, wrong=[])
        for trial in range(settings.trials):
            name = f"{keys}/{length}/{depth}/{trial}"
            if name not in values:
                progress(f"{length} tokens", done, total)
                rng = random.Random(f"{settings.seed}/needle/{name}")
                needle = make_needle(tokenizer, rng, length, depth, keys, settings.digits, source)
                if reply is None:
                    text = ask(model, tokenizer, needle.body, settings.digits, settings.chat)
                else:
                    text = reply(needle)
                value = [needle.answer, text, needle.tokens]
                values[name] = value
                if kept is not None:
                    kept.add(name, value)
            answer, text, tokens = values[name]
            cell["tokens"] = cell["tokens"] or tokens
            if is_right(text, answer):
                cell["right"] += 1
            else:
                cell["wrong"].append([answer, text])
            done += 1
        out.append(cell)
    progress("done", done, total)
    return out


def accuracy(cells: list, keys: int, length: int) -> float:
    """Share of right answers over all depths."""
    found = [c for c in cells if (c["keys"], c["length"]) == (keys, length)]
    return sum(c["right"] for c in found) / sum(c["trials"] for c in found)


def table(cells: list, settings: NeedleSettings, keys: int) -> str:
    """Right answers by depth (rows) and length (columns), and the share below."""
    at = {(c["length"], c["depth"]): c for c in cells if c["keys"] == keys}
    width = max(8, *(len(str(n)) + 1 for n in settings.lengths))
    lines = [f"{count(keys, 'key')}: right answers by depth and length in tokens"]
    lines += ["depth".ljust(7) + "".join(f"{n:>{width}}" for n in settings.lengths)]
    for d in settings.depths:
        row = [at[n, d] for n in settings.lengths]
        lines.append(
            f"{d:<7.2f}" + "".join(f"{c['right']}/{c['trials']}".rjust(width) for c in row)
        )
    shares = [f"{100 * accuracy(cells, keys, n):.0f} %" for n in settings.lengths]
    return "\n".join([*lines, "all".ljust(7) + "".join(s.rjust(width) for s in shares)])
