"""The structure of the package: imports go one way without circles, the package is quick to import, files are short."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "robust_tf"
# Each layer may import itself and the layers below it.
LAYERS = [
    {"train", "evaluate", "export", "convert", "serve", "predict", "visualize", "study"},  # the programs
    {"studies"},
    {"job"},
    {"reporting"},
    {"serving", "evaluation"},
    {"tasks"},
    {"training"},
    {"transfer"},
    {"attacks", "data", "models", "results"},
    {"config"},
    {"flags", "console"},
    {"errors", "files", "sharing", "environment", "json_records", "keras_backend", "statistics"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
# Packages that are a public interface: `__all__` lists it.
PUBLIC = ["attacks", "config", "data", "models", "training", "transfer"]
MAX_LINES = 400  # without docstrings


def module_name(path: pathlib.Path) -> str:
    """Returns the dotted name of a module or package, such as "robust_tf.attacks.pgd"."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imported_modules(name: str) -> set[str]:
    """Returns the modules of this package that a module imports: at its top, in functions and for type checkers.

    Importing "robust_tf.attacks.pgd" also runs the `__init__` of "robust_tf.attacks". That does not count: it would
    make every package a circle.
    """
    imported: set[str] = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} has a relative import"
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                imported.add(submodule if submodule in MODULES else str(node.module))
    return (imported & set(MODULES)) - {"robust_tf"}


IMPORTS = {name: imported_modules(name) for name in MODULES}


def part_of(name: str) -> str:
    """The room of a module: the first name after "robust_tf"."""
    return name.split(".")[1]


def circles(imports: dict[str, set[str]]) -> list[list[str]]:
    """Returns the groups of modules that import each other, directly or by way of others."""
    reached: dict[str, set[str]] = {}
    for start in imports:
        reached[start], waiting = set(), [start]
        while waiting:
            new = imports[waiting.pop()] - reached[start]
            reached[start] |= new
            waiting.extend(new)
    groups = {frozenset(other for other in reached[name] if name in reached[other]) for name in imports}
    return sorted(sorted(group) for group in groups if group)


@pytest.mark.parametrize("name", [name for name in MODULES if name != "robust_tf"])
def test_imports_go_one_way(name):
    own = part_of(name)
    assert own in LEVEL, f"{own} has no place in the layers of this test"
    for other in {part_of(imported) for imported in IMPORTS[name]} - {own}:
        assert LEVEL[other] >= LEVEL[own], f"{name} must not import {other}"
        assert other not in LAYERS[0], f"{name} imports the program {other}"


def test_no_modules_import_each_other_in_a_circle():
    assert circles(IMPORTS) == []


def test_a_circle_is_found():
    imports = {"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"d", "a"}}
    assert circles(imports) == [["b", "c"], ["d"]]


def lines_without_docstrings(source: str) -> int:
    """Returns the number of lines of a module. Docstrings do not count, so that nobody shortens them to pass."""
    count = len(source.splitlines())
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            docstring = node.body[0]
            count -= (docstring.end_lineno or docstring.lineno) - docstring.lineno + 1
    return count


@pytest.mark.parametrize("name", MODULES)
def test_no_file_is_too_long(name):
    assert lines_without_docstrings(MODULES[name].read_text(encoding="utf-8")) <= MAX_LINES


@pytest.mark.parametrize("package", PUBLIC)
def test_a_package_lists_what_is_public(package):
    module = ast.parse((PACKAGE / package / "__init__.py").read_text(encoding="utf-8"))
    assigned = [target for node in module.body if isinstance(node, ast.Assign) for target in node.targets]
    assert "__all__" in map(ast.unparse, assigned)


def test_importing_the_package_does_not_import_tensorflow():
    code = "import sys, robust_tf, robust_tf.config.job; assert not {'tensorflow', 'keras'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
