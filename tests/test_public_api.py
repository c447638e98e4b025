"""The public names: one list for programs and type checkers, every function annotated."""

import ast
import inspect
from pathlib import Path

import hydra_mlx
from hydra_mlx import generation

import pytest

SOURCE = Path(hydra_mlx.__file__)


def functions(name: str) -> list:
    """(name, function) of a public function, or of the public methods of a class."""
    found = getattr(hydra_mlx, name)
    if not inspect.isclass(found):
        return [(name, getattr(generation, name, found))]
    out = []
    for key, value in vars(found).items():
        f = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
        if inspect.isfunction(f) and (not key.startswith("_") or key in ("__init__", "__call__")):
            out.append((f"{name}.{key}", f))
    return out


@pytest.mark.parametrize("name", hydra_mlx.__all__)
def test_every_function_is_annotated(name):
    for label, f in functions(name):
        signature = inspect.signature(f)
        bare = [
            p.name
            for p in signature.parameters.values()
            if p.annotation is p.empty and p.name not in ("self", "cls")
        ]
        assert not bare and signature.return_annotation is not signature.empty, (label, bare)


def test_type_checkers_see_the_same_names():
    """What is imported under TYPE_CHECKING is what __getattr__ gives, from the same modules."""
    seen = {}
    for node in ast.parse(SOURCE.read_text()).body:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            for line in node.body:
                seen.update({a.name: line.module for a in line.names})
    assert seen == hydra_mlx._PUBLIC
    assert hydra_mlx.__all__ == sorted(hydra_mlx._PUBLIC)
    assert (SOURCE.parent / "py.typed").is_file()


def test_names_that_are_not_there():
    with pytest.raises(AttributeError, match="nope"):
        hydra_mlx.nope  # noqa: B018
    assert set(hydra_mlx.__all__) <= set(dir(hydra_mlx))
