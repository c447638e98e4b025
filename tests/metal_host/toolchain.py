"""clang from the PyPI package ziglang, and the cache of what it built.

`zig clang` is clang itself (tens of milliseconds a kernel); `zig c++` would add zig's own work.
Files in the cache are named by a hash of everything they depend on and appear by renaming, so
any number of processes may share it.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import platform
import re
import subprocess
import tempfile
from pathlib import Path

from .errors import CompileError, HostUnavailable, MetalHostError

_HERE = Path(__file__).parent
_CPU = "x86-64-v3"
_TARGET = [f"-march={_CPU}", "--target=x86_64-linux-gnu", "-fPIC", "-fno-exceptions", "-fno-rtti"]
# Metal is C++14: what a newer standard brings is an error in kernels, not in our system headers.
_KERNEL = [
    *_TARGET,
    "-std=c++14",
    "-nostdinc",
    "-nostdinc++",
    "-isystem",
    str(_HERE / "include"),
    "-fvisibility=hidden",
    "-fno-threadsafe-statics",
    "-fstack-clash-protection",
    "-flax-vector-conversions=none",
    "-ffp-contract=on",
    "-Wno-everything",
    "-Werror=vla-cxx-extension",
    "-Werror=c++17-extensions",
    "-Werror=c++20-extensions",
    "-Werror=c++20-designator",
    "-Werror=return-type",
    "-ferror-limit=20",
    # Metal rounds half and bfloat after every operation, and its literals are float.
    "-Xclang",
    "-ffloat16-excess-precision=none",
    "-Xclang",
    "-fbfloat16-excess-precision=none",
    "-Xclang",
    "-cl-single-precision-constant",
]
_PLAIN = ["-O2"]
# -O1 and no vectorising keep loads and stores as the lanes make them; memset and memcpy would
# hide them. Locals that nobody initialised hold a pattern (NaN in floats).
_WATCHED = [
    "-O1",
    "-DMH_WATCHED=1",
    "-fno-vectorize",
    "-fno-slp-vectorize",
    "-fno-builtin-memcpy",
    "-fno-builtin-memset",
    "-fno-builtin-memmove",
    "-fsanitize-coverage=func,trace-loads,trace-stores",
    "-fsanitize=array-bounds,integer-divide-by-zero",
    "-ftrivial-auto-var-init=pattern",
]


def available() -> tuple[bool, str]:
    """(whether kernels can be executed here, the reason why not)."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return False, f"needs Linux on x86-64, this is {platform.system()} on {platform.machine()}"
    if "avx2" not in Path("/proc/cpuinfo").read_text():
        return False, "needs a CPU with AVX2"
    if importlib.util.find_spec("ziglang") is None:
        return False, "needs clang from the PyPI package ziglang: pip install ziglang"
    return True, ""


@functools.cache
def _zig() -> str:
    ok, reason = available()
    if not ok:
        raise HostUnavailable(reason)
    import ziglang

    return str(Path(ziglang.__file__).parent / "zig")


def cache_dir() -> Path:
    """Folder of compiled kernels: $METAL_HOST_CACHE, or one of this user's own in the temp folder.

    Raises:
        MetalHostError: the folder in the temp folder belongs to someone else.
    """
    chosen = os.environ.get("METAL_HOST_CACHE")
    path = Path(chosen) if chosen else Path(tempfile.gettempdir()) / f"metal-host-{os.getuid()}"
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    if path.stat().st_uid != os.getuid():
        raise MetalHostError(f"{path} belongs to another user; set METAL_HOST_CACHE to a folder")
    return path


def _run(command: list[str]) -> str:
    """Standard error of a compiler call; raises CompileError when it fails."""
    cache = str(cache_dir() / "zig")
    environment = {**os.environ, "ZIG_GLOBAL_CACHE_DIR": cache, "ZIG_LOCAL_CACHE_DIR": cache}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise CompileError((done.stderr or done.stdout)[:6000])
    return done.stderr


