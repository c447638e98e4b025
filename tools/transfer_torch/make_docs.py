"""Long documents from unpacked Debian documentation packages, as packed token ids.

usage: python -m tools.transfer_torch.make_docs BASE.gguf UNPACKED OUT

UNPACKED holds one folder for each package, as `dpkg-deb -x PACKAGE.deb UNPACKED/PACKAGE` makes it.
Writes OUT/{long,heldout}.tokens.npy (uint16, each document begins with <|endoftext|>), the
lengths beside them and OUT/sources.json with tokens per package. Paragraphs seen before are
dropped, so menus and repeated pages vanish. Documents of the HELD_OUT packages, and one in 25 of
the others, are kept for evaluation. Needs hydra_mlx and its tokenizer.
"""

import argparse
import gzip
import hashlib
import html.parser
import json
import re
from pathlib import Path

import numpy as np

# {package: (licence as its copyright file states it, files of one language, most characters)}
PACKAGES = {
    "apache2-doc": ("Apache-2.0", "**/manual/en/**/*.html", 3e6),
    "bind9-doc": ("MPL-2.0 and ISC", "**/*.html", 2e6),
    "debian-faq": ("its own: copies and changes under the same terms", "**/*.en.html", 2e6),
    "debian-handbook": ("GPL-2+ or CC-BY-SA-3.0", "**/en-US/*.html", 4e6),
    "debian-policy": ("GPL-2+", "**/*.html", 2e6),
    "debian-reference-en": ("GPL-2+", "**/*.html", 3e6),
    "developers-reference": ("GPL-2", "**/*.html", 2e6),
    "exim4-doc-html": ("GPL-2+", "**/*.html", 3e6),
    "ghc-doc": ("BSD-3-Clause", "**/users_guide/**/*.html", 2e6),
    "git-doc": ("GPL-2", "**/*.html", 3e6),
    "installation-guide-amd64": ("GPL-2", "**/en/**/*.html", 1e6),
    "krb5-doc": ("MIT and BSD", "**/*.html", 2e6),
    "linux-doc-6.1": ("GPL-2", "**/html/**/*.html", 6e6),
    "llvm-14-doc": ("Apache-2.0 with LLVM exception", "**/html/**/*.html", 3e6),
    "perl-doc": ("GPL-1+ or Artistic", "**/*.pod", 6e6),
    "postfix-doc": ("EPL-2.0 or IPL-1.0", "**/*.html", 2e6),
    "postgresql-doc-15": ("PostgreSQL", "**/*.html", 6e6),
    "python-django-doc": ("BSD-3-Clause", "**/html/**/*.html", 3e6),
    "python-pandas-doc": ("BSD-3-Clause", "**/user_guide/*.html", 2e6),
    "python-sqlalchemy-doc": ("MIT", "**/*.html", 3e6),
    "python3.11-doc": ("PSF-2.0", "**/html/**/*.html", 6e6),
    "racket-doc": ("LGPL-2.1+", "**/*.html", 3e6),
    "rust-doc": ("MIT or Apache-2.0", "**/html/{book,reference,nomicon}/**/*.html", 3e6),
    "sqlite3-doc": ("public domain", "**/*.html", 4e6),
}  # fmt: skip
HELD_OUT = ("debian-faq", "developers-reference", "krb5-doc")
SKIPPED = ("genindex", "search.html", "py-modindex", "translations", "print.html", "_modules")
BLOCKS = set("p li h1 h2 h3 h4 h5 h6 dt dd td th pre div tr table section blockquote br".split())
SILENT = set("script style nav header footer head".split())
LEAST_CHARS = 1500


class Text(html.parser.HTMLParser):
    """Collects paragraphs; inside <pre> line breaks stay."""

    def __init__(self):
        super().__init__()
        self.parts, self.silent, self.pre = [], 0, 0

    def handle_starttag(self, tag, attrs):
        self.silent += tag in SILENT
        self.pre += tag == "pre"
        if tag in BLOCKS and not self.pre:
            self.parts.append("\n\n")
        elif tag in BLOCKS and tag != "br":
            self.parts.append("\n\n" if tag == "pre" else "")

    def handle_endtag(self, tag):
        self.silent = max(0, self.silent - (tag in SILENT))
        self.pre = max(0, self.pre - (tag == "pre"))
        if tag in BLOCKS and not self.pre:
            self.parts.append("\n\n")

    def handle_data(self, data):
        if not self.silent:
            self.parts.append(data if self.pre else re.sub(r"\s+", " ", data))


