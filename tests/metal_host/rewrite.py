"""Source rewriting: the few Metal constructs that clang on a CPU has no words for.

1. `threadgroup float s[8];` in a function becomes a static variable in the section of the
   threadgroup memory. 2. `float4(...)`, `vec<T, 4>(...)` and `T(...)` become mh::make<...>(...),
   because clang would read them as bit casts or refuse them. 3. Attributes, comments and
   `#include <metal_...>` go. Lines stay where they are, columns of calls may shift.
"""

from __future__ import annotations

import functools
import re

from .tokens import (
    VECTOR_TYPES,
    Token,
    blank,
    blank_comments,
    closing,
    declared_types,
    template_types,
    tokenize,
)

_ATTRIBUTE = re.compile(r"\[\[[^\[\]]*\]\]")
_INCLUDE = re.compile(r"^[ \t]*#[ \t]*include[ \t]*<metal_\w+>[^\n]*", re.MULTILINE)
_STATEMENT_START = frozenset({";", "{", "}", ")", ":"})


def plain_text(source: str) -> str:
    """The source without comments, attributes and includes of Metal headers; same lines."""
    text = blank_comments(source)
    text = _ATTRIBUTE.sub(lambda m: blank(m[0]), text)
    return _INCLUDE.sub(lambda m: blank(m[0]), text)


def threadgroup_variables(tokens: list[Token]) -> list[tuple[int, int]]:
    """(first, last) token indices of declarations of threadgroup variables, not of pointers.

    The last token is the semicolon, or what stands there instead (`=` of an initialiser).
    """
    found = []
    for i, token in enumerate(tokens):
        before = tokens[i - 1].text if i else ";"
        if token.text != "threadgroup" or before not in _STATEMENT_START:
            continue
        k, pointer = i + 1, False
        while k < len(tokens) and tokens[k].text not in (";", "=", "{"):
            if tokens[k].text in ("*", "&", "("):
                pointer = pointer or tokens[k - 1].text != "alignas"
            if tokens[k].text in ("(", "[") or (
                tokens[k].text == "<" and tokens[k - 1].kind == "name"
            ):
                k = min(closing(tokens, k), len(tokens) - 1)
            k += 1
        if not pointer and k < len(tokens):
            found.append((i, k))
    return found


def _top_commas(tokens: list[Token], i: int, k: int) -> list[int]:
    """Indices of the commas between declarators in tokens[i:k]."""
    found = []
    while i < k:
        if tokens[i].text in ("(", "[") or (tokens[i].text == "<" and tokens[i - 1].kind == "name"):
            i = closing(tokens, i)
        elif tokens[i].text == ",":
            found.append(i)
        i += 1
    return found


def _constructor_starts(tokens: list[Token], names: frozenset[str]) -> list[tuple[int, int]]:
    """(first, last) token indices of the type in `type(`, for the given names and vec<...>."""
    found = []
    for i, token in enumerate(tokens):
        before = tokens[i - 1].text if i else ""
        first = i
        if before == "::" and i > 1 and tokens[i - 2].text == "metal":
            first = i - 2
        last = i
        if token.text in ("vec", "simdgroup_matrix") and i + 1 < len(tokens):
            if tokens[i + 1].text != "<" or token.text != "vec":
                continue
            last = closing(tokens, i + 1)
        elif token.text not in names or before in ("operator", "~", "typename", "struct"):
            continue
        if last + 2 >= len(tokens) or tokens[last + 1].text != "(":
            continue
        # `T (&name)[4]` declares a reference to an array.
        if tokens[last + 2].text in ("&", "*") and tokens[last + 3].kind == "name":
            if tokens[last + 4].text == ")":
                continue
        found.append((first, last))
    return found


@functools.lru_cache(maxsize=256)
def rewrite(source: str, type_names: frozenset[str] = frozenset()) -> str:
    """The source as clang can read it.

    Args:
        source: Metal text, a kernel body or a header.
        type_names: names that stand for types here though the text does not declare them
            (template parameters of the kernel, aliases of the header).
    """
    text = plain_text(source)
    tokens = tokenize(text)
    names = VECTOR_TYPES | type_names | template_types(tokens) | alias_types(tokens)
    edits = []
    for i, k in threadgroup_variables(tokens):
        if tokens[k].text != ";":  # an initialiser, which clang refuses in a local variable
            continue
        # Empty braces, because clang finds no constructor for structs in an address space.
        edits.append((tokens[i].start, 0, "MH_THREADGROUP "))
        edits += [(tokens[c].start, 0, " = {}") for c in (*_top_commas(tokens, i, k), k)]
    for first, last in _constructor_starts(tokens, frozenset(names)):
        start, end = tokens[first].start, tokens[last].end
        edits.append((start, end - start, f"mh::make<{text[start:end]}>"))
    # From the end, so that positions stay right; type names never hold one another.
    for start, length, new in sorted(edits, reverse=True):
        text = text[:start] + new + text[start + length :]
    return text


def alias_types(tokens: list[Token]) -> set[str]:
    """Names of typedef and using aliases: they may stand for vectors, so they are rewritten."""
    structs = {
        b.text
        for a, b in zip(tokens, tokens[1:], strict=False)
        if a.text in ("struct", "enum", "union")
    }
    return declared_types(tokens) - structs


@functools.lru_cache(maxsize=256)
def header_types(header: str) -> frozenset[str]:
    """Type aliases that a header declares and a body may use as constructors."""
    return frozenset(alias_types(tokenize(plain_text(header))))