@functools.cache
def _fingerprint() -> str:
    """Hash of the compiler and of every file that goes into each kernel."""
    digest = hashlib.sha256()
    zig = os.stat(_zig())
    digest.update(f"{_zig()} {zig.st_size} {zig.st_mtime_ns}".encode())
    for path in sorted([*_HERE.glob("include/*"), *_HERE.glob("runtime/*")]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _key(*parts: str) -> str:
    return hashlib.sha256("\0".join([_fingerprint(), *parts]).encode()).hexdigest()[:24]


def _publish(made: Path, final: Path) -> Path:
    os.replace(made, final)
    return final


def _runtime_object() -> Path:
    flags = [
        "-std=c++17",
        "-O2",
        "-fPIC",
        f"-march={_CPU.replace('-', '_')}",
        "-fvisibility=hidden",
        "-fno-exceptions",
        "-fno-rtti",
        "-fno-sanitize=all",
        "-Wall",
    ]
    final = cache_dir() / f"runtime-{_key(*flags)}.o"
    if final.exists():
        return final
    with tempfile.TemporaryDirectory(dir=cache_dir()) as folder:
        made = Path(folder, "runtime.o")
        source = str(_HERE / "runtime" / "runtime.cpp")
        _run([_zig(), "c++", *flags, "-c", source, "-o", str(made)])
        return _publish(made, final)


def build(text: str, watched: bool) -> Path:
    """Compiles a kernel text into a shared library and returns its path, cached.

    Args:
        text: C++ from `signature.generate`.
        watched: whether loads and stores call back, for checks and counts.

    Raises:
        CompileError: with clang's diagnostics.
        HostUnavailable: no clang.
    """
    flags = [*_KERNEL, *(_WATCHED if watched else _PLAIN)]
    final = cache_dir() / f"kernel-{_key(text, *flags)}.so"
    if final.exists():
        return final
    runtime = _runtime_object()
    with tempfile.TemporaryDirectory(dir=cache_dir()) as folder:
        source, made = Path(folder, "kernel.cpp"), Path(folder, "kernel.so")
        source.write_text(text)
        object_file = str(source.with_suffix(".o"))
        _run([_zig(), "clang", "-x", "c++", *flags, "-c", str(source), "-o", object_file])
        link = [_zig(), "ld.lld", "--eh-frame-hdr", "-shared", "-o", str(made)]
        _run([*link, object_file, str(runtime)])
        return _publish(made, final)


def _bfloat_blocks(diagnostics: str) -> str:
    """Only the errors about bfloat, each with its notes.

    That compile has no address spaces, so overloads on them collapse: such errors do not count.
    """
    blocks = re.split(r"\n(?=\S[^\n]* error: )", diagnostics)
    # Overloads that differ in address space alone collapse here; the real compile checks them.
    other = re.compile(
        r"redefinition|ambiguous|no member named|no matching function for call to 'load4'"
    )
    kept = [b for b in blocks if "bfloat" in b and not other.search(b.split("\n", 1)[0])]
    return "\n".join(b for b in kept if " error: " in b.split("\n", 1)[0])


def bfloat_errors(text: str) -> str:
    """Diagnostics for implicit conversions to bfloat, which Metal rejects and clang allows.

    Compiles the text without code generation, with bfloat as a class. Empty when it is clean.
    """
    flags = [*_KERNEL, "-DMH_BFLOAT_CLASS=1", "-fsyntax-only"]
    final = cache_dir() / f"bfloat-{_key(text, *flags)}.txt"
    if final.exists():
        return final.read_text()
    with tempfile.TemporaryDirectory(dir=cache_dir()) as folder:
        source, made = Path(folder, "kernel.cpp"), Path(folder, "found.txt")
        source.write_text(text)
        try:
            _run([_zig(), "clang", "-x", "c++", *flags, str(source)])
            found = ""
        except CompileError as error:
            found = _bfloat_blocks(str(error))
        made.write_text(found)
        _publish(made, final)
    return found
