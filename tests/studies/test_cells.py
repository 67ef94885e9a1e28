"""Cells that one process runs one after another have the results of jobs that run by themselves."""

import collections
import json
import pathlib
import subprocess
import sys

import keras
import numpy as np
import pytest

from robust_tf import train
from robust_tf.config.job import JobConfig
from robust_tf.errors import UserError
from robust_tf.flags import to_flag_file
from robust_tf.job import testing
from robust_tf.models import build_classifier
from robust_tf.sharing import is_sharing
from robust_tf.studies import cells
from robust_tf.studies.cells import run_cell
from robust_tf.training.callbacks import SaveProgress
from robust_tf.training.interruption import Interrupted

RESULTS_ONLY = {"results.json", "predictions.csv", "history.csv", "flags.cfg"}
FULL_NETWORK = {"features": "live", "head": "sgd", "transfer_mode": "full_network", "epochs": 2, "learning_rate": 0.01}
KINDS = {
    "lbfgs": {},
    "ridge": {"head": "ridge"},
    "sgd": {"head": "sgd", "epochs": 2},
    "attacked": {"norm": "l2", "eval_epsilon": 0.5, "eval_steps": 3},
    "full_network": FULL_NETWORK,
}


@pytest.fixture
def job(tmp_path, data_dir):
    """Returns a function that makes transfer jobs from an untrained source to three digits."""
    keras.utils.set_random_seed(0)
    source = tmp_path / "source.keras"
    build_classifier("resnet8", 10, image_size=8, mean=(0.3,) * 3, std=(0.4,) * 3).save(source)

    def make(name: str, **changes) -> JobConfig:
        settings = {
            "task": "transfer",
            "source": str(source),
            "classes": (0, 1, 2),
            "examples_per_class": 10,
            "features": "cached",
            "head": "lbfgs",
            "epsilon": 0.0,
            "outputs": "results",
            "cache_dir": str(tmp_path / "cache"),
        }
        return JobConfig.from_flags(workdir=str(tmp_path / name), data_dir=str(data_dir), **{**settings, **changes})

    return make


@pytest.fixture(autouse=True)
def _new_process(monkeypatch):
    """Lets each test begin as a process that has not run any cell yet."""
    monkeypatch.setattr(cells, "_objects", collections.OrderedDict())


def resident_megabytes() -> float:
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:")) / 1024


def results_of(job: JobConfig) -> dict:
    return json.loads((pathlib.Path(job.run.workdir) / "results.json").read_text())


def predictions_of(job: JobConfig) -> str:
    return (pathlib.Path(job.run.workdir) / "predictions.csv").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_cells_have_the_results_of_jobs_by_themselves(job, kind):
    for seed in (0, 1):  # the second cell uses what the first has loaded
        cell, alone = (job(f"{name}{seed}", seed=seed, **KINDS[kind]) for name in ("cell", "alone"))
        run_cell(cell)
        assert not is_sharing()
        train.run(alone)
        ours, theirs = results_of(cell), results_of(alone)
        assert predictions_of(cell) == predictions_of(alone)
        for name in ("clean_accuracy", "robust_accuracy", "weights_sha256", "num_test_images", "metric"):
            assert ours[name] == theirs[name], name
        np.testing.assert_allclose(ours["validation_value"], theirs["validation_value"], atol=1e-6)
        assert {path.name for path in pathlib.Path(cell.run.workdir).iterdir()} <= RESULTS_ONLY
    assert results_of(job("cell0"))["weights_sha256"] != results_of(job("cell1"))["weights_sha256"]


@pytest.mark.slow
def test_the_attack_is_traced_once_for_all_heads_of_a_source(job, monkeypatch):
    traced = []
    attack = testing.run_pgd
    monkeypatch.setattr(testing, "run_pgd", lambda *a, **k: traced.append(a) or attack(*a, **k))
    for seed in range(3):
        run_cell(job(f"cell{seed}", seed=seed, **KINDS["attacked"]))
    assert len(traced) == 1
    assert len({results_of(job(f"cell{seed}"))["weights_sha256"] for seed in range(3)}) == 3


def test_errors_are_those_of_jobs_and_later_cells_are_not_affected(job, tmp_path):
    bad = job("bad", source=str(tmp_path / "missing.keras"))
    with pytest.raises(UserError, match=r"missing\.keras"):
        run_cell(bad)
    assert not list(pathlib.Path(bad.run.workdir).iterdir())  # so that a corrected command can use it
    good = job("bad")
    run_cell(good)
    assert results_of(good)["num_test_images"] > 0


@pytest.mark.slow
def test_an_interrupted_cell_continues_to_the_same_weights(job, monkeypatch):
    whole, broken = job("whole", **FULL_NETWORK), job("broken", **FULL_NETWORK)
    run_cell(whole)
    saved = SaveProgress.on_epoch_end

    def interrupted(self, epoch, logs=None):
        saved(self, epoch, logs)
        raise Interrupted(15)

    with monkeypatch.context() as patched:
        patched.setattr(SaveProgress, "on_epoch_end", interrupted)
        with pytest.raises(SystemExit):
            run_cell(broken)
    assert not (pathlib.Path(broken.run.workdir) / "results.json").exists()
    run_cell(broken)
    assert results_of(broken)["epochs_done"] == 2
    assert results_of(broken)["weights_sha256"] == results_of(whole)["weights_sha256"]
    assert predictions_of(broken) == predictions_of(whole)


@pytest.mark.slow
def test_two_processes_may_use_one_cache_of_features_at_once(job, tmp_path):
    # Views are stored on disk, unlike the features of a whole part that the cells of a process share.
    jobs = [job(f"cell{number}", views=2, head="ridge") for number in range(3)]
    program = (
        "import pathlib, sys; from robust_tf.config.job import read_flag_file; "
        "from robust_tf.studies.cells import run_cell; run_cell(read_flag_file(pathlib.Path(sys.argv[1])))"
    )
    processes = []
    for each in jobs[:2]:
        flags = tmp_path / f"{pathlib.Path(each.run.workdir).name}.cfg"
        flags.write_text(to_flag_file(each))
        processes.append(subprocess.Popen([sys.executable, "-c", program, str(flags)]))
    assert [process.wait(timeout=300) for process in processes] == [0, 0]
    run_cell(jobs[2])
    first, *others = (results_of(each)["weights_sha256"] for each in jobs)
    assert others == [first, first]
    assert len(list((tmp_path / "cache" / "features").glob("*/complete.json"))) == 1


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_memory_of_a_process_does_not_grow_with_its_cells(job):
    sizes = []
    for number in range(60):
        run_cell(job(f"cell{number}", seed=number))
        sizes.append(resident_megabytes())
    assert np.mean(sizes[-10:]) - np.mean(sizes[10:20]) < 25
