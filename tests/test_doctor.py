"""hydra-mlx doctor: lines, exit codes, wrong kernels, the deadline, and a report without names."""

import re
import sys

import hydra_mlx  # noqa: F401  (before mlx: it chooses the BLAS library)
from hydra_mlx import diagnosis, doctor, kernel_checks, redact
from hydra_mlx.__main__ import main
from hydra_mlx.diagnosis import FAIL, OK, WARN
from hydra_mlx.kernels import dispatch
from hydra_mlx.kernels.dispatch import Backend

import mlx.core as mx
import pytest

from .kernel_host import host_run
from .metal_host.testing import needs_metal_host
from .test_info import in_terminal

KERNELS = ("hydra_decode", "la_decode", "la_prefill", "fa_decode", "fa_prefill")


def examine(capsys, *argv) -> tuple:
    """(exit code, {(status, what): [found]}, stdout)."""
    code = main(["doctor", *map(str, argv)])
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    found: dict = {}
    for line in out.splitlines():
        match = re.match(r"(ok   |warn |fail ) (.{12}) (.*)", line)
        if match:
            status, what, said = match.groups()
            found.setdefault((status.strip(), what.strip()), []).append(said)
    return code, found, out


def test_here(capsys):
    code, found, out = examine(capsys, "--deadline", 0)
    assert code == 0 and not [k for k in found if k[0] == FAIL], out
    assert "\x1b" not in out
    assert "hydra_mlx " in found[OK, "program"][0] and "mlx 0." in found[OK, "packages"][0]
    assert "difference" in found[OK, "arithmetic"][0]
    if dispatch.route()[0] == "ops":
        assert "operations" in found[OK, "kernels"][0]


def small(monkeypatch, wrong: str | None = None):
    """Kernels on the host runtime, one head dim; `wrong` names one that errs by 10 %."""

    def run(launch):
        out = host_run(launch)[0]
        return [out[0] * 1.1, *out[1:]] if launch.kernel.name == wrong else out

    def few(backend, own, own_dtype):
        seen = {}
        for layer in range(3):
            args = kernel_checks.small_args(64)
            for check in kernel_checks._layer_checks(args, layer, mx.float32, backend):
                seen.setdefault(check.name, check)
        yield from seen.values()

    monkeypatch.setattr(kernel_checks, "checks", few)
    return dispatch.substitute(Backend("metal", run, 4))


@needs_metal_host
def test_kernels_agree_on_the_host_runtime(monkeypatch, capsys):
    with small(monkeypatch):
        code, found, out = examine(capsys, "--deadline", 0)
    assert code == 0, out
    assert {x.split(":")[0] for x in found[OK, "kernel"]} == set(KERNELS)


@needs_metal_host
@pytest.mark.parametrize(
    "wrong, named", [("hydra_combine", "hydra_decode"), ("fa_prefill", "fa_prefill")]
)
def test_a_wrong_kernel_fails(wrong, named, monkeypatch, capsys):
    trusted = dict(dispatch.TRUST.passed), dict(dispatch.TRUST.failed)
    with small(monkeypatch, wrong):
        code, found, out = examine(capsys, "--deadline", 0, "--verbose")
    assert code == 1
    assert {x.split(",")[0] for x in found[FAIL, "kernel"]} == {named}
    assert "differs from its twin by 0.1" in found[FAIL, "kernel"][0] and "--report" in out
    assert {x.split(",")[0] for x in found[OK, "kernel"]} == set(KERNELS) - {named}
    assert trusted == (dispatch.TRUST.passed, dispatch.TRUST.failed)  # it changes nothing


def test_every_kernel_is_asked_for():
    backend = Backend("metal", host_run, 4)
    names = [c.name for c in kernel_checks.checks(backend, None, mx.bfloat16)]
    assert len(names) == len(set(names))
    for kernel in KERNELS:
        for D in (64, 128):
            assert any(n.startswith(kernel) and f" of {D}," in n for n in names), (kernel, D)
    own = kernel_checks.small_args(64, num_attention_heads=6, full_attention_heads=[[5]] * 3)
    mine = [c.name for c in kernel_checks.checks(backend, own, mx.float16)]
    assert "1 FA and 5 LA heads of 64, float16" in mine[1] and len(mine) > len(names)
    odd = kernel_checks.small_args(80, num_attention_heads=4)  # no kernel for attention of 80
    only = [c.name for c in kernel_checks.checks(backend, odd, mx.float16)]
    assert not [n for n in only if " of 80," in n]


@needs_metal_host
def test_deadline(monkeypatch, capsys):
    with small(monkeypatch):
        code, found, out = examine(capsys, "--deadline", 0.001)
    assert (
        code == 0 and "not reached in 0.001 s" in found[WARN, "time"][0] and "--deadline 0" in out
    )


def test_a_model_that_computes_wrong_fails(monkeypatch, capsys):
    monkeypatch.setattr(kernel_checks.reference, "log_length_scale", lambda t, a: 1.1 + 0 * t)
    code, found, out = examine(capsys, "--deadline", 0)
    assert code == 1 and "differs by" in found[FAIL, "arithmetic"][0] and "Do not trust" in out


def test_model_folders(tiny_model_dir, tmp_path, capsys):
    code, found, out = examine(capsys, tiny_model_dir, "--deadline", 0)
    assert code == 0 and "has a chat template" in found[OK, "tokenizer"][0]
    assert "hydra-mlx convert" in out  # spec form is slower
    broken = tmp_path / "broken"
    broken.mkdir()
    for p in tiny_model_dir.iterdir():
        (broken / p.name).write_bytes(p.read_bytes())
    (broken / "tokenizer.json").write_bytes(b'{"version": "1.0"')
    code, found, _ = examine(capsys, broken, "--deadline", 0)
    assert code == 1 and len(found[FAIL, "tokenizer"]) == 1
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    code, found, out = examine(capsys, broken, "--deadline", 0)
    assert code == 1 and "does not fit the file" in found[FAIL, "model"][0]
    assert (FAIL, "tokenizer") not in found and (OK, "arithmetic") in found
    assert main(["doctor", str(tmp_path / "gone")]) == 2


