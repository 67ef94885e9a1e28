"""A Keras backend other than TensorFlow is refused in one sentence, before anything else fails."""

import json
import os
import pathlib
import subprocess
import sys
import types

import pytest

from robust_tf import environment
from robust_tf.environment import check_keras_backend, seal_xla_cache, set_tensorflow_defaults, use_xla_cache
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


@pytest.fixture
def without_tensorflow(monkeypatch):
    """Simulates a process that has not imported TensorFlow yet, without settings for XLA."""
    monkeypatch.delitem(sys.modules, "tensorflow")
    monkeypatch.delenv("TF_XLA_FLAGS", raising=False)
    monkeypatch.setattr(environment, "_xla_programs", None)
    monkeypatch.setattr(environment.atexit, "register", lambda function: None)


def cached_programs() -> pathlib.Path:
    return pathlib.Path(os.environ["TF_XLA_FLAGS"].partition('directory="')[2].removesuffix('"'))


def test_the_cache_of_xla_is_below_the_folder_and_keeps_other_flags(without_tensorflow, monkeypatch, tmp_path):
    monkeypatch.setenv("TF_XLA_FLAGS", "--tf_xla_min_cluster_size=3")
    use_xla_cache(tmp_path)
    assert os.environ["TF_XLA_FLAGS"].startswith("--tf_xla_min_cluster_size=3 --tf_xla_persistent_cache_directory=")
    assert cached_programs().parent == tmp_path / "xla"
    before = os.environ["TF_XLA_FLAGS"]
    use_xla_cache(tmp_path)  # as after a restart of the process, which keeps its environment
    assert os.environ["TF_XLA_FLAGS"] == before


@pytest.mark.parametrize("flags", ["--tf_xla_persistent_cache_directory=/mine", "file_of_flags"])
def test_a_cache_that_the_user_has_chosen_stays(without_tensorflow, monkeypatch, tmp_path, flags):
    monkeypatch.setenv("TF_XLA_FLAGS", flags)
    use_xla_cache(tmp_path)
    assert os.environ["TF_XLA_FLAGS"] == flags and not list(tmp_path.iterdir())


def test_other_settings_and_versions_have_other_folders(without_tensorflow, monkeypatch, tmp_path):
    folders = []
    for settings in ({}, {"deterministic": True}, {"tf32": False}):
        monkeypatch.delenv("TF_XLA_FLAGS", raising=False)
        use_xla_cache(tmp_path, **settings)
        folders.append(cached_programs())
    monkeypatch.delenv("TF_XLA_FLAGS")
    monkeypatch.setattr(environment, "_version", lambda name: "99")
    use_xla_cache(tmp_path)
    assert len({*folders, cached_programs()}) == 4


def test_only_sealed_and_undamaged_programs_are_kept(without_tensorflow, monkeypatch, tmp_path):
    use_xla_cache(tmp_path)
    programs = cached_programs()
    for name in ("good", "damaged", "empty"):
        (programs / f"{name}.pb").write_bytes(name.encode())
    assert seal_xla_cache() == 3 and seal_xla_cache() == 0
    (programs / "damaged.pb").write_bytes(b"damagee")
    (programs / "empty.pb").write_bytes(b"")
    (programs / "unsealed.pb").write_bytes(b"unsealed")
    use_xla_cache(tmp_path)
    assert sorted(path.name for path in programs.iterdir()) == ["good.pb", "good.pb.sha256"]
    monkeypatch.setattr(environment, "_XLA_CACHE_BYTES", 3)
    use_xla_cache(tmp_path)  # the oldest files go where there is too much
    assert not (programs / "good.pb").exists()


def test_a_cache_that_cannot_be_written_is_one_warning(without_tensorflow, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    use_xla_cache(tmp_path / "file")
    assert "TF_XLA_FLAGS" not in os.environ and seal_xla_cache() is None
    assert capsys.readouterr().err.startswith("warning: XLA's programs are not kept")


def test_an_unused_cache_leaves_no_folder_and_a_full_disk_none(without_tensorflow, monkeypatch, tmp_path):
    use_xla_cache(tmp_path)
    seal_xla_cache()
    assert not list((tmp_path / "xla").iterdir())
    monkeypatch.delenv("TF_XLA_FLAGS")
    monkeypatch.setattr(environment, "_XLA_CACHE_FREE_BYTES", 2**80)
    use_xla_cache(tmp_path)
    assert "TF_XLA_FLAGS" not in os.environ
