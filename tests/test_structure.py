"""The shape of the package: imports go one way, and what is light stays light."""

import ast
import pathlib
import subprocess
import sys

import pytest

PACKAGE = pathlib.Path(__file__).parents[1] / "robust_tf"
# Each layer may import itself and what stands below it.
LAYERS = [
    {"train", "evaluate", "export", "convert", "serve", "predict", "visualize"},  # the programs
    {"reporting"},
    {"job"},
    {"serving", "evaluation"},
    {"training"},
    {"transfer"},
    {"attacks", "data", "models", "results"},
    {"config"},
    {"flags", "console"},
    {"errors", "files", "environment", "json_records", "keras_backend", "statistics"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
MODULES = [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]


def part_of(path: pathlib.Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_parts(path: pathlib.Path) -> set[str]:
    """The parts of the package that a module imports, at its top or inside a function."""
    parts = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
            if node.module == "robust_tf":
                names = [f"robust_tf.{alias.name}" for alias in node.names]
        parts |= {name.split(".")[1] for name in names if name.startswith("robust_tf.")}
    return parts


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_one_way(path):
    own = part_of(path)
    assert own in LEVEL, f"{own} has no place in the layers of this test"
    for other in imported_parts(path) - {own, "__version__"}:
        assert LEVEL[other] >= LEVEL[own], f"{path.name} ({own}) must not import {other}"
        programs = LAYERS[0]
        assert other not in programs, f"{path.name} imports the program {other}"


def test_importing_the_package_does_not_import_tensorflow():
    code = "import sys, robust_tf, robust_tf.config.job; assert not {'tensorflow', 'keras'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
