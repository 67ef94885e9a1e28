"""tests/bench/precision_accuracy.py with a stand-in for the programs: its table, and what it runs again."""

import os
import signal
import sys
import threading

import pytest

from tests.bench import precision_accuracy
from tests.bench.precision_accuracy import Cell, table

# Takes flags as the programs do, writes what they write, and notes each run in runs.txt. Seed 2 fails while the file
# "broken" exists, and seed 3 takes a minute.
STAND_IN = """
import json, pathlib, sys, time
program, *texts = sys.argv[1:]
flags = dict(text.removeprefix("--").split("=", 1) for text in texts if "=" in text)
root = pathlib.Path(sys.argv[0]).parent
with (root / "runs.txt").open("a") as file:
    file.write(" ".join(sys.argv[1:]) + "\\n")
if program == "train":
    seed = int(flags["seed"])
    if seed == 2 and (root / "broken").exists():
        sys.exit("no such luck")
    if seed == 3:
        time.sleep(60)
    workdir = pathlib.Path(flags["workdir"])
    workdir.mkdir(parents=True)
    share = 0.9 - seed / 10 - (flags["precision"] != "float32") / 100
    results = {"clean_accuracy": share, "robust_accuracy": share / 2, "num_test_images": 10_000}
    (workdir / "results.json").write_text(json.dumps(results))
elif program == "evaluate":
    output = pathlib.Path(flags["output"])
    output.mkdir()
    share = json.loads((output.parent / "results.json").read_text())["clean_accuracy"]
    names = flags["attack"].split(",")
    attacks = [{"attack": name, "accuracy": share - 0.2 - index / 10} for index, name in enumerate(names)]
    clean = {"accuracy": share, "num_images": int(flags["num_images"])}
    (output / "evaluation.json").write_text(json.dumps({"classifiers": [{"clean": clean, "attacks": attacks}]}))
"""


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """Returns a function that runs the benchmark with flags, and returns its code, its output and the runs it made."""
    program, runs = tmp_path / "program.py", tmp_path / "runs.txt"
    program.write_text(STAND_IN)
    monkeypatch.setattr(precision_accuracy, "command", lambda name: [sys.executable, str(program), name])

    def run_with(*flags):
        runs.unlink(missing_ok=True)
        folders = [f"--folder={tmp_path / 'cells'}", f"--data_dir={tmp_path}", "--dataset=fashion_mnist"]
        monkeypatch.setattr(sys, "argv", ["precision_accuracy", *folders, *flags])
        code = precision_accuracy.main()
        return code, capsys.readouterr(), runs.read_text().splitlines() if runs.exists() else []

    return run_with


def test_the_table_has_means_seeds_and_differences(run):
    code, output, runs = run("--seeds=0,1", "--epochs=3", "--num_images=8")
    assert code == 0
    assert output.out.splitlines() == [
        "| accuracy | float32: mean (seeds 0, 1) | mixed_bfloat16: mean (seeds 0, 1) "
        "| mixed_bfloat16 - float32, points (by seed) |",
        "|---|---|---|---|",
        "| clean, 10,000 images | 85.0% (90.0%, 80.0%) | 84.0% (89.0%, 79.0%) | -1.0 (-1.0, -1.0) |",
        "| PGD-20 of the final test, 10,000 images | 42.5% (45.0%, 40.0%) | 42.0% (44.5%, 39.5%) | -0.5 (-0.5, -0.5) |",
        "| clean, 8 images | 85.0% (90.0%, 80.0%) | 84.0% (89.0%, 79.0%) | -1.0 (-1.0, -1.0) |",
        "| PGD-20, 8 images | 65.0% (70.0%, 60.0%) | 64.0% (69.0%, 59.0%) | -1.0 (-1.0, -1.0) |",
        "| AutoAttack, 8 images | 55.0% (60.0%, 50.0%) | 54.0% (59.0%, 49.0%) | -1.0 (-1.0, -1.0) |",
    ]
    trainings = [line for line in runs if line.startswith("train")]
    assert runs[0] == "data --prepare=fashion_mnist --data_dir=" + trainings[0].split("--data_dir=")[1].split()[0]
    assert len(trainings) == 4 and all("--epochs=3" in line and "--nodeterministic" in line for line in trainings)
    assert len([line for line in runs if line.startswith("evaluate") and "--attack=pgd,autoattack" in line]) == 4


def test_another_attack_is_another_evaluation_of_the_same_trainings(run):
    run("--seeds=0", "--num_images=8")
    code, output, runs = run("--seeds=0", "--num_images=8", "--attack=apgd-ce+apgd-t")
    assert code == 0 and [line.split()[0] for line in runs if not line.startswith("data")] == ["evaluate"] * 2
    assert "| apgd-ce+apgd-t, 8 images | 60.0% (60.0%) | 59.0% (59.0%) | -1.0 (-1.0) |" in output.out
    assert "AutoAttack" not in output.out


def test_finished_cells_are_skipped_and_failed_ones_run_again(run, tmp_path):
    (tmp_path / "fashion_mnist").mkdir()  # the data set is prepared
    (tmp_path / "broken").touch()
    code, output, runs = run("--seeds=1,2", "--precisions=float32")
    assert code == 1 and len(runs) == 3
    assert "float32_seed2_train.log: ended with code 1:\nno such luck" in output.err
    assert "| clean, 10,000 images | (80.0%, missing) |" in output.out
    (tmp_path / "broken").unlink()
    code, output, runs = run("--seeds=1,2", "--precisions=float32")
    assert code == 0 and [line.split()[0] for line in runs] == ["train", "evaluate"]
    assert all("seed2" in line for line in runs) and "75.0% (80.0%, 70.0%)" in output.out
    code, output, runs = run("--seeds=1,2", "--precisions=float32", "--num_images=5")
    assert code == 0 and [line.split()[0] for line in runs] == ["evaluate", "evaluate"]


@pytest.mark.parametrize("reason", ["deadline", "SIGTERM"])
def test_everything_stops_when_the_time_is_up(run, tmp_path, reason):
    (tmp_path / "fashion_mnist").mkdir()
    if reason == "SIGTERM":
        threading.Timer(2, os.kill, [os.getpid(), signal.SIGTERM]).start()
    seconds = {"deadline": 1, "SIGTERM": 600}[reason]
    code, output, _ = run("--seeds=3,4", "--precisions=float32", "--jobs=1", f"--seconds={seconds}")
    assert code == 1
    assert "float32_seed3_train.log: stopped when the time was up" in output.err
    assert "float32_seed4_train.log: no time was left for it" in output.err


def test_a_difference_needs_both_precisions():
    cells = [Cell(precision, seed) for precision in ("float32", "mixed_bfloat16") for seed in (0, 1)]
    measured = dict.fromkeys(cells, {"clean": 0.5}) | {cells[2]: {}}
    assert (
        table(measured, cells).splitlines()[-1]
        == "| clean | 50.0% (50.0%, 50.0%) | (missing, 50.0%) | (missing, +0.0) |"
    )
