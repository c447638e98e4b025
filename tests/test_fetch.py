"""Fetching without a network: the hub is played by stand-ins."""

from hydra_mlx import fetch
from hydra_mlx.errors import UsageError

import pytest


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
