"""The memory plan against measured bytes, its messages, and the prompt's peak that it describes."""

import sys
from dataclasses import replace
from pathlib import Path

import hydra_mlx
from hydra_mlx import machine as machines
from hydra_mlx import memory_plan
from hydra_mlx.cache import cache_bytes, own_cache, quantise_cache
from hydra_mlx.errors import UsageError
from hydra_mlx.kv_cache import kv_format
from hydra_mlx.machine import Machine, machine
from hydra_mlx.memory_plan import MemoryPlan, alternatives, at_ratio, check, plan_of
from hydra_mlx.ops import attention, partial
from hydra_mlx.predict import geometry, weight_bytes

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm.generate import generate_step

from .test_model_kernels import make_model

GIB = 2**30


def read(model, cache, tokens: int, step: int) -> int:
    """MLX's peak above what was held before a prompt of so many tokens."""
    ids = mx.random.randint(0, model.args.vocab_size, (tokens,), key=mx.random.key(1))
    mx.eval(ids, model.parameters())
    mx.clear_cache()
    held = mx.get_active_memory()
    mx.reset_peak_memory()
    for _ in generate_step(ids, model, max_tokens=0, prompt_cache=cache, prefill_step_size=step):
        pass
    return mx.get_peak_memory() - held


@pytest.mark.parametrize("few", [None, (8, 4)], ids=str)
@pytest.mark.parametrize("heads", [[[0, 1, 3], [], [0, 1, 2, 3]], [[0]] * 3], ids=["odd", "3:1"])
def test_plan_is_what_a_prompt_takes(few, heads):
    model = make_model(full_attention_heads=heads, hidden_size=128, intermediate_size=256)
    cache = own_cache(model.make_cache())
    if few is not None:
        quantise_cache(cache, few, 32)
    own_cache(cache, 2300)
    plan = plan_of(model, 2300, 512, kv_format(cache[0]))
    assert plan.weights == sum(x.nbytes for _, x in tree_flatten(model.parameters()))
    peak = read(model, cache, 2300, 512)
    assert cache_bytes(cache) == (plan.kv, plan.state)
    assert plan.kv >= 2304 * plan.token_bytes
    grew = plan.total - plan.weights
    assert 0.6 * grew < peak < 1.15 * grew, (peak / 2**20, plan.text())
    assert plan.fits(grew + plan.token_bytes) == 2304


def test_prompt_memory_does_not_grow_with_the_prompt(monkeypatch):
    """Beyond the cache, 1024 and 4096 tokens have the same peak; benchmarks/prefill_memory.py."""
    monkeypatch.setattr(attention, "SCORES", 2**16)
    monkeypatch.setattr(partial, "LEAST_KEYS", 64)
    for few in (None, (4, 4)):
        beyond = []
        for n in (1024, 4096):
            model = make_model(full_attention_heads=[[0], [3], [1]])
            cache = own_cache(model.make_cache())
            if few is not None:
                quantise_cache(cache, few, 32)
            own_cache(cache, n)
            beyond.append(read(model, cache, n, 128) - sum(cache_bytes(cache)))
        assert max(beyond) < 1.05 * min(beyond), (few, beyond)


def test_a_million_tokens_at_7_to_1():
    """The target geometry: what the plan says of it, by hand."""
    args = geometry("7:1")
    plan = MemoryPlan(args, 2**20, 512, weight_bytes(args), 4, 4, kernels=True)
    assert plan.token_bytes == 28 * 2 * 2 * 128 * 0.5625
    assert plan.kv == 2**20 * 8064
    assert plan.total < 12 * GIB < replace(plan, k_bits=8, v_bits=8).total
    mixed = replace(plan, k_bits=8, v_bits=4)
    assert mixed.token_bytes == 28 * 2 * 128 * (1.0625 + 0.5625)


def test_messages():
    args = geometry("full")
    plan = MemoryPlan(args, 131072, 2048, weight_bytes(args), kernels=True, checkpoints=GIB)
    said = []
    check(plan, Machine(64 * GIB, "is free on this machine"), 131072, said.append)
    assert said[0].startswith("memory: ") and "64.0 GiB is free on this machine" in said[0]
    assert "131,072 tokens" in said[0] and "checkpoints 1.0 GiB" in said[0]
    said.clear()
    check(plan, Machine(64 * GIB, ""), 8191, said.append)
    check(plan, None, 8191, said.append)
    assert not said  # short prompts are left alone
    check(plan, None, 8192, said.append)
    assert len(said) == 1
    with pytest.raises(UsageError) as e:
        check(plan, Machine(8 * GIB, "is left on the GPU"), 10, said.append)
    assert "8.0 GiB is left on the GPU" in e.value.message and "131,072 tokens" in e.value.message
    for words in ("as it is: ", "--kv-bits 4: ", "--prefill-step-size 512: ", "model at 7:1"):
        assert words in e.value.hint, e.value.hint
    half = plan.kv // 2
    check(plan, Machine(plan.total - plan.weights - half, ""), 10, said.append, half)
    few = replace(plan, k_bits=4, v_bits=4, step=512, args=geometry("7:1"))
    assert len(alternatives(few, 8 * GIB)) == 1  # nothing smaller to offer
    assert few.fits(0) == 0


