"""Tests of the imports in robust_tf/serving: they go one way, and light modules do not load TensorFlow."""

import ast
import graphlib
import pathlib
import subprocess
import sys

import pytest

SERVING = pathlib.Path(__file__).parents[2] / "robust_tf" / "serving"
PACKAGE = "robust_tf.serving"
# Each package may import itself and the packages listed here.
MAY_IMPORT = {
    "wire": set(),
    "model": {"wire"},
    "artifacts": {"wire", "model", "client"},
    "publish": {"wire", "model", "artifacts"},
    "server": {"wire", "model"},
    "client": {"wire"},
    "local": {"wire", "model", "artifacts", "publish", "client"},
}


def module_name(path):
    parts = path.relative_to(SERVING).with_suffix("").parts
    return ".".join([PACKAGE, *(parts[:-1] if parts[-1] == "__init__" else parts)])


MODULES = {module_name(path): path for path in sorted(SERVING.rglob("*.py"))}


def imported(path):
    """Returns the modules of serving that a module imports, at the top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            submodules = {f"{node.module}.{alias.name}" for alias in node.names} & set(MODULES)
            found |= submodules or {node.module}
    return found & set(MODULES)


def test_packages_import_one_way():
    for name, path in MODULES.items():
        if name == PACKAGE:
            assert not imported(path)
            continue
        own = name.split(".")[2]
        others = {other.split(".")[2] for other in imported(path)} - {own}
        assert others <= MAY_IMPORT[own], f"{name} must not import {others - MAY_IMPORT[own]}"


def test_modules_import_each_other_without_a_circle():
    graph = {name: imported(path) for name, path in MODULES.items()}
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError


@pytest.mark.parametrize(
    "module",
    [
        "client",
        "client.rest_client",
        "artifacts",
        "artifacts.onnx_file",
        "artifacts.litert_file",
        "wire.json_arrays",
        "model.folders",
        "model.status",
        "server.serve_config",
    ],
)
def test_light_modules_do_not_import_tensorflow(module):
    heavy = "{'tensorflow', 'keras', 'grpc', 'tensorflow_serving'} & set(sys.modules)"
    code = f"import sys, {PACKAGE}.{module}; sys.exit(repr({heavy}) if {heavy} else 0)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("program", ["serve", "predict"])
def test_help_does_not_import_tensorflow(program):
    code = (
        f"import sys, robust_tf.{program} as program\n"
        "try:\n"
        f"    program.main(['{program}', '--help'])\n"
        "except SystemExit as stop:\n"
        "    assert stop.code == 0\n"
        "assert not {'tensorflow', 'keras', 'grpc', 'tensorflow_serving'} & set(sys.modules)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stderr) == (0, "")
    assert "--model_name: " in run.stdout
