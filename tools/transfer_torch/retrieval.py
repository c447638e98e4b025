"""Retrieval tasks of any length as token ids: needles, lists of keys, passages to repeat.

Text is made anew for every seed, so training never sees a task twice and evaluation uses seeds
of its own. Filler comes from documents the caller gives.
"""

import re
from collections.abc import Callable

import numpy as np

KINDS = ("single", "multi", "list", "repeat")
START, END = "<|im_start|>", "<|im_end|>"
FACTS = (
    "One of the special magic numbers for {k} is: {v}.",
    "The special magic number for {k} is {v}.",
    "Remember this: the access code of {k} is {v}.",
    "Note that the secret code for {k} is {v}.",
    "{k} has the registration number {v}.",
    "The password that opens {k} is {v}.",
    "In the register {k} is listed as {v}.",
    "{v} is the phone number of {k}.",
)
QUESTIONS = (
    ("What is the special magic number for {k} mentioned in the text?",
     "The special magic number for {k} mentioned in the text is"),
    ("What is the special magic number for {k}?", "The special magic number for {k} is"),
    ("What is the access code of {k}?", "The access code of {k} is"),
    ("Which secret code belongs to {k}?", "The secret code for {k} is"),
    ("What is the registration number of {k}?", "The registration number of {k} is"),
    ("Which password opens {k}?", "The password that opens {k} is"),
    ("As what is {k} listed in the register?", "In the register {k} is listed as"),
    ("What is the phone number of {k}?", "The phone number of {k} is"),
)  # fmt: skip
OPENINGS = (
    "Read the following text and answer the question at the end.\n\n",
    "Some facts are hidden in the text below. I will ask you about one of them.\n\n",
    "",
)


class Tasks:
    """Makes tasks with one tokenizer and one supply of filler.

    Args:
        encode: Text to ids, without special tokens added; <|im_start|> and <|im_end|> are known.
        words: Lower-case words to name things with.
        fill: (rng, n) to n ids of running text.
    """

    def __init__(self, encode: Callable, words: list[str], fill: Callable):
        self.encode, self.words, self.fill = encode, words, fill

    def make(self, rng, length: int, kind: str = "", chat: bool | None = None):
        """ids [n] and a mask [n] of the answer's ids; n <= length, usually close to it."""
        kind = kind or KINDS[rng.choice(4, p=[0.4, 0.3, 0.2, 0.1])]
        chat = rng.random() < 0.75 if chat is None else chat
        if kind == "repeat":
            return self._repeat(rng, length, chat)
        form = int(rng.integers(len(FACTS)))
        count = {"single": 1, "multi": int(rng.integers(2, 9)), "list": 0}[kind]
        if kind == "list":
            count = int(rng.integers(4, max(5, min(60, length // 24))))
        keys = self._keys(rng, count)
        values = [self._value(rng) for _ in keys]
        asked = int(rng.integers(count))
        if kind == "list":
            sep = (": ", " = ", " -> ")[rng.integers(3)]
            lines = "".join(f"{k}{sep}{v}\n" for k, v in zip(keys, values, strict=True))
            facts, question = ["\n" + lines], f"What is the value of {keys[asked]}?"
            answer = f"The value of {keys[asked]} is"
        else:
            facts = [FACTS[form].format(k=k, v=v) for k, v in zip(keys, values, strict=True)]
            question, answer = (q.format(k=keys[asked]) for q in QUESTIONS[form])
        head, tail = self._frame(rng, question, chat)
        facts.insert(0, facts.pop(asked if kind == "multi" else 0))
        return self._assemble(rng, length, head, facts, tail + answer, f" {values[asked]}.", chat)

    def _keys(self, rng, count):
        picks = rng.choice(len(self.words), (count, 2))
        two = rng.random() < 0.5
        names = [f"{self.words[a]}-{self.words[b]}" if two else self.words[a] for a, b in picks]
        return list(dict.fromkeys(names)) + [f"item-{i}" for i in range(count - len(set(names)))]

    def _value(self, rng):
        if rng.random() < 0.8:
            return str(rng.integers(10 ** (n := int(rng.integers(3, 7))), 10 ** (n + 1)))
        return " ".join(self.words[i] for i in rng.choice(len(self.words), 2))

    def _frame(self, rng, question, chat):
        opening = OPENINGS[rng.integers(len(OPENINGS))]
        if chat:
            return f"{START}user\n{opening}", f"\n\n{question}{END}\n{START}assistant\n"
        return opening, f"\n\nQuestion: {question}\nAnswer: "

    def _assemble(self, rng, length, head, facts, tail, value, chat):
        head, tail = self.encode(head), self.encode(tail)
        facts = [self.encode(f" {f}" if not f.startswith("\n") else f) for f in facts]
        value = self.encode(value)
        end = self.encode(END + "\n") if chat else [0]
        fixed = len(head) + len(tail) + len(value) + len(end)
        while len(facts) > 1 and fixed + sum(map(len, facts)) > length:
            facts.pop()  # the first is the one that is asked for
        room = max(0, length - fixed - sum(map(len, facts)))
        filler = self.fill(rng, room) if room else np.zeros(0, np.int64)
        cuts = np.sort(rng.integers(0, room + 1, len(facts)))
        body, at = [], 0
        for cut, fact in zip(cuts, (facts[i] for i in rng.permutation(len(facts))), strict=True):
            body += [filler[at:cut], fact]
            at = cut
        ids = np.concatenate([head, *body, filler[at:], tail, value, end]).astype(np.int64)
        answer = np.zeros(len(ids), np.uint8)
        answer[len(ids) - len(end) - len(value) : len(ids) - len(end)] = 1
        return ids[:length], answer[:length]

    def _repeat(self, rng, length, chat):
        n = int(min(length // 4, rng.integers(16, 97)))
        passage = self.fill(rng, n)
        head, tail = self._frame(rng, "Repeat the passage between the lines of dashes.", chat)
        mark = self.encode("\n----------\n")
        head, tail = self.encode(head), self.encode(tail)
        end = self.encode("\n" + END + "\n") if chat else [0]
        room = max(0, length - len(head) - len(tail) - len(end) - 2 * (n + len(mark)))
        filler = self.fill(rng, room) if room else np.zeros(0, np.int64)
        cut = int(rng.integers(0, room + 1))
        parts = [head, filler[:cut], mark, passage, mark, filler[cut:], tail, passage, end]
        ids = np.concatenate(parts).astype(np.int64)
        answer = np.zeros(len(ids), np.uint8)
        answer[len(ids) - len(end) - n : len(ids) - len(end)] = 1
        return ids[:length], answer[:length]


def words_of(vocabulary: dict[str, int]) -> list[str]:
    """Lower-case words of 4 to 10 letters that are one id after a blank, in a fixed order."""
    found = (t[1:] for t in vocabulary if re.fullmatch("\u0120[a-z]{4,10}", t))
    return sorted(found)
