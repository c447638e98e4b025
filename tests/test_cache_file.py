"""Cache files with checkpoints: what is opened is what was saved, or an error says why not."""

import json
import os
import random
import resource
import shutil

import hydra_mlx  # noqa: F401  (before mlx)
from hydra_mlx import cache_file, cache_write
from hydra_mlx.cache import own_cache, quantise_cache
from hydra_mlx.cache_file import CacheFile
from hydra_mlx.cache_info import read_info
from hydra_mlx.checkpoints import Checkpoints
from hydra_mlx.errors import CacheError
from hydra_mlx.kv_cache import HydraKVCache
from hydra_mlx.prompt_cache import StoredCache, fingerprint, load_cache, save_cache
from hydra_mlx.rollback import rollback

import mlx.core as mx
import pytest
from mlx_lm.models.cache import load_prompt_cache

from .sequences import VARIANTS, Run, contents, difference, model_of, some, start
from .test_rollback import operate


def stored(run: Run, **changes) -> StoredCache:
    fields = {"text": "some text", "text_tokens": len(run.tokens), "messages": None}
    fields |= {"fingerprint": fingerprint(model_of(run.name)), "checkpoints": run.points}
    return StoredCache(run.cache, run.tokens, **{**fields, **changes})


def reopened(run: Run, path) -> Run:
    """The run as a file gives it back; the old one must not be needed for it."""
    save_cache(path, stored(run))
    found = load_cache(path, model_of(run.name))
    assert found.tokens == run.tokens
    return Run(run.name, found.cache, found.checkpoints, list(run.calls))


def same_points(a: Checkpoints, b: Checkpoints):
    assert (a.positions, a.furthest, a.calls.end) == (b.positions, b.furthest, b.calls.end)
    assert list(a.calls.between(0, a.calls.end)) == list(b.calls.between(0, b.calls.end))
    for x, y in zip(a.held, b.held, strict=True):
        assert (x.position, x.line, x.marked) == (y.position, y.line, y.marked)
        for p, q in zip(x.slots, y.slots, strict=True):
            for u, v in zip(p, q, strict=True):
                assert (u is None) == (v is None)
                assert u is None or (u.dtype == v.dtype and mx.array_equal(u, v))


def document(name: str = "mixed", n: int = 100, **options) -> Run:
    run = start(name, **{"every": 16, "most": 4, "marks": 2, **options})
    run.append(some(n), 16, True)
    run.append(some(7, 1), 16)
    return run


@pytest.fixture
def file(tmp_path):
    return tmp_path / "cache.safetensors"


@pytest.fixture
def small_blocks(monkeypatch):
    """So small that a tiny file has many."""
    for module in (cache_file, cache_write):
        monkeypatch.setattr(module, "BLOCK", 1024)
    monkeypatch.setattr(cache_file, "PIECE", 100)


# -------------------------------------------------------------------------------- round trips


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", VARIANTS)
def test_round_trip(name, dtype, file, small_blocks):
    run = document(name, dtype=dtype)
    again = reopened(run, file)
    same_points(again.points, run.points)
    assert difference(again.cache, run.cache) == 0
    assert [type(c) for c in again.cache] == [type(c) for c in run.cache]
    for position in (107, 100, 99, 64, 50, 17, 3, 0):
        for one in (run, again):
            rollback(model_of(name), one.cache, one.points, one.tokens, position)
            one.cut(position)
        assert difference(again.cache, run.cache) == 0, position
        same_points(again.points, run.points)
    assert os.listdir(file.parent) == [file.name]


