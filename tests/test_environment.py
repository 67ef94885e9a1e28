"""A Keras backend other than TensorFlow is refused in one sentence, before anything else fails."""

import json
import pathlib
import subprocess
import sys
import types

import pytest

from robust_tf.environment import check_keras_backend, set_tensorflow_defaults
from robust_tf.errors import UserError

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture
def without_keras(monkeypatch, tmp_path):
    """Simulates a process that has not imported Keras yet, with Keras's settings in `tmp_path`."""
    monkeypatch.delitem(sys.modules, "keras")
    monkeypatch.delenv("KERAS_BACKEND", raising=False)
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))


def test_tensorflow_is_accepted(without_keras, monkeypatch, tmp_path):
    check_keras_backend()
    (tmp_path / "keras.json").write_text("no JSON")
    check_keras_backend()
    (tmp_path / "keras.json").write_text(json.dumps({"backend": "jax"}))
    monkeypatch.setenv("KERAS_BACKEND", "tensorflow")  # takes precedence over the file
    check_keras_backend()


def test_another_backend_is_refused_with_its_origin(without_keras, monkeypatch, tmp_path):
    (tmp_path / "keras.json").write_text(json.dumps({"backend": "torch"}))
    with pytest.raises(UserError, match="backend 'torch' from .*keras.json. Set KERAS_BACKEND=tensorflow"):
        check_keras_backend()
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    with pytest.raises(UserError, match="backend 'jax' from the environment variable KERAS_BACKEND"):
        check_keras_backend()
    # A Keras that is already imported counts, whatever the variable says.
    config = types.SimpleNamespace(backend=lambda: "torch")
    monkeypatch.setitem(sys.modules, "keras", types.SimpleNamespace(config=config))
    with pytest.raises(UserError, match="backend 'torch' from the Keras that is already imported"):
        check_keras_backend()


def test_a_program_ends_with_one_line_on_stderr(without_keras, monkeypatch, capsys):
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    with pytest.raises(SystemExit) as raised:
        set_tensorflow_defaults()
    assert raised.value.code == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1) and err.startswith("error: robust_tf needs Keras on TensorFlow.")


@pytest.mark.parametrize("part", ["attacks", "models", "training", "transfer"])
def test_a_package_refuses_the_backend_before_it_imports_keras(part):
    code = f"import robust_tf\ntry:\n  import robust_tf.{part}\nexcept ValueError as error:\n  print(error)"
    code += "\nimport sys\nassert not {'keras', 'tensorflow'} & set(sys.modules)"
    environment = {"KERAS_BACKEND": "jax", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert "Received: the backend 'jax'" in done.stdout