def test_ratios_of_any_geometry():
    for name, ratio in (("3:1", 3), ("7:1", 7)):
        mine = at_ratio(geometry("full"), ratio)
        assert len(mine.full_attention_heads[0]) == len(geometry(name).full_attention_heads[0])
    sizes = {"num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64}
    odd = replace(geometry("full"), **sizes, full_attention_heads=[[0]] * 28)
    assert at_ratio(odd, 3).full_attention_heads[0] == [0, 3]


def test_checks_of_the_program(program, monkeypatch, tmp_path):
    poor = Machine(1000, "is free on this machine")
    monkeypatch.setattr(machines, "machine", lambda: poor)
    code, out, err = program("generate", "Hello", "-m", "4")
    assert code == 2 and not out
    assert "but 1000 B is free on this machine" in err and "What fits, as it is: 0 tokens" in err
    assert program("generate", "Hello", "-m", "4", "--no-memory-plan")[0] == 0
    monkeypatch.setattr(machines, "machine", lambda: Machine(GIB, "is free on this machine"))
    monkeypatch.setattr(memory_plan, "LONG", 5)
    code, _, err = program(
        "generate", "Hello", "-m", "4", "--kv-bits", "8,4", "--kv-group-size", "32"
    )
    assert code == 0 and "memory: " in err and "in 8,4 bits" in err
    code, _, err = program("generate", "Hello", "-m", "4", "--quiet")
    assert code == 0 and not err


def test_kv_bits_of_the_program(program):
    code, _, err = program(
        "generate", "Hello", "-m", "4", "--kv-bits", "8,4", "--kv-group-size", "32", "--stats",
        "text",
    )  # fmt: skip
    assert code == 0 and "kv-bits 8,4: 2/2" in err
    for words in ("8,4,2", "x", "8,", ""):
        code, _, err = program("generate", "Hello", "--kv-bits", words)
        assert code == 2 and "two such as 8,4" in err, err
    code, _, err = program("generate", "Hello", "--kv-bits", "8,7", "--kv-group-size", "32")
    assert code == 2 and "kv-bits is 8,7, expected one of 2, 3, 4, 5, 6, 8" in err


def test_prompt_cache_in_different_bits(program, tmp_path):
    file = tmp_path / "c.bin"
    few = ("--kv-bits", "8,4", "--kv-group-size", "32")
    shared = ("--ignore-chat-template", "--prompt-cache", file, "-m", "4")
    assert program("generate", "Hello there", *shared, *few)[0] == 0
    stored = hydra_mlx.prompt_cache.load_cache(file)
    assert kv_format(stored.cache[0]) == (8, 4, 32)
    code, _, err = program("generate", f"{stored.text} more", *shared)
    assert code == 0 and "in 8,4 bits; keeping to that" in err
    grown = hydra_mlx.prompt_cache.load_cache(file)
    assert len(grown.tokens) > len(stored.tokens) and kv_format(grown.cache[0]) == (8, 4, 32)
    code, _, err = program(
        "generate", f"{grown.text} x", *shared, "--kv-bits", "4", "--kv-group-size", "32"
    )
    assert code == 2 and "Use --kv-bits 8,4 --kv-group-size 32" in err


# ------------------------------------------------------------------------------------- machine


def system(root: Path, files: dict) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


MEMINFO = "MemTotal:       32000000 kB\nMemAvailable:    8000000 kB\n"


@pytest.mark.skipif(mx.default_device().type == mx.gpu, reason="the machine's own memory")
def test_machine(tmp_path):
    root = system(tmp_path / "plain", {"proc/meminfo": MEMINFO})
    assert machine(root) == Machine(8000000 * 1024, "is free on this machine")
    version2 = {
        "proc/meminfo": MEMINFO,
        "proc/self/cgroup": "0::/user/job\n",
        "sys/fs/cgroup/user/memory.max": "3000000000\n",
        "sys/fs/cgroup/user/memory.current": "1000000000\n",
        "sys/fs/cgroup/user/job/memory.max": "max\n",
        "sys/fs/cgroup/user/job/memory.current": "5\n",
    }
    found = machine(system(tmp_path / "two", version2))
    assert found == Machine(2000000000, "is left of this container's limit")
    version1 = {
        "proc/meminfo": MEMINFO,
        "proc/self/cgroup": "5:cpu:/x\n4:memory:/docker/abc\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "1000000\n",
        "sys/fs/cgroup/memory/memory.usage_in_bytes": "2000000\n",
    }
    assert machine(system(tmp_path / "one", version1)).free == 0
    unlimited = {**version1, "sys/fs/cgroup/memory/memory.limit_in_bytes": str(2**63 - 4096)}
    assert machine(system(tmp_path / "free", unlimited)).free == 8000000 * 1024
    assert machine(tmp_path / "nothing").free > 2**20  # the physical memory, at least
    if sys.platform == "linux":
        assert machine().free < 2**45


def test_gpu_memory():
    metal = {"max_recommended_working_set_size": 12 * GIB, "memory_size": 16 * GIB}
    assert machines._gpu(metal, 2 * GIB).free == 10 * GIB
    assert machines._gpu({"total_memory": 80 * GIB}, GIB).free == 79 * GIB
    assert machines._gpu({"free_memory": 7, "total_memory": 80}, 1).free == 7
    assert machines._gpu({}, 1) is None
