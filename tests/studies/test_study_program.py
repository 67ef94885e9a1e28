"""The program that runs a study, with tiny jobs: interrupted, killed, as an array job, and when something fails."""

import csv
import errno
import multiprocessing
import os
import pathlib
import signal
import subprocess
import sys
import time
import types

import pytest

from robust_tf import study as program
from robust_tf.config.study import StudyConfig, parse_study
from robust_tf.errors import UserError
from robust_tf.results import FILE_NAME, JobResults
from robust_tf.statistics import Interval
from robust_tf.studies import run, shared_jobs, worker
from robust_tf.studies.collect import finished_cells
from robust_tf.studies.grid import ERROR, StudyPlan, plan_study

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


@pytest.mark.slow
def test_two_workers_interrupted_and_an_array_job_have_the_same_cells(tmp_path):
    flags = [*command(tmp_path, "--dataset=digits", "--vary=source.seed=0 1", "--vary=seed=0 1")]
    interrupted, array = tmp_path / "interrupted", tmp_path / "array"
    process = subprocess.Popen(
        [*flags, f"--workdir={interrupted}", "--workers=2"], stdout=subprocess.PIPE, text=True, env=os.environ
    )
    deadline = time.monotonic() + 200
    while not list(interrupted.glob("sources/*/checkpoints/*")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 130
    assert "the same command continues there" in output
    ended = subprocess.run([*flags, f"--workdir={interrupted}", "--workers=2"], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    elements = [f"--only_{kind}={number}" for kind, count in (("source", 2), ("cell", 4)) for number in range(count)]
    for element in elements:
        program.main([*flags[2:], f"--workdir={array}", element])
    program.main([*flags[2:], f"--workdir={array}", "--collect"])
    # One process with all threads and two with one thread each round differently, so the weights differ.
    same = ("cell", "source", "source_seed", "seed", "examples_per_class", "num_test_images")
    ours, theirs = ([[row[name] for name in same] for row in rows(workdir)] for workdir in (interrupted, array))
    assert ours == theirs
    assert len(ours) == 4
    assert (array / "report.html").exists()


def study_plan(tmp_path: pathlib.Path, *flags: str) -> StudyPlan:
    return plan_study(parse_study([*command(tmp_path, "--dataset=digits", *flags)[2:], f"--workdir={tmp_path / 'w'}"]))


def test_the_validation_part_chooses_among_the_values_of_choose(tmp_path):
    plan = study_plan(tmp_path, "--choose=learning_rate=0.1 0.01", "--vary=seed=0 1", "--head=sgd")
    values = dict(zip([cell.name for cell in plan.cells], (0.5, 0.7, 0.9, 0.8), strict=True))
    for number, cell in enumerate(plan.cells):
        JobResults(
            task="transfer",
            dataset="digits",
            architecture="resnet8",
            image_size=8,
            metric="accuracy",
            clean_accuracy=number / 10,
            clean_accuracy_interval=Interval(0.0, 1.0),
            mean_per_class_accuracy=number / 10,
            num_train_images=10,
            num_validation_images=10,
            num_test_images=10,
            trainable_parameters=1,
            total_parameters=1,
            seconds=1.0,
            seed=cell.job.run.seed,
            validation_value=values[cell.name],
        ).write(cell.workdir / FILE_NAME)
    cells = finished_cells(plan)
    assert len(cells) == 4
    for seed in (0, 1):
        rivals = [cell for cell in cells if cell.seed == seed]
        (chosen,) = (cell for cell in rivals if cell.chosen)
        assert chosen.validation_value == max(cell.validation_value or 0 for cell in rivals)
        assert len(rivals) == 2


def test_a_full_disk_ends_the_study_and_says_what_is_saved(tmp_path, monkeypatch):
    plan = study_plan(tmp_path, "--vary=seed=0 1")

    def full(job):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shared_jobs, "run_job", full)
    outcome = worker.run_safely(plan.cells[0].job)
    assert outcome.disk_full
    queue = run._queue(plan, retry_failed=True)
    connection = types.SimpleNamespace(recv=lambda: outcome)
    busy = run._Worker(process=None, connection=connection, run=plan.cells[0])
    with pytest.raises(UserError, match=r"no space left .* with --retry_failed\. Received: .*No space left"):
        run._receive(busy, queue)


def test_a_cell_that_fails_leaves_its_error_and_the_next_one_runs(tmp_path, monkeypatch):
    plan = study_plan(tmp_path, "--vary=seed=0 1")

    def broken(job):
        raise UserError("The images are broken. Received: nothing.")

    monkeypatch.setattr(shared_jobs, "run_job", broken)
    cell = plan.cells[0]
    assert worker.run_safely(cell.job) == worker.Outcome("The images are broken. Received: nothing.")
    assert (cell.workdir / ERROR).read_text() == "The images are broken. Received: nothing.\n"
    # The source has not failed, so only the cell is listed.
    assert [failure.name for failure in run.failed_before(plan)] == [cell.name]
    monkeypatch.setattr(shared_jobs, "run_job", lambda job: None)
    assert not worker.run_safely(cell.job).error
    assert not (cell.workdir / ERROR).exists()


def test_sources_that_differ_in_their_seed_go_to_the_same_worker(tmp_path):
    plan = study_plan(tmp_path, "--vary=source.epsilon=0 0.5 1", "--vary=source.seed=0 1")
    queue = run._queue(plan, retry_failed=False)
    workers = [run._Worker(process=None, connection=None) for _ in range(2)]
    given: list[list[str]] = [[], []]
    for _ in range(3):
        for number, each in enumerate(workers):
            others = [other.run for other in workers if other is not each and other.run]
            each.last, each.run = each.run, None
            each.run = queue.next_for(each, others)
            given[number].append(each.run.name)
    families = [[name.rsplit("_seed", 1)[0] for name in names] for names in given]
    assert families[0][0] == families[0][1] and families[1][0] == families[1][1]
    assert families[0][0] != families[1][0]
    assert sorted(name for names in given for name in names) == sorted(source.name for source in plan.sources)


def test_a_study_does_one_thing_at_a_time():
    with pytest.raises(UserError, match="--only_cell and --collect"):
        StudyConfig(only_cell=0, collect=True)


def test_the_number_of_an_element_is_checked(tmp_path):
    with pytest.raises(UserError, match=r"--only_cell counts from 0 to 1 .* Received: 2"):
        program.main([*command(tmp_path, "--dataset=digits", "--vary=seed=0 1", "--only_cell=2")[2:], "--workdir=w"])


# Ends at its second SIGTERM with code 7: the first one finds Python deleting an object.
_DROPS_ONE_SIGNAL = """
import os, signal, time
received = []
def handler(*_):
    received.append(1)
    if len(received) == 2:
        os._exit(7)
signal.signal(signal.SIGTERM, handler)
connection.send("ready")
while True:
    time.sleep(0.01)
"""


def test_a_worker_that_drops_a_signal_gets_another_one(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "_PERIOD_SECONDS", 0.3)
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=exec, args=(_DROPS_ONE_SIGNAL, {"connection": theirs}))
    process.start()
    theirs.close()
    assert ours.recv() == "ready"
    run._stop([run._Worker(process, ours, run=types.SimpleNamespace(name="resnet8_seed0"))])
    assert process.exitcode == 7
    assert "resnet8_seed0" in capsys.readouterr().out