def to_text(name: str, raw: str) -> str:
    """Plain text of one file by its kind."""
    if ".html" in name:
        parser = Text()
        parser.feed(raw)
        return "".join(parser.parts).replace("\u00b6", "")
    if name.endswith(".pod"):
        for _ in range(3):  # nested marks
            raw = re.sub(r"[A-Z]<+ ?([^<>]*?) ?>+", r"\1", raw)
        return re.sub(r"^=(?:head\d|item) ?|^=\w+.*$", "", raw, flags=re.M)
    return raw


def paragraphs(text: str, seen: set[bytes]) -> list[str]:
    """The paragraphs not seen before, in order."""
    out = []
    for p in re.split(r"\n\s*\n", text):
        p = p.strip("\n ").replace("\r", "")
        if not p:
            continue
        digest = hashlib.blake2b(" ".join(p.split()).encode(), digest_size=8).digest()
        if digest in seen and len(p) > 12:
            continue
        seen.add(digest)
        out.append(p)
    return out


def files_of(root: Path, pattern: str) -> list[Path]:
    """Files of a package by a pattern that may hold one {a,b} choice, in a fixed shuffled order."""
    choice = re.search(r"\{(.*?)\}", pattern)
    names = choice[1].split(",") if choice else [""]
    found = set()
    for name in names:
        found |= set(root.glob(pattern.replace(choice[0], name) if choice else pattern))
    found = {f for f in found if f.is_file() and not any(s in str(f) for s in SKIPPED)}
    return sorted(found, key=lambda f: hashlib.md5(str(f.relative_to(root)).encode()).digest())


def documents(root: Path, pattern: str, most: float, seen: set[bytes]):
    """Yields (path in the package, text) up to `most` characters."""
    total, real = 0, set()
    for file in files_of(root, pattern):
        if file.resolve() in real or total > most:
            continue
        real.add(file.resolve())
        data = file.read_bytes()
        data = gzip.decompress(data) if file.suffix == ".gz" else data
        if b"Free Documentation License" in data or b"GFDL" in data:
            continue
        text = "\n\n".join(paragraphs(to_text(file.name, data.decode("utf-8", "replace")), seen))
        if len(text) < LEAST_CHARS or len(text.encode()) > 1.03 * len(text):
            continue  # short, or another language
        total += len(text)
        yield str(file.relative_to(root)), text


def main(argv=None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("base", type=Path)
    parser.add_argument("unpacked", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args(argv)
    from hydra_mlx.gguf import GGUFFile
    from hydra_mlx.gguf_tokenizer import build_tokenizer

    tokenizer = build_tokenizer(GGUFFile.open(args.base).metadata)
    packs, table = {"long": [], "heldout": []}, {}
    seen: set[bytes] = set()
    for package, (licence, pattern, most) in PACKAGES.items():
        root = args.unpacked / package
        if not root.exists():
            print(f"{package}: left out")
            continue
        counts = {"long": 0, "heldout": 0}
        docs = list(documents(root, pattern, most, seen))
        encoded = tokenizer.encode_batch([t for _, t in docs], add_special_tokens=False)
        for (name, _), enc in zip(docs, encoded, strict=True):
            apart = package in HELD_OUT or hashlib.md5(name.encode()).digest()[0] % 25 == 0
            ids = np.array([0, *enc.ids], np.uint16)
            kind = "heldout" if apart else "long"
            packs[kind].append(ids)
            counts[kind] += len(ids)
        table[package] = {"licence": licence, "documents": len(docs), **counts}
        print(package, table[package], flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    for kind, docs in packs.items():
        np.save(args.out / f"{kind}.tokens.npy", np.concatenate(docs))
        np.save(args.out / f"{kind}.lengths.npy", np.array([len(d) for d in docs], np.uint32))
        print(kind, len(docs), "documents", sum(map(len, docs)), "tokens")
    (args.out / "sources.json").write_text(json.dumps(table, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
