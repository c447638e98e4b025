"""What `hydra-mlx doctor` looks at, except the kernels: versions, device, memory, disk, a model.

Each function gives lines; none raises for what it finds.
"""

import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import __version__, blas, text
from .errors import HydraError, UsageError

OK, WARN, FAIL = "ok", "warn", "fail"
GB = 1 << 30


@dataclass(frozen=True)
class Line:
    """One finding.

    Attributes:
        status: OK, WARN or FAIL. what: Its subject, a word or two. found: What is so. todo: What to
            do about it; may be empty.
    """

    status: str
    what: str
    found: str
    todo: str = ""


def _numbers(version: str) -> tuple:
    return tuple(int(n) for n in re.findall(r"\d+", version)[:3])


def requirement(name: str) -> str:
    """What this package asks of another one, such as ">=0.32.4,<0.33"; "" where not known."""
    try:
        lines = importlib.metadata.requires("hydra_mlx") or []
    except importlib.metadata.PackageNotFoundError:
        return ""
    for line in lines:
        found = re.match(rf"{re.escape(name)}(?:\[\w+\])?\s*([<>=!~][^;]*)", line)
        if found and "extra ==" not in line:
            return found.group(1).strip()
    return ""


def satisfies(version: str, wanted: str) -> bool:
    """Whether a version is within bounds like ">=1.2,<2"; other operators count as satisfied."""
    have = _numbers(version)
    for bound in wanted.split(","):
        sign, limit = re.match(r"\s*([<>=!~]*)(.*)", bound).groups()
        limit = _numbers(limit)
        if (sign == ">=" and have < limit) or (sign == "<" and have >= limit):
            return False
    return True


def versions() -> list:
    """This package and what it runs on."""
    lines = []
    python = platform.python_version()
    here = f"hydra_mlx {__version__}, Python {python}, {platform.system()} {platform.machine()}"
    fine = (3, 10) <= sys.version_info[:2] < (3, 14)
    todo = "" if fine else "Use Python 3.10 to 3.13."
    lines.append(Line(OK if fine else FAIL, "program", here, todo))
    found, bad = [], []
    for name in ("mlx", "mlx-lm", "numpy", "huggingface-hub", "rich"):
        wanted = requirement(name)
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            bad.append(f"{name} is missing")
            continue
        found.append(f"{name} {version}")
        if not satisfies(version, wanted):
            bad.append(f"{name} {version} is not {wanted}")
    again = "Install again: pip install --upgrade hydra_mlx (or `pip install .` in the clone)."
    if bad:
        lines.append(Line(FAIL, "packages", ", ".join(bad), again))
    else:
        lines.append(Line(OK, "packages", ", ".join(found)))
    return lines


def backend() -> list:
    """MLX's device and what runs kernels."""
    try:
        import mlx.core as mx

        (mx.ones(3) + 1).sum().item()
    except Exception as e:  # a broken installation may raise anything
        first = text.first_line(e)
        return [
            Line(FAIL, "mlx", f"cannot compute ({first})", "Install it again: pip install mlx.")
        ]
    from .kernels import dispatch
    from .stats import backend as device

    lines, (name, cpu) = [], device()
    try:
        way, why = dispatch.route()
    except UsageError as e:
        lines.append(Line(FAIL, "backend", e.message, e.hint))
        way = "ops"
    else:
        status, todo = OK, ""
        if way == "ops":
            status, todo = _no_gpu(why)
        lines.append(Line(status, "backend", f"{name}; kernels: {way} ({why})", todo))
    if cpu is not None:
        slow = "reference" in cpu
        lines.append(Line(WARN if slow else OK, "BLAS", cpu, _blas_todo() if slow else ""))
    return lines


def _no_gpu(why: str) -> tuple:
    """Status and what to do where operations run."""
    if "HYDRA_KERNELS" in why:
        return WARN, "Unset HYDRA_KERNELS to use the GPU's kernels."
    if sys.platform == "darwin":
        return WARN, "On Apple Silicon with macOS 14 or newer MLX uses the GPU; is this x86 Python?"
    if shutil.which("nvidia-smi"):
        return WARN, 'There is an NVIDIA driver: pip install "mlx[cuda13]" makes MLX use the GPU.'
    return OK, ""


def _blas_todo() -> str:
    return (
        f"apt install {blas.APT_PACKAGE}, and import hydra_mlx before mlx."
        if sys.platform.startswith("linux")
        else ""
    )


def memory() -> list:
    """Physical memory, and on macOS what the GPU may hold."""
    from .folder import memory_bytes

    total, free = memory_bytes(), _available()
    small = free is not None and free < GB
    said = text.size(total) + ("" if free is None else f", {text.size(free)} of it free")
    todo = "Close other programs: less than 1 GiB is free." if small else ""
    lines = [Line(WARN if small else OK, "memory", said, todo)]
    if sys.platform == "darwin":
        lines.append(wired(total, _sysctl("iogpu.wired_limit_mb")))
    return lines