@pytest.mark.parametrize("bits", [None, (8, 4), (4, 4)])
def test_own_cache_class(bits, file):
    """Keys and values in bits of their own, and the room behind them, which is not saved."""
    name = "4 bit"
    run = Run(name, model_of(name).make_cache(), Checkpoints(16, 4), [])
    own_cache(run.cache, 1000)
    if bits:
        quantise_cache(run.cache, bits, 32)
    run.append(some(50), 16)
    again = reopened(run, file)
    assert (
        file.stat().st_size
        < run.points.nbytes
        + 60
        * sum(
            x.nbytes // x.shape[2] for x in contents(run.cache) if x.ndim == 4 and x.shape[2] == 50
        )
        + sum(x.nbytes for c in run.cache if not hasattr(c, "offset") for x in c.cache)
        + 20_000
    )
    for one in (run, again):
        one.append(some(9, 3), 16)
    assert difference(again.cache, run.cache) == 0
    assert (
        read_info(file).kv
        == {
            None: "full precision",
            (8, 4): "keys in 8, values in 4 bits, groups of 32",
            (4, 4): "4 bits, groups of 32",
        }[bits]
    )


@pytest.mark.parametrize("name", VARIANTS)
def test_random_sequences_with_files_in_them(name, file, monkeypatch):
    """10 sequences a model, 80 in all; a run is put into a file and taken out at any moment."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # most of the time otherwise
    for seed in range(10):
        rng = random.Random(f"files {name} {seed}")
        runs = [start(name, every=rng.choice([8, 16]), most=rng.choice([2, 4, 6]), marks=2)]
        for i in range(8):
            which = rng.randrange(len(runs))
            if runs[which].tokens and (i in (2, 5) or rng.random() < 0.2):
                if runs[which].points.moved(runs[which].cache)[0]:
                    continue
                runs[which] = reopened(runs[which], file)
            else:
                fork = operate(runs[which], rng)
                if fork is not None and len(runs) < 3:
                    runs.append(fork)
        for run in runs:
            run.check()


def test_mlx_lm_reads_it_too(file):
    """Without hydra_mlx, where mlx-lm has a class for what is in it."""
    run = document("4 bit")
    assert type(run.cache[0]) is HydraKVCache
    save_cache(file, stored(run))
    assert difference(load_prompt_cache(str(file)), run.cache) == 0


def test_checkpoints_are_read_when_they_are_used(file):
    """The bytes of a checkpoint stay on the disk; a file written into since is noticed."""
    run = document()
    again = reopened(run, file)
    with file.open("r+b") as f:
        f.seek(-40, os.SEEK_END)
        f.write(b"xx")
    os.utime(file, ns=(1, 1))
    for position in (run.points.positions[0], 106):
        with pytest.raises(CacheError, match="changed while it was in use"):
            rollback(model_of("mixed"), again.cache, again.points, again.tokens, position)
    with pytest.raises(CacheError, match="changed while it was in use"):
        save_cache(file.with_name("copy"), stored(again))
    assert os.listdir(file.parent) == [file.name]


# ------------------------------------------------------------------------------------- damage


def refuses(path, model=None) -> CacheError:
    with pytest.raises(CacheError) as caught:
        load_cache(path, model)
    lines = str(caught.value).splitlines()
    assert 1 <= len(lines) <= 2 and str(path) in lines[0], lines
    return caught.value


def test_every_flip_is_noticed(file, small_blocks):
    """400 single bits all over a file of many blocks, each byte of its beginning among them."""
    save_cache(file, stored(document(), messages=[{"role": "user", "content": "x"}]))
    whole, rng = file.read_bytes(), random.Random(0)
    header = 8 + int.from_bytes(whole[:8], "little")
    assert CacheFile(file).blocks > 20
    places = [*range(64), *rng.sample(range(header), 120), *rng.sample(range(len(whole)), 216)]
    for place in places:
        bad = bytearray(whole)
        bad[place] ^= 1 << rng.randrange(8)
        file.write_bytes(bad)
        refuses(file)
    file.write_bytes(whole)
    assert len(load_cache(file).tokens) == 107


def test_every_cut_is_noticed(file, small_blocks):
    save_cache(file, stored(document()))
    whole, rng = file.read_bytes(), random.Random(1)
    header = 8 + int.from_bytes(whole[:8], "little")
    at = CacheFile(file).data[1]
    cuts = [*range(10), header - 1, header, header + 1, header + 1024, at - 1, at, at + 1, at + 16]
    cuts += [len(whole) - 17, len(whole) - 16, len(whole) - 1, *rng.sample(range(len(whole)), 60)]
    for n in cuts:
        file.write_bytes(whole[:n])
        refuses(file)
    swapped = whole[:header] + whole[header + 1024 : header + 2048] + whole[header : header + 1024]
    for bad in (
        whole + b"\0",
        whole + whole,
        whole[:header] + bytes(len(whole) - header),
        bytes(len(whole)),
        swapped + whole[header + 2048 :],
    ):
        file.write_bytes(bad)
        refuses(file)


def test_a_part_of_two_files(file, small_blocks):
    """The header of one, the arrays of another of the same shapes."""
    files = []
    for n in (0, 5):
        run = start("mixed", every=16, most=4)
        run.append(some(100, n), 16)
        save_cache(file, stored(run))
        files.append(file.read_bytes())
    a, b = files
    header = 8 + int.from_bytes(a[:8], "little")
    assert len(a) == len(b)
    file.write_bytes(a[:header] + b[header:])
    assert "header is wrong" in refuses(file).message
    blocks = -(-(len(a) - header) // 1040)
    file.write_bytes(a[:header] + b[header : -16 * blocks] + a[-16 * blocks :])
    assert "block at byte" in refuses(file).message


def test_other_files(file, tmp_path):
    mx.save_safetensors(str(file), {"x": mx.zeros((3,))})
    assert "not written by hydra_mlx" in refuses(file).message
    mx.save_safetensors(str(file), {"x": mx.zeros((3,))}, {"0.hydra_format": "1"})
    assert "format 1, of an earlier version" in refuses(file).message
    for name, content in {"empty": b"", "text": b"hello " * 99, "zip": b"PK\3\4" * 50}.items():
        file.write_bytes(content)
        assert "no prompt cache" in refuses(file).message, name
    assert "directory" in refuses(tmp_path).message
    assert "No such file" in refuses(tmp_path / "gone").message
    assert "cannot be read" in refuses(tmp_path / "x\0y").message
    os.mkfifo(tmp_path / "pipe")
    refuses(tmp_path / "pipe")


def test_a_file_of_another_version(file, monkeypatch):
    run = document()
    with monkeypatch.context() as patch:
        patch.setattr("hydra_mlx.prompt_cache.FORMAT", 3)
        save_cache(file, stored(run))
    assert "format 3, expected 2" in refuses(file).message
    with pytest.raises(CacheError, match="format 3, expected 2"):
        read_info(file)


def test_no_permission(file):
    save_cache(file, stored(document()))
    file.chmod(0)
    try:
        if os.geteuid() == 0:
            pytest.skip("root reads everything")
        assert "Permission denied" in refuses(file).message
    finally:
        file.chmod(0o600)


def test_other_models(file):
    save_cache(file, stored(document()))
    for name in ("no conv", "all FA", "fused", "8 bit"):
        assert "belongs to another model" in refuses(file, model_of(name)).message
    other = stored(document("8 bit"), fingerprint=fingerprint(model_of("mixed")))
    save_cache(file, other)
    load_cache(file)  # whole, yet
    other.cache.pop()
    other.checkpoints = None
    save_cache(file, other)
    assert "do not fit" in refuses(file, model_of("mixed")).message


def test_parts_that_contradict(file):
    run = document()
    with pytest.raises(CacheError, match="107, but 106"):
        save_cache(
            file, StoredCache(run.cache, run.tokens[:-1], "", 0, None, "", checkpoints=run.points)
        )
    model_of("mixed")(mx.array([[1]]), cache=run.cache)
    with pytest.raises(CacheError, match="Call note"):
        save_cache(file, stored(run))
    assert not file.exists()


def test_an_unknown_class(file):
    class Strange:
        state = ()
        offset = 3

    with pytest.raises(CacheError, match="Strange cannot be kept"):
        save_cache(file, StoredCache([Strange()], [1], "", 0, None, ""))
    run = document()
    save_cache(file, stored(run))
    for name in ("os", "create_causal_mask", "_BaseCache", "Strange"):
        file.with_name("other").write_bytes(b"")
        metadata = dict(CacheFile(file).metadata)
        del metadata["0.check"]
        metadata["1.0"] = name
        arrays = list(CacheFile(file).arrays().items())
        cache_write.write_cache_file(file.with_name("other"), metadata, arrays, str(len(run.cache)))
        assert f"of class {name}" in refuses(file.with_name("other")).message


# ------------------------------------------------------------------------------------ writing


def test_disk_full(file, monkeypatch):
    """Before a byte is written where the system tells, else in the middle of it."""
    save_cache(file, stored(document(n=20)))
    before, big = file.read_bytes(), stored(document(n=300))
    with monkeypatch.context() as patch:
        usage = shutil.disk_usage(file.parent)._replace(free=4096)
        patch.setattr(shutil, "disk_usage", lambda path: usage)
        with pytest.raises(CacheError, match="only 4.0 KiB are free"):
            save_cache(file, big)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 999, limit[1]))
    try:
        with pytest.raises(CacheError, match="cannot be written"):
            save_cache(file, big)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert file.read_bytes() == before and os.listdir(file.parent) == [file.name]
    save_cache(file, big)
    assert len(load_cache(file).tokens) == 307


def test_the_target_is_a_link(file, tmp_path):
    """The file behind it is replaced, the link stays."""
    (tmp_path / "d").mkdir()
    link = tmp_path / "d" / "link"
    link.symlink_to(file)
    save_cache(link, stored(document()))
    assert link.is_symlink() and len(load_cache(file).tokens) == 107


def test_a_writer_that_lives_is_left_alone(file):
    with cache_write._beside(file) as (part, _):
        dead = part.with_name(f".{file.name}.0000.part")
        dead.write_bytes(b"x")
        save_cache(file, stored(document()))
        assert part.exists() and not dead.exists()
    assert os.listdir(file.parent) == [file.name]


# --------------------------------------------------------------------------------------- info


def test_info_reads_no_cache_and_no_mlx_lm(file):
    import subprocess
    import sys

    save_cache(file, stored(document(), text="First words of it, \x1b[31mred, and the last ones."))
    code = (
        "import sys; from hydra_mlx.__main__ import main; assert main(sys.argv[1:]) == 0; "
        "assert not any(m.startswith(('mlx_lm', 'transformers')) for m in sys.modules)"
    )
    argv = [sys.executable, "-c", code, "cache", "info", str(file)]
    out = subprocess.run(argv, capture_output=True, text=True, check=True).stdout
    assert "tokens       107" in out and "First words" in out and "\x1b" not in out
    info = read_info(file)
    run = document()
    assert json.loads(info.as_json())["checkpoints"] == run.points.positions == info.checkpoints
    assert info.marked == [100] and info.tokens == 107
    assert info.state_bytes == sum(c.nbytes for c in run.cache if not hasattr(c, "offset"))
    assert info.checkpoint_bytes == sum(c.nbytes for c in run.points.held)


def test_info_and_check(file, program):
    save_cache(file, stored(document()))
    assert program("cache", "info", file, model=False)[0] == 0
    assert '"checked": true' in program("cache", "info", file, "--check", "--json", model=False)[1]
    data = bytearray(file.read_bytes())
    data[CacheFile(file).data[1] - 5] ^= 1
    file.write_bytes(data)
    code, out, err = program("cache", "info", file, "--check", model=False)
    assert code == 2 and not out and "block at byte" in err
