"""The program that runs a study, with tiny jobs: killed and continued, and with a data set that is missing."""

import csv
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from robust_tf import study as program
from robust_tf.config.study import StudyConfig
from robust_tf.errors import UserError

SOURCE = (
    "--dataset=digits\n--classes=0,1,2\n--architecture=resnet8\n--epochs=1\n--image_size=8\n--epsilon=0\n--subset=100\n"
)


def command(folder: pathlib.Path, *flags: str) -> list[str]:
    source = folder / "source.cfg"
    source.write_text(SOURCE)
    job = [
        "--classes=5,6",
        "--epsilon=0",
        "--features=cached",
        "--head=lbfgs",
        "--examples_per_class=5",
        "--deterministic",
    ]
    return [sys.executable, "-m", "robust_tf.study", f"--source={source}", *job, *flags]


def rows(workdir: pathlib.Path) -> list[dict[str, str]]:
    with (workdir / "cells.csv").open(newline="") as file:
        return [{name: value for name, value in row.items() if name != "seconds"} for row in csv.DictReader(file)]


@pytest.mark.slow
def test_a_killed_study_continues_to_the_same_cells_and_a_missing_data_set_leaves_the_others(tmp_path):
    axes = [f"--vary=dataset=digits folder:{tmp_path / 'missing'}", "--vary=seed=0 1 2"]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    process = subprocess.Popen([*command(tmp_path, *axes), f"--workdir={killed}"], env=os.environ)
    deadline = time.monotonic() + 200
    while not list(killed.glob("cells/*/results.json")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed / "cells.csv").exists()
    first = {path: path.stat().st_mtime_ns for path in killed.glob("*/*/results.json")}
    time.sleep(2)  # the worker notices that its parent is gone
    for workdir in (killed, whole):
        ended = subprocess.run([*command(tmp_path, *axes), f"--workdir={workdir}"], capture_output=True, text=True)
        assert ended.returncode == 1, ended.stderr
        assert "3 sources or cells failed" in ended.stdout
        assert "missing" in ended.stdout
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in first.items())
    ours, theirs = rows(killed), rows(whole)
    assert ours == theirs
    assert [row["seed"] for row in ours] == ["0", "1", "2"]
    assert (whole / "report.html").exists()


def test_a_study_does_one_thing_at_a_time():
    with pytest.raises(UserError, match="--only_cell and --collect"):
        StudyConfig(only_cell=0, collect=True)


def test_the_number_of_an_element_is_checked(tmp_path):
    with pytest.raises(UserError, match=r"--only_cell counts from 0 to 1 .* Received: 2"):
        program.main([*command(tmp_path, "--dataset=digits", "--vary=seed=0 1", "--only_cell=2")[2:], "--workdir=w"])
