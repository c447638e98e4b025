"""Rules of Metal, and of this project, that clang on a CPU does not check.

Address spaces, bfloat conversions and C++17 are left to the compiler (see toolchain.py). Here:
pointers without an address space, recursion, banned words, mutable or misplaced variables.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from .rewrite import plain_text, threadgroup_variables
from .tokens import (
    ADDRESS_SPACES,
    SCALAR_TYPES,
    VECTOR_TYPES,
    Token,
    blank,
    blank_comments,
    closing,
    declared_types,
    template_types,
    tokenize,
)


@dataclass(frozen=True)
class Finding:
    """One broken rule: part is "header" or "source"."""

    part: str
    line: int
    why: str
    text: str

    def __str__(self) -> str:
        return f"{self.part} line {self.line}: {self.why}: `{self.text}`"


_BANNED = (
    (r"\bdouble\b", "Metal has no double"),
    (r"\blong\s+long\b", "Metal has no long long; long has 64 bits"),
    (r"\b[u]?long[34]\b", "the host runtime cannot watch 32-byte vectors"),
    (
        r"\b(?:try|catch|throw|typeid|dynamic_cast|virtual|goto|thread_local|new|delete|noexcept"
        r"|co_await|co_yield|concept|requires|consteval|constinit|asm|friend|register)\b",
        "keyword unavailable in Metal",
    ),
    (r"\bstd\s*::", "std:: does not exist in Metal"),
    (r"#\s*include\b", "a kernel can include metal_* headers only"),
    (r"\bprintf\s*\(", "printf does not exist in Metal"),
    (r"\bassert\s*\(", "assert does not exist in Metal"),
    (r"\b__(?!METAL_VERSION__|METAL__)\w+", "compiler extension or CUDA construct"),
    (r"\b(?:address_space|mh)\b", "word of the host runtime"),
    (
        r"\bstatic\s+(?!constexpr\b|const\b|constant\b|inline\b|METAL_FUNC\b)\w+(?:\s+\w+)*\s*(?:=|;|\[)",
        "static variables must be constant",
    ),
    (r"(?<![\w.])\d+\.\d*[lL]\b", "long double literal"),
    (r"\bsimdgroup_matrix\s*<[^<>]*,\s*(?!8\b)\d+", "simdgroup_matrix is 8x8 only"),
    (r"\(\s*\*\s*\w+\s*\)\s*\(", "function pointer"),
    (r"(?:[=(,]|\breturn)\s*\[[^\[\]]*\]\s*[({]", "lambda"),
)
_NOT_TYPES = frozenset({"return", "case", "else", "sizeof", "operator", "auto", "in"})
_CONTROL = frozenset({"if", "for", "while", "switch", "return", "sizeof", "static_assert"})


def lint(source: str, header: str = "", template_names: tuple[str, ...] = ()) -> list[Finding]:
    """All findings for a kernel body and its header.

    Args:
        source: body of the kernel.
        header: text in front of it.
        template_names: names of the kernel's type template parameters.
    """
    found = []
    header_tokens = tokenize(plain_text(header))
    known = SCALAR_TYPES | VECTOR_TYPES | set(template_names) | declared_types(header_tokens)
    known |= {"vec", "simdgroup_matrix", "atomic", "atomic_int", "atomic_uint", "atomic_float"}
    for part, raw in (("header", header), ("source", source)):
        text = plain_text(raw)
        tokens = tokenize(text)
        types = known | declared_types(tokens) | template_types(tokens)
        for start, why, shown in (
            *_banned(text),
            *_bare_pointers(tokens, types),
            *_pointer_casts(tokens, text),
            *_vector_casts(tokens),
            *_initialised_threadgroup(tokens),
        ):
            found.append(Finding(part, text.count("\n", 0, start) + 1, why, shown))
    for start, why, shown in _program_scope(header_tokens):
        line = plain_text(header).count("\n", 0, start) + 1
        found.append(Finding("header", line, why, shown))
    for i, k in threadgroup_variables(header_tokens):
        line = plain_text(header).count("\n", 0, header_tokens[i].start) + 1
        shown = _shown(header_tokens[i:k])
        found.append(Finding("header", line, "threadgroup variables belong in the kernel", shown))
    for name in _recursive(header_tokens):
        found.append(Finding("header", 1, "recursion is not allowed", name))
    last = blank_comments(header).rstrip(" \t").rsplit("\n", 1)[-1]
    raw_last = header.rsplit("\n", 1)[-1]
    if last.lstrip().startswith("#") or "//" in raw_last:
        why = "MLX adds no line break after the header; end it with one"
        found.append(Finding("header", header.count("\n") + 1, why, raw_last.strip()))
    return found


def _shown(tokens: list[Token]) -> str:
    return " ".join(t.text for t in tokens)[:60]


def _banned(text: str) -> list[tuple[int, str, str]]:
    text = re.sub(r'"(?:\\.|[^"\\\n])*"', lambda m: blank(m[0]), text)
    return [
        (m.start(), why, " ".join(m[0].split())[:60])
        for pattern, why in _BANNED
        for m in re.finditer(pattern, text)
    ]


def _declaration_start(tokens: list[Token], i: int) -> int:
    """Index where the declaration holding tokens[i] starts, going back over its words."""
    while i > 0 and (
        tokens[i - 1].kind == "name"
        and tokens[i - 1].text not in _NOT_TYPES
        or tokens[i - 1].text == "::"
    ):
        i -= 1
    return i


def _bare_pointers(tokens: list[Token], types: set[str]) -> list[tuple[int, str, str]]:
    """`T* p`, `T& r` and `(T*)` whose T stands without device, constant, threadgroup or thread."""
    found = []
    for i, token in enumerate(tokens):
        if token.text not in ("*", "&") or i == 0 or i + 1 >= len(tokens):
            continue
        k = i - 1
        if tokens[k].text == "const":
            k -= 1
        if tokens[k].text == ">":  # template-id: go back to its name
            depth = 0
            while k >= 0:
                depth += {">": 1, "<": -1}.get(tokens[k].text, 0)
                if depth == 0 or tokens[k].text in (";", "{", "}"):
                    break
                k -= 1
            k -= 1
        if k < 0 or tokens[k].text not in types:
            continue
        after = tokens[i + 1]
        if after.kind == "number" or after.text in ("(", "-", "+", "!", "~"):
            continue
        first = _declaration_start(tokens, k)
        # The space may also stand between type and star: `float device *p`.
        if any(t.text in ADDRESS_SPACES for t in tokens[first:i]):
            continue
        shown = _shown(tokens[first : i + 2])
        found.append((tokens[first].start, "pointer or reference without an address space", shown))
    return found


def _pointer_casts(tokens: list[Token], text: str) -> list[tuple[int, str, str]]:
    """`(device T*)p`: clang lets it change the address space, unlike reinterpret_cast."""
    found = []
    for i, token in enumerate(tokens):
        if token.text != "(" or (i and tokens[i - 1].kind == "name"):
            continue
        end = closing(tokens, i)
        inside = tokens[i + 1 : end]
        if not inside or end + 1 >= len(tokens) or inside[-1].text != "*":
            continue
        if any(t.text in ADDRESS_SPACES for t in inside):
            shown = text[token.start : tokens[end].end]
            found.append((token.start, "C-style pointer cast; use reinterpret_cast", shown))
    return found


def _vector_casts(tokens: list[Token]) -> list[tuple[int, str, str]]:
    """`(float4)v` converts in Metal and may reinterpret bits here: write float4(v)."""
    found = []
    for i, token in enumerate(tokens[:-3]):
        if token.text != "(" or (i and tokens[i - 1].kind == "name"):
            continue
        end = closing(tokens, i)
        inside = [t.text for t in tokens[i + 1 : end]]
        is_vector = inside and (inside[0] in VECTOR_TYPES and len(inside) == 1)
        is_vec = len(inside) > 3 and inside[0] == "vec" and inside[-1] == ">"
        if (is_vector or is_vec) and end + 1 < len(tokens):
            after = tokens[end + 1]
            if after.kind in ("name", "number") or after.text == "(":
                found.append((token.start, "C-style vector cast; write T(x)", "".join(inside)))
    return found


def _initialised_threadgroup(tokens: list[Token]) -> list[tuple[int, str, str]]:
    return [
        (tokens[i].start, "threadgroup variables take no initialiser", _shown(tokens[i : k + 2]))
        for i, k in threadgroup_variables(tokens)
        if tokens[k].text != ";"
    ]


def _program_scope(tokens: list[Token]) -> list[tuple[int, str, str]]:
    """Variables outside functions that are not in the constant address space."""
    found = []
    i = first = 0
    while i < len(tokens):
        text = tokens[i].text
        if text == "#":  # a directive: skip its line as far as tokens can tell
            first = i + 1
        if text in ("{", "(", "["):
            # Bodies of functions and structs, and brackets, are skipped whole.
            end = closing(tokens, i)
            if text == "{":
                words = {t.text for t in tokens[first:i]}
                if "namespace" in words:
                    first = i = i + 1
                    continue
                if "=" not in words:
                    first = end + 1
            i = end
        elif text in (";", "}"):
            words = [t.text for t in tokens[first:i]]
            head = set(words[: words.index("=")] if "=" in words else words)
            declares = "=" in words or "[" in words
            skip = {"constant", "typedef", "using", "template", "struct", "enum", "static_assert"}
            if declares and not head & (skip | {"define", "operator"}):
                why = "program-scope variable not in the constant address space"
                found.append((tokens[first].start, why, _shown(tokens[first:i])))
            first = i + 1
        i += 1
    return found


def _recursive(tokens: list[Token]) -> list[str]:
    """Functions of the text that can call themselves, directly or through others."""
    calls: dict[str, set[str]] = {}
    for i, token in enumerate(tokens[:-1]):
        if token.kind != "name" or token.text in _CONTROL or tokens[i + 1].text != "(":
            continue
        end = closing(tokens, i + 1)
        while end + 1 < len(tokens) and tokens[end + 1].text in ("const", "thread", "device"):
            end += 1
        if end + 1 >= len(tokens) or tokens[end + 1].text != "{":
            continue
        body = tokens[end + 1 : closing(tokens, end + 1)]
        called = {
            a.text
            for a, b in zip(body, body[1:], strict=False)
            if a.kind == "name" and b.text in ("(", "<")
        }
        calls.setdefault(token.text, set()).update(called)

    def reaches(start: str) -> bool:
        seen, queue = set(), list(calls[start])
        while queue:
            name = queue.pop()
            if name == start:
                return True
            if name in calls and name not in seen:
                seen.add(name)
                queue += calls[name]
        return False

    return sorted(name for name in calls if reaches(name))