def wired(total: int, limit: str | None) -> Line:
    """The line on macOS's limit of GPU memory.

    Args:
        total: Physical memory in bytes. limit: What sysctl says, megabytes; "0" is the default.
    """
    if limit is None or not limit.isdigit():
        return Line(WARN, "wired limit", "sysctl iogpu.wired_limit_mb gives no number")
    share = "about 2/3" if total <= 36 * GB else "about 3/4"
    if limit == "0":
        more = min(0.85 * total, total - 4 * GB)  # macOS itself wants some
        now = total * (2 / 3 if total <= 36 * GB else 3 / 4)
        raised = f"sudo sysctl iogpu.wired_limit_mb={int(more) >> 20}"
        todo = f"For long contexts, until the next start: {raised}" if more > now else ""
        return Line(OK, "wired limit", f"macOS's default, {share} of the memory", todo)
    if int(limit) << 20 > 0.95 * total:
        todo = "Leave macOS some memory: sudo sysctl iogpu.wired_limit_mb=0 is the default."
        return Line(WARN, "wired limit", f"{limit} MB, nearly all of the memory", todo)
    return Line(OK, "wired limit", f"{limit} MB")


def _sysctl(name: str) -> str | None:
    try:
        done = subprocess.run(
            ["sysctl", "-n", name], capture_output=True, text=True, timeout=2, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _available() -> int | None:
    """Free memory on Linux; None elsewhere."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return None


def disk() -> list:
    """The folder of what the hub's models are downloaded to."""
    from huggingface_hub.constants import HF_HUB_CACHE

    folder = Path(HF_HUB_CACHE)
    place = next((p for p in (folder, *folder.parents) if p.exists()), Path("/"))
    if not os.access(place, os.W_OK):
        todo = "Point HF_HOME at a folder that can be written."
        return [Line(WARN, "hub cache", f"{folder} cannot be written", todo)]
    free = shutil.disk_usage(place).free
    few = free < 2 * GB
    todo = "Free some space, or point HF_HOME elsewhere." if few else ""
    return [Line(WARN if few else OK, "hub cache", f"{folder}, {text.size(free)} free", todo)]


def extras() -> list:
    """What is not needed but used where it is there."""
    names = {"matplotlib": "pictures", "prompt_toolkit": "line editing in chat"}
    here = [n for n in names if importlib.util.find_spec(n)]
    gone = [f"no {n} ({what})" for n, what in names.items() if n not in here]
    return [Line(OK, "extras", ", ".join([*here, *gone]))]


def model(path: Path) -> tuple:
    """Lines on a model folder, and its facts or None."""
    from . import facts as reader

    try:
        facts = reader.read(path)
    except HydraError as e:
        return [Line(FAIL, "model", e.message, e.hint)], None
    said = f"{facts.model_type}, {facts.parameters:,} parameters, {text.size(facts.nbytes)}"
    todo = "Convert it to run it fast: hydra-mlx convert" if facts.form == "spec" else ""
    lines = [Line(WARN if todo else OK, "model", f"{path.name}: {said}", todo)]
    lines += [Line(WARN, "model", note) for note in facts.notes]
    lines += _manifest(path) + _room(facts)
    return lines, facts


def _manifest(path: Path) -> list:
    """Sizes of a converted folder's files against its manifest."""
    from .manifest import MANIFEST

    if not (path / MANIFEST).is_file():
        return []
    again = "Convert the model again."
    try:
        files = json.loads((path / MANIFEST).read_text("utf-8"))["files"]
        sizes = {n: int(f["bytes"]) for n, f in files.items() if n.endswith(".safetensors")}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return [Line(FAIL, "manifest", f"{MANIFEST} cannot be read", again)]
    for name, size in sizes.items():
        file = path / name
        if not file.is_file() or file.stat().st_size != size:
            return [Line(FAIL, "manifest", f"{name} is not what was written", again)]
    todo = "generate --check-weights compares every byte."
    return [Line(OK, "manifest", f"{text.count(len(sizes), 'file')} of the sizes written", todo)]


def _room(facts: Any) -> list:
    """Whether the weights fit in this machine."""
    from .folder import memory_bytes

    total = memory_bytes()
    if facts.nbytes > 0.9 * total:
        todo = "Convert it with fewer bits: hydra-mlx convert -q --q-bits 4"
        found = f"{text.size(facts.nbytes)} of weights, {text.size(total)} of memory"
        return [Line(FAIL, "room", found, todo)]
    return []


def tokenizer(path: Path) -> list:
    """Whether the model's tokenizer loads and can turn text into tokens and back."""
    from .loading import load_tokenizer

    try:
        made = load_tokenizer(path)
        words = "Why is the sky blue?"
        back = made.decode(made.encode(words))
    except HydraError as e:
        return [
            Line(FAIL, "tokenizer", e.message, "Copy the tokenizer files of the source beside it.")
        ]
    except Exception as e:  # tokenizers raise anything
        todo = "Fetch or convert the model again."
        return [Line(FAIL, "tokenizer", f"does not work ({text.first_line(e)})", todo)]
    if words not in back:
        return [Line(WARN, "tokenizer", f"{words!r} came back as {back[:40]!r}")]
    has = "has a chat template" if getattr(made, "has_chat_template", False) else "no chat template"
    return [Line(OK, "tokenizer", has)]
