"""Packed and plain text give the same tokens; batches depend on the seed and the position alone."""

import lzma

import hydra_mlx
from hydra_mlx.errors import UsageError
from hydra_mlx.tokens import Batches, read_documents, write_packed

import numpy as np
import pytest

PROSE = [
    "The harbour was quiet before dawn. " * 9,
    "Two boats came in.\n",
    "Stone, sea, lamp; " * 5,
]


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir):
    return hydra_mlx.load(tiny_model_dir)[1]


@pytest.fixture
def texts(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for i, text in enumerate(PROSE):
        (folder / f"{i}.txt").write_text(text)
    (folder / ".hidden.txt").write_text("not this")
    (folder / "figure.png").write_bytes(b"\x89PNG")
    return folder


def packed(folder, tokenizer):
    folder.mkdir()
    eos = tokenizer.eos_token_id
    ids = [[*tokenizer.encode(t, add_special_tokens=False), eos] for t in PROSE]
    return write_packed(folder, ids)


def read(*paths):
    return read_documents(paths, 260, None)


def test_packed_and_plain_text_are_the_same(texts, tokenizer, tmp_path):
    plain = read_documents([texts], 260, lambda: tokenizer)
    same = read(packed(tmp_path / "packed", tokenizer))
    assert plain.total == same.total and list(plain.length) == list(same.length)
    for n in (0, 3, 11):
        one, other = (Batches(d, 16, 4).take(n, 5) for d in (plain, same))
        assert np.array_equal(one, other)


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_xz_and_both_types(texts, tokenizer, tmp_path, dtype):
    path = packed(tmp_path / "packed", tokenizer)
    want = Batches(read(path), 9, 0).take(0, 8)
    for name in ("tokens", "lengths"):
        file = path.with_name(f"{name}.npy")
        np.save(file, np.load(file).astype(dtype))
        file.with_name(f"{name}.npy.xz").write_bytes(lzma.compress(file.read_bytes()))
        file.unlink()
    assert np.array_equal(Batches(read(path.parent), 9, 0).take(0, 8), want)


def test_an_epoch_is_every_document_once(tmp_path):
    docs = read(write_packed(tmp_path, [[d] * n for d, n in enumerate((7, 1, 30, 4, 12))]))
    batches = Batches(docs, 3, 1)
    first = batches.take(0, batches.windows)
    again = batches.take(batches.windows, batches.windows)
    assert batches.windows == (54 - 1) // 3
    counts = np.bincount(first[:, :-1].ravel(), minlength=5)
    assert counts.sum() == 51 and (np.array([7, 1, 30, 4, 12]) - counts >= 0).all()
    assert not np.array_equal(first, again)


def test_windows_overlap_by_one_token(tmp_path):
    docs = read(write_packed(tmp_path, [np.arange(41)]))
    windows = {int(w[0]): w for w in Batches(docs, 8, 2).take(0, 5)}
    assert sorted(windows) == [0, 8, 16, 24, 32]
    assert all(np.array_equal(w, np.arange(a, a + 9)) for a, w in windows.items())


def test_any_position_is_the_same_from_anywhere(tmp_path):
    rng = np.random.RandomState(0)
    docs = read(write_packed(tmp_path, [rng.randint(0, 99, n) for n in rng.randint(1, 60, 25)]))
    whole = Batches(docs, 7, 3).take(0, 400)
    for n in (0, 1, 57, 399):
        assert np.array_equal(Batches(docs, 7, 3).take(n, 1)[0], whole[n])
    assert not np.array_equal(Batches(docs, 7, 4).take(0, 400), whole)


def test_the_fingerprint_sees_a_changed_token(tmp_path):
    rows = np.arange(40).reshape(4, 10)
    one = read(write_packed(tmp_path, rows)).fingerprint()
    assert one == read(write_packed(tmp_path, rows)).fingerprint()
    assert one != read(write_packed(tmp_path, rows.reshape(5, 8))).fingerprint()
    rows[2, 3] += 1
    assert one != read(write_packed(tmp_path, rows)).fingerprint()


def test_errors(tmp_path, tokenizer):
    def refused(words, *paths, vocab=260):
        with pytest.raises(UsageError, match=words):
            read_documents(paths, vocab, None)

    refused("does not exist", tmp_path / "nowhere.npy")
    (tmp_path / "empty").mkdir()
    refused("neither packed tokens", tmp_path / "empty")
    path = write_packed(tmp_path, [[1, 2, 300]])
    refused("token 300; the model knows 260", path)
    np.save(tmp_path / "lengths.npy", np.array([2]))
    refused("adds up to 2 tokens", path, vocab=999)
    np.save(path, np.ones(3))
    refused("expected a list of integers", path)
    path.write_bytes(b"no array")
    refused("cannot be read as an array", path)
    np.save(path, np.ones(3, np.int64))
    refused("expected uint16 or uint32", path)
    (tmp_path / "x.txt").write_text("text")
    refused("no tokenizer", tmp_path / "x.txt")
    np.save(tmp_path / "short.npy", np.array([1, 2, 3], np.uint16))
    with pytest.raises(UsageError, match="one sequence needs 4"):
        Batches(read(tmp_path / "short.npy"), 3, 0)
