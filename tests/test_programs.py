"""The programs are quick to answer when no work is needed, and quiet when they work."""

import os
import pathlib
import subprocess
import sys

import keras
import pytest

from robust_tf.attacks import ATTACKS, NORMS, VERSIONS
from robust_tf.config.names import ATTACK_NAMES, AUTOATTACK_VERSIONS, NORM_NAMES

ROOT = pathlib.Path(__file__).parents[1]
PROGRAMS = ["train", "evaluate", "visualize", "data", "convert", "export", "serve", "predict", "study"]
# Runs a program, and then prints its exit code and which slow packages it has imported.
WITH_IMPORTS = """
import runpy, sys
program, *sys.argv[1:] = sys.argv[1:]
code = 0
try:
    runpy.run_module(f"robust_tf.{program}", run_name="__main__", alter_sys=True)
except SystemExit as stop:
    code = stop.code
slow = {"tensorflow", "keras", "tensorflow_datasets", "sklearn", "matplotlib", "google.protobuf"}
print("\\n", code, sorted(slow & set(sys.modules)))
"""
# The environment of a user, without the settings for TensorFlow of this test run and this machine.
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("TF_")}
ENVIRONMENT["PYTHONPATH"] = str(ROOT)


def run(*command: str, **settings: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, env=ENVIRONMENT | settings, check=False
    )


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_needs_no_tensorflow(program):
    done = run("-c", WITH_IMPORTS, program, "--help")
    assert done.stdout.splitlines()[-1] == " 0 []"
    assert "--verbosity" in done.stdout
    assert done.stderr == ""


def test_help_can_be_cut_short():
    command = f"{sys.executable} -m robust_tf.train --help | head -n 1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, env=ENVIRONMENT, check=False)
    assert done.stdout.startswith("Trains a classifier") and done.stderr == ""


@pytest.mark.parametrize("program", PROGRAMS)
def test_an_unknown_flag_is_named_without_tensorflow(program):
    done = run("-c", WITH_IMPORTS, program, "--no_such_flag=1")
    assert done.stdout.splitlines()[-1] == " 2 []"
    assert done.stderr.startswith("error: ") and "no_such_flag" in done.stderr
    assert done.stderr.count("\n") == 1


def test_the_names_in_flags_are_the_names_of_the_attacks():
    assert set(ATTACK_NAMES) == set(ATTACKS)
    assert set(NORM_NAMES) == set(NORMS)
    assert set(AUTOATTACK_VERSIONS.values()) == set(VERSIONS)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    images = keras.Input((8, 8, 3))
    logits = keras.layers.Dense(5, name="logits")(keras.layers.Flatten()(images))
    path = tmp_path_factory.mktemp("classifier") / "classifier.keras"
    keras.Model(images, logits).save(path)
    return path


@pytest.fixture
def commands(classifier, data_dir, tmp_path):
    """The shortest real work of each program that ends by itself and needs no server."""
    digits = ["--dataset=digits", "--classes=0,1,2,3,4", f"--data_dir={data_dir}"]
    return {
        "train": [*digits, "--architecture=resnet20", "--image_size=8", "--dry_run", f"--workdir={tmp_path}"],
        "evaluate": [f"--classifier={classifier}", *digits, "--attack=fgsm", "--norm=l2", "--epsilon=1"]
        + ["--num_images=5", f"--output={tmp_path}"],
        "visualize": [f"--classifier={classifier}", *digits, "--num_images=2", f"--output={tmp_path}/x.png"],
        "data": ["--check", "digits", f"--data_dir={data_dir}"],
        "convert": ["--list"],
        "export": [f"--classifier={classifier}", f"--export_dir={tmp_path}", "--model_name=m"],
    }


SLOW = [
    pytest.param(program, marks=pytest.mark.slow) for program in ("evaluate", "export", "visualize", "data", "convert")
]


@pytest.mark.parametrize("program", ["train", *SLOW])
def test_a_program_that_works_writes_nothing_to_stderr(program, commands):
    done = run("-m", f"robust_tf.{program}", *commands[program])
    assert (done.returncode, done.stderr) == (0, "")
    assert "tensorflow/" not in done.stdout


@pytest.mark.slow
def test_verbosity_brings_back_what_tensorflow_prints(commands):
    done = run("-m", "robust_tf.export", *commands["export"], "--verbosity=info")
    assert done.returncode == 0
    assert "oneDNN custom operations are on" in done.stderr


def test_an_unknown_verbosity_is_named():
    done = run("-m", "robust_tf.predict", "--verbosity=inf")
    assert done.returncode == 2
    assert "Unknown value of --verbosity. Received: 'inf'. Did you mean 'info'?" in done.stderr


def test_an_error_while_tensorflow_is_imported_is_not_hidden(tmp_path):
    """What was printed before the error comes first, because it often says why."""
    package = tmp_path / "tensorflow"
    package.mkdir()
    (package / "__init__.py").write_text("import os\nos.write(2, b'the reason\\n')\nraise ImportError('broken')\n")
    code = "from robust_tf.environment import start_tensorflow; start_tensorflow()"
    done = run("-c", code, PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert done.returncode == 1
    assert done.stderr.startswith("the reason\nTraceback") and "ImportError: broken" in done.stderr


def test_a_crash_while_tensorflow_is_imported_says_where_it_happened(tmp_path):
    package = tmp_path / "tensorflow"
    package.mkdir()
    (package / "__init__.py").write_text("import os\nos.abort()\n")
    code = "from robust_tf.environment import start_tensorflow; start_tensorflow()"
    done = run("-c", code, PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert done.returncode < 0
    assert "Fatal Python error: Aborted" in done.stderr and "start_tensorflow" in done.stderr
