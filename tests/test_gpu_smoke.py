"""tests/gpu_smoke.sh on a machine without a GPU: it says that there is none, and its checks work on a CPU."""

import os
import pathlib
import subprocess
import sys

import pytest
import tensorflow as tf

SCRIPT = pathlib.Path(__file__).with_name("gpu_smoke.sh")
# In place of Python: one training fails, and everything else does nothing.
STAND_IN = """#!/bin/sh
case "$*" in
  *robust_tf.train*bfloat16*) echo broken; exit 1 ;;
  *pytest*) echo 3 passed ;;
  *gpu_checks*) echo equal ;;
esac
"""


def run(**variables: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHON": sys.executable} | variables
    return subprocess.run(["bash", str(SCRIPT)], env=environment, capture_output=True, text=True)


@pytest.mark.skipif(bool(tf.config.list_physical_devices("GPU")), reason="there is a GPU")
def test_the_script_says_that_there_is_no_gpu():
    result = run()
    assert result.returncode == 3 and "sees no GPU" in result.stderr


def test_each_failed_check_is_named(tmp_path):
    python = tmp_path / "python"
    python.write_text(STAND_IN)
    python.chmod(0o755)
    result = run(SMOKE_DEVICE="GPU", PYTHON=str(python), TMPDIR=str(tmp_path))
    assert result.returncode == 1
    assert result.stderr.splitlines() == ["broken", "FAILED: mixed_bfloat16=true, see above"]
    assert "pgd: 3 passed (" in result.stdout and "deterministic_xla: equal (" in result.stdout
    assert "float32: " in result.stdout and "float32=true: " in result.stdout
    assert "mixed_bfloat16" not in result.stdout and "Everything works" not in result.stdout
    assert list(tmp_path.iterdir()) == [python]  # it removes its files


@pytest.mark.slow
def test_the_checks_pass_on_a_cpu():
    result = run(SMOKE_DEVICE="CPU")
    assert result.returncode == 0, result.stdout + result.stderr
    for name in ("float32:", "float32=false:", "mixed_bfloat16=false:", "mixed_float16=false:"):
        assert f"{name} " in result.stdout and "images/s" in result.stdout
    assert result.stdout.rstrip().endswith("Everything works on this CPU.")
