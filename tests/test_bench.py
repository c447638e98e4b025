"""hydra-mlx bench on tiny models: figures, turns, both caches, interrupts, memory, pictures."""

import json
import os
import signal

import hydra_mlx
from hydra_mlx import bench, bench_report, cli, measure, predict
from hydra_mlx.__main__ import main
from hydra_mlx.cache import cache_bytes, kv_bytes_per_token, state_bytes
from hydra_mlx.measure import Cell, Sample, Settings, Subject

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from .checkpoints import write_base

SMALL = ("--lengths", "9,40", "--runs", "2", "--decode", "3", "--prefill-step-size", "16")


@pytest.fixture(autouse=True)
def small_stream(monkeypatch):
    """The bandwidth of a small matrix will do."""
    monkeypatch.setattr(measure, "STREAM_BYTES", 1 << 20)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("bench") / "llama", head_dim=32)[0]


def run(capsys, *argv) -> tuple:
    """(exit code, lines before the JSON, the JSON)."""
    code = main(["bench", *map(str, argv)])
    out, err = capsys.readouterr()
    lines = out.splitlines()
    return code, lines[:-1], json.loads(lines[-1]) if lines else err


@pytest.mark.parametrize("bits", [None, 4])
def test_two_models_in_one_run(tiny_model_dir, llama, bits, tmp_path, capsys):
    flags = [] if bits is None else ["--kv-bits", bits, "--kv-group-size", 32]
    picture = tmp_path / "b.png"
    code, lines, said = run(
        capsys, tiny_model_dir, "--vs", llama, *SMALL, *flags, "--plot", picture
    )
    assert code == 0 and picture.read_bytes().startswith(b"\x89PNG")
    assert [(r["tokens"], r["model"]) for r in said["rows"]] == [
        (n, d.name) for n in (9, 40) for d in (tiny_model_dir, llama)
    ]
    for r in said["rows"]:
        for key in ("prefill_tps", "decode_tps"):
            assert 0 < r[key]["min"] <= r[key]["median"] <= r[key]["max"]
        assert r["runs"] == 2 and r["peak_bytes"] > 0 and r["predicted_most_tps"] > 0
    assert said["settings"]["kv_bits"] == bits and not said["interrupted"]
    assert len(lines) == 4 + 1 + 4 and "against the first" in lines[4]
    assert "decode x" in lines[6] and "measured here" in lines[1]


def test_floor_is_what_the_config_says(tiny_model_dir):
    """Bytes of a step from arrays equal those from the config (float32 here)."""
    model = hydra_mlx.load_model(tiny_model_dir, dtype="float32")
    cache = model.make_cache()
    model(mx.zeros((1, 40), mx.int32), cache=cache)
    floor = measure.step_floor(model, cache, 40)
    assert floor.kv == 40 * kv_bytes_per_token(model.args, 4)
    assert floor.state == 2 * state_bytes(model.args, 4) == 2 * cache_bytes(cache)[1]
    held = dict(tree_flatten(model.parameters()))
    rest = sum(x.nbytes for n, x in held.items() if "embed_tokens" not in n)
    assert "lm_head.weight" in held and floor.weights == rest


def test_measurement_reads_and_decodes_what_it_says(tiny, monkeypatch):
    """Every prompt token goes through the model once, and each decoded one after it."""
    model = tiny[0]
    seen = []

    class Spy:
        layers, make_cache = model.layers, staticmethod(model.make_cache)

        def __call__(self, tokens, cache):
            seen.append(tokens.shape[1])
            return model(tokens, cache=cache)

        def parameters(self):
            return model.parameters()

        def __contains__(self, name):
            return name in model

    subject = Subject("spy", Spy(), 7, "")
    sample, floor = measure.measure(subject, 40, 260, Settings(3, 16, None, 64, 0), lambda: False)
    assert seen == [16, 16, 7, 1, 1, 1, 1]
    assert sample.prefill > 0 and sample.decode > 0 and sample.peak > 7 and floor is not None


def test_prompts_do_not_depend_on_the_model():
    a, b = measure.prompt(30, 50, 3), measure.prompt(30, 50, 3)
    assert mx.array_equal(a, b).item() and a.max().item() < 50
    assert not mx.array_equal(a, measure.prompt(30, 50, 4)).item()


def fake(monkeypatch, trouble=None):
    """measure() without a model: notes the order, raises what trouble(label, length) gives."""
    order = []

    def one(subject, length, vocab, settings, stop):
        order.append((subject.label, length))
        error = trouble and trouble(subject.label, length, len(order))
        if error:
            raise error
        return Sample(10.0 * length, 5.0 + len(order), 1000), None

    monkeypatch.setattr(measure, "measure", one)
    monkeypatch.setattr(measure, "warm_up", lambda *a: None)
    return order


def compare(stop=lambda: False) -> dict:
    subjects = [Subject(x, None, 1, "") for x in "ab"]
    told = lambda label, done, total: None  # noqa: E731
    settings = Settings(1, 1, None, 64, 0)
    return measure.compare(subjects, (1, 2), 2, 9, settings, stop, told, cli.is_out_of_memory)


