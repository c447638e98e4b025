"""A tokeniser for Metal source, just enough for the rewriter and the lint.

Positions are kept: every function here leaves the length and the line breaks of the text alone.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

ADDRESS_SPACES = frozenset({"device", "constant", "threadgroup", "thread"})
SCALAR_TYPES = frozenset(
    """bool char uchar short ushort int uint long ulong float half bfloat size_t ptrdiff_t
    int8_t int16_t int32_t int64_t uint8_t uint16_t uint32_t uint64_t float16_t
    bfloat16_t""".split()
)
VECTOR_TYPES = frozenset(
    f"{packed}{scalar}{n}"
    for packed in ("", "packed_")
    for scalar in "bool char uchar short ushort int uint long ulong float half bfloat".split()
    for n in (2, 3, 4)
)

_TOKEN = re.compile(
    r"""(?P<name>[A-Za-z_]\w*)
    | (?P<number>\.?\d(?:[eEpP][+-]|[\w.])*)
    | (?P<string>"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*')
    | (?P<mark>::|->|\[\[|\]\]|&&|\|\||<<=|>>=|[-+*/%&|^!=<>]=|\+\+|--|[^\s\w])""",
    re.VERBOSE,
)
_COMMENT = re.compile(r'"(?:\\.|[^"\\\n])*"|//[^\n]*|/\*.*?\*/', re.DOTALL)
_CLOSERS = {"(": ")", "[": "]", "{": "}", "<": ">"}


@dataclass(frozen=True)
class Token:
    """One token: kind is name, number, string or mark; start and end index the text."""

    kind: str
    text: str
    start: int
    end: int


def blank(text: str) -> str:
    """Spaces in place of everything but line breaks."""
    return re.sub(r"[^\n]", " ", text)


def blank_comments(text: str) -> str:
    """The text with comments turned into spaces; strings are left."""
    return _COMMENT.sub(lambda m: m[0] if m[0][0] == '"' else blank(m[0]), text)


def tokenize(text: str) -> list[Token]:
    """Tokens of a text whose comments are blanked. Brackets of `x[y[0]]` stay single ones."""
    found = []
    for m in _TOKEN.finditer(text):
        mark = m.group()
        # "[[" and "]]" are taken apart: attributes are removed before, nested indices are not.
        if mark in ("[[", "]]"):
            found += [Token("mark", mark[0], m.start() + i, m.start() + i + 1) for i in (0, 1)]
        else:
            found.append(Token(m.lastgroup, mark, m.start(), m.end()))
    return found


def closing(tokens: list[Token], i: int) -> int:
    """Index of the bracket that closes tokens[i], or len(tokens) when there is none.

    A `<` is closed by the first `>` outside round and square brackets; statement ends stop it.
    """
    opener = tokens[i].text
    closer = _CLOSERS[opener]
    while True:
        i += 1
        if i >= len(tokens):
            return i
        text = tokens[i].text
        if text == closer:
            return i
        if opener == "<" and text in (";", "{", "}", ")", "&&", "||"):
            return len(tokens)
        if text in "([{" or (opener == "<" and text == "<"):
            i = closing(tokens, i)


def template_types(tokens: list[Token]) -> set[str]:
    """Names declared as `typename X` or `class X`."""
    return {
        b.text
        for a, b in zip(tokens, tokens[1:], strict=False)
        if a.text in ("typename", "class") and b.kind == "name"
    }


def declared_types(tokens: list[Token]) -> set[str]:
    """Names of structs, enums, typedefs and `using X =` aliases declared in the text."""
    names = set()
    for i, token in enumerate(tokens[:-1]):
        after = tokens[i + 1]
        if token.text in ("struct", "enum", "union") and after.kind == "name":
            names.add(after.text)
        elif token.text == "using" and i + 2 < len(tokens) and tokens[i + 2].text == "=":
            names.add(after.text)
        elif token.text == "typedef":
            end = next((k for k in range(i, len(tokens)) if tokens[k].text == ";"), i)
            if tokens[end - 1].kind == "name":
                names.add(tokens[end - 1].text)
    return names
