"""The kernels' texts are found from a checkout and from an installed package."""

import shutil
import subprocess
import sys
from pathlib import Path

from hydra_mlx.kernels import loader

ROOT = Path(__file__).parents[1]


def test_found_in_a_checkout():
    assert loader.metal_dir() == ROOT / "metal"


def test_found_inside_an_installed_package(tmp_path):
    """As the wheel lays it out: metal/ inside hydra_mlx/, nothing beside it."""
    ignore = shutil.ignore_patterns("models", "__pycache__")  # 100 MB that do not matter here
    shutil.copytree(ROOT / "hydra_mlx", tmp_path / "hydra_mlx", ignore=ignore)
    shutil.copytree(ROOT / "metal", tmp_path / "hydra_mlx" / "metal")
    code = "from hydra_mlx.kernels.loader import metal_dir; print(metal_dir())"
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert Path(out.stdout.strip()) == tmp_path / "hydra_mlx" / "metal"


def test_ci_runs_the_readme_lines():
    """The README's two lines stand word for word in .ci/run."""
    ci = (ROOT / ".ci" / "run").read_text()
    lines = [x for x in (ROOT / "README.md").read_text().splitlines() if x.startswith("python3 -m")]
    assert len(lines) == 2
    assert all(line in ci.splitlines() for line in lines)