def test_models_take_turns(monkeypatch):
    order = fake(monkeypatch)
    cells = compare()
    first, second = order[:4], order[4:]
    assert first == [("a", 1), ("b", 1), ("a", 2), ("b", 2)]
    assert second == [("b", 1), ("a", 1), ("b", 2), ("a", 2)]
    assert all(len(c.samples) == 2 for c in cells.values())


def test_out_of_memory_leaves_the_others(monkeypatch, capsys):
    full = RuntimeError("[malloc] Unable to allocate 9 bytes")
    order = fake(monkeypatch, lambda label, n, i: full if (label, n) == ("b", 2) else None)
    cells = compare()
    assert order.count(("b", 2)) == 1 and len(cells["a", 2].samples) == 2
    found = bench_report.rows(cells, 1.0, None)
    assert [r.get("error") for r in found] == [None, None, None, "out of memory"]
    assert "out of memory" in bench_report.table(found)[4]
    fake(monkeypatch, lambda label, n, i: RuntimeError("something else"))
    with pytest.raises(RuntimeError, match="something else"):
        compare()


def test_what_was_measured_before_an_interrupt_is_kept(monkeypatch):
    order = fake(monkeypatch)
    cells = compare(stop=lambda: len(order) >= 3)
    assert [len(c.samples) for c in cells.values()] == [1, 1, 1, 0]
    found = bench_report.rows(cells, 1.0, None)
    assert len(found) == 3 and len(bench_report.table(found)) == 4


def test_interrupt_of_the_program(tiny_model_dir, monkeypatch, capsys):
    """SIGINT after the third measurement: figures so far, JSON on the last line, 130."""
    calls, real = [], measure.measure

    def one(*args):
        calls.append(args)
        if len(calls) == 4:  # during this one, which is given up
            os.kill(os.getpid(), signal.SIGINT)
        return real(*args)

    monkeypatch.setattr(measure, "measure", one)
    code = main(["bench", str(tiny_model_dir), *SMALL, "--runs", "1000", "--quiet"])
    out, err = capsys.readouterr()
    said = json.loads(out.splitlines()[-1])
    assert code == 130 and said["interrupted"] and "Interrupted" in err and len(calls) == 4
    assert [r["runs"] for r in said["rows"]] == [2, 1]


def test_chips_that_the_model_knows(monkeypatch, tiny):
    monkeypatch.setattr(mx, "device_info", lambda *a: {"device_name": "Apple M2 Max"})
    assert measure.bandwidth(tiny[0]) == (400, 13.6, "400 GB/s, as Apple states for the M2 Max")
    monkeypatch.setattr(mx, "device_info", lambda *a: {"device_name": "Apple M9"})
    speed, tflops, source = measure.bandwidth(tiny[0])
    assert 0.01 < speed < 20000 and tflops is None and "measured here" in source


def test_rows_and_prediction():
    floor = predict.Floor(weights=10**9, kv=0, state=0, flops=0)
    cells = {("m", 7): Cell([Sample(9, 4, 5), Sample(7, 6, 8)], floor)}
    (row,) = bench_report.rows(cells, 10.0, None)
    assert row["decode_tps"] == {"median": 5, "min": 4, "max": 6} and row["peak_bytes"] == 8
    assert row["predicted_most_tps"] == 10 and "50 % of 10.0" in bench_report.table([row])[1]


@pytest.mark.parametrize("ratio", ["3:1", "full"])
def test_random_geometry(ratio, monkeypatch, capsys):
    small = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2}
    monkeypatch.setitem(predict.BASE_17B, "num_hidden_layers", 2)
    monkeypatch.setitem(bench.SIZES, "0.6b", {**small, "vocab_size": 64})
    code, lines, said = run(
        capsys, "--geometry", "0.6b", "--ratio", ratio, "--lengths", "5", *SMALL[2:]
    )
    assert code == 0 and said["rows"][0]["model"] == f"0.6b {ratio}"
    assert said["models"][0]["weights"] == "random, 4 bits"


@pytest.mark.parametrize(
    "argv, words",
    [
        (["m", "--ratio", "3:1"], "--ratio has no effect"),
        (["m", "--geometry", "0.6b"], "stands for MODEL"),
        (["--geometry", "0.6b", "--ratio", "5:1"], "'5:1'"),
        (["--geometry", "0.6b", "--ratio", "3:1,3:1"], "twice"),
        (["--geometry", "0.6b", "--dtype", "float16"], "--dtype has no effect"),
        (["m", "--kv-group-size", "32"], "--kv-group-size has no effect"),
        (["m", "--lengths", "0"], "length of 2"),
        (["m", "--lengths", "4K,4096"], "twice"),
        (["/no/model"], "does not exist"),
    ],
)
def test_wrong_flags(argv, words, capsys):
    assert main(["bench", *argv]) == 2
    out, err = capsys.readouterr()
    assert not out and words in err and len(err.strip().splitlines()) <= 2


def test_kv_bits_that_cannot_be(tiny_model_dir, capsys):
    assert main(["bench", str(tiny_model_dir), "--kv-bits", "4", *SMALL]) == 2  # head_dim 32
    assert "kv-group-size" in capsys.readouterr().err


def test_same_names_are_told_apart(tiny_model_dir, capsys):
    code, _, said = run(capsys, tiny_model_dir, "--vs", tiny_model_dir, *SMALL[:-4])
    assert len({m["model"] for m in said["models"]}) == 2
