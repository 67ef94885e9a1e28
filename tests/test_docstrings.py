"""The examples in docstrings run, and every public function and class has one, except for records and errors."""

import dataclasses
import doctest
import importlib
import inspect
import io
import pathlib
import re

import pytest

PACKAGE = pathlib.Path(__file__).parents[1] / "robust_tf"
# The packages that are used as a library. Everything in their `__all__` has an example.
PUBLIC = ["attacks", "data", "models", "training", "transfer"]


def module_name(path: pathlib.Path) -> str:
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


def number_of_examples(path: pathlib.Path) -> int:
    """Returns the number of examples that doctest runs: not those that only show a comment or need a download."""
    return len(re.findall(r"^ *>>> (?!#)(?!.*# doctest: \+SKIP)", path.read_text(encoding="utf-8"), re.MULTILINE))


EXAMPLES = {module_name(path): number_of_examples(path) for path in sorted(PACKAGE.rglob("*.py"))}


@pytest.mark.parametrize("name", [name for name, count in EXAMPLES.items() if count])
def test_the_examples_of_a_module_run(name, tmp_path, monkeypatch):
    serving = name.startswith(("robust_tf.serv", "robust_tf.predict"))  # needs the packages of an extra
    module = pytest.importorskip(name, exc_type=ModuleNotFoundError) if serving else importlib.import_module(name)
    monkeypatch.chdir(tmp_path)  # for examples that write files
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    report = io.StringIO()
    for example in doctest.DocTestFinder(exclude_empty=True).find(module):
        runner.run(example, out=report.write)
    assert runner.summarize(verbose=False).failed == 0, report.getvalue()
    assert runner.tries == EXAMPLES[name], f"{name} has examples that doctest does not find"


def needs_an_example(value: object) -> bool:
    """Functions and classes need one, except for records, whose attributes are described, errors and warnings."""
    if inspect.isclass(value):
        is_record = dataclasses.is_dataclass(value) or issubclass(value, tuple)
        return not is_record and not issubclass(value, Exception)
    return inspect.isfunction(value)


@pytest.mark.parametrize("package", PUBLIC)
def test_every_public_class_and_function_has_an_example(package):
    module = importlib.import_module(f"robust_tf.{package}")
    public = {name: getattr(module, name) for name in module.__all__}
    without = [
        name
        for name, value in public.items()
        if needs_an_example(value) and ">>> " not in (inspect.getdoc(value) or "")
    ]
    assert not without, f"robust_tf.{package}: no example in the docstrings of {', '.join(without)}"