def test_manifest_sizes(tmp_path):
    from hydra_mlx.manifest import MANIFEST

    assert diagnosis._manifest(tmp_path) == []
    (tmp_path / "model.safetensors").write_bytes(b"12345")
    for text, status in (
        ('{"files": {"model.safetensors": {"bytes": 5}}}', OK),
        ('{"files": {"model.safetensors": {"bytes": 6}}}', FAIL),
        ('{"files": {"gone.safetensors": {"bytes": 6}}}', FAIL),
        ('{"files": 3}', FAIL),
        ("{", FAIL),
    ):
        (tmp_path / MANIFEST).write_text(text)
        assert [x.status for x in diagnosis._manifest(tmp_path)] == [status], text


def test_wrong_setting_is_said(monkeypatch, capsys):
    monkeypatch.setenv("HYDRA_KERNELS", "vulkan")
    code, found, _ = examine(capsys)
    assert code == 1 and "'vulkan'" in found[FAIL, "backend"][0]
    monkeypatch.setenv("HYDRA_KERNELS", "ops")
    code, found, _ = examine(capsys)
    assert code == 0 and "HYDRA_KERNELS=ops" in found[WARN, "backend"][0]


def test_what_breaks_is_a_line(monkeypatch, capsys):
    def broken():
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(diagnosis, "disk", broken)
    code, found, _ = examine(capsys)
    assert code == 1 and "Permission denied" in found[FAIL, "hub cache"][0]


@pytest.mark.parametrize(
    "version, wanted, fine",
    [
        ("0.32.4", ">=0.32.4,<0.33", True),
        ("0.32.3", ">=0.32.4,<0.33", False),
        ("0.33.0", ">=0.32.4,<0.33", False),
        ("0.32.10", ">=0.32.4,<0.33", True),
        ("2.0", "", True),
        ("1.26.4", ">=1.26", True),
    ],
)
def test_versions(version, wanted, fine):
    assert diagnosis.satisfies(version, wanted) is fine


def test_requirements_are_found():
    assert sorted(diagnosis.requirement("mlx-lm").split(",")) == ["<0.33", ">=0.32.2"]
    assert ">=0.32.4" in diagnosis.requirement("mlx")
    assert diagnosis.requirement("nothing") == ""


@pytest.mark.parametrize(
    "limit, status", [("0", OK), ("12000", OK), ("16300", WARN), (None, WARN), ("x", WARN)]
)
def test_wired_limit(limit, status):
    assert diagnosis.wired(16 * 2**30, limit).status == status


def test_wired_limit_is_raised_with_care():
    assert "wired_limit_mb=12288" in diagnosis.wired(16 * 2**30, "0").todo
    assert "wired_limit_mb=55705" in diagnosis.wired(64 * 2**30, "0").todo
    assert not diagnosis.wired(8 * 2**30, "0").todo


# ---------------------------------------------------------------------------------- the report


def test_report_has_no_names(tiny_model_dir, tmp_path, monkeypatch, capsys):
    home = tmp_path / "Users" / "jane"
    folder = home / "secret-project" / "model"
    folder.mkdir(parents=True)
    for p in tiny_model_dir.iterdir():
        (folder / p.name).write_bytes(p.read_bytes())
    (folder / "tokenizer.json").unlink()  # its error names the folder
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("HF_TOKEN", "hf_very_secret")
    monkeypatch.setenv("HF_ENDPOINT", "https://jane:password@hub")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", "/Volumes/janes-disk/hub")
    monkeypatch.setenv("HYDRA_BLAS", "auto")
    monkeypatch.setattr("platform.node", lambda: "janes-laptop")
    monkeypatch.setattr("getpass.getuser", lambda: "jane")
    out = tmp_path / "report.txt"
    code, found, _ = examine(capsys, folder, "--report", out)
    text = out.read_text()
    assert code == 1 and "tokenizer" in text and "HYDRA_BLAS=auto" in text
    assert "HF_ENDPOINT is set" in text and "model" in text
    for secret in ("jane", "secret", "password", "/Volumes", str(tmp_path)):
        assert secret not in text, f"{secret} in {text}"


def test_report_overwrites_nothing(tmp_path, capsys):
    (tmp_path / "r").write_text("mine")
    assert main(["doctor", "--report", str(tmp_path / "r")]) == 2
    assert main(["doctor", "--report", str(tmp_path / "no" / "r")]) == 2
    assert (tmp_path / "r").read_text() == "mine" and not capsys.readouterr().out


def test_names_in_text(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ann")
    monkeypatch.setattr("getpass.getuser", lambda: "ann")
    said = redact.without_names(
        "/home/ann/x /Users/bob/y '/home/ann' channel /mnt/ann/z /home/annex"
    )
    assert said == "~/x ~/y '~' channel /mnt/USER/z ~"


def test_colours(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    argv = [sys.executable, "-m", "hydra_mlx", "doctor"]
    assert "\x1b[32mok" in in_terminal(argv)
    assert "\x1b" not in in_terminal(argv, NO_COLOR="1")


def test_a_line_cannot_move_the_cursor():
    assert "\x1b" not in doctor.shown(diagnosis.Line(OK, "model", "\x1b[2Jname", "\x1b[0m"))
