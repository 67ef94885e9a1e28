"""Cells and sources that one process runs one after another have the results of jobs that run by themselves."""

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
from robust_tf.studies import shared_jobs
from robust_tf.studies.shared_jobs import run_sharing
from robust_tf.training.callbacks import SaveProgress
from robust_tf.training.interruption import Interrupted
from robust_tf.training.trainer import AdversarialTrainer

RESULTS_ONLY = {"results.json", "predictions.csv", "history.csv", "flags.cfg"}
FULL_NETWORK = {"features": "live", "head": "sgd", "transfer_mode": "full_network", "epochs": 2, "learning_rate": 0.01}
KINDS = {
    "lbfgs": {},
    "ridge": {"head": "ridge"},
    "sgd": {"head": "sgd", "epochs": 2},
    "attacked": {"norm": "l2", "eval_epsilon": 0.5, "eval_steps": 3},
    "full_network": FULL_NETWORK,
    "partial": {**FULL_NETWORK, "transfer_mode": "partial", "freeze_through": "stage2"},
    "unfreezing": {**FULL_NETWORK, "transfer_mode": "fixed_feature", "unfreeze_at_epoch": 1},
}
RECIPES = {
    "standard": {"epsilon": 0.0},
    "random start": {"random_start": True},
    "trades": {"objective": "trades"},
    "awp": {"objective": "awp"},
    "free": {"fast": "free", "free_replays": 2, "attack_steps": 1},
    "epsilon warm-up": {"fast": "epsilon_warmup"},
    "adam": {"optimizer": "adamw", "learning_rate": 0.001, "accumulate_steps": 2},
    "moving averages": {"ema_decay": 0.9},
    "rollback": {"on_alarm": "rollback", "alarm_every_epochs": 1},
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
    monkeypatch.setattr(shared_jobs, "_objects", collections.OrderedDict())


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
        run_sharing(cell)
        assert not is_sharing()
        train.run(alone)
        ours, theirs = results_of(cell), results_of(alone)
        assert predictions_of(cell) == predictions_of(alone)
        for name in ("clean_accuracy", "robust_accuracy", "weights_sha256", "num_test_images", "metric"):
            assert ours[name] == theirs[name], name
        np.testing.assert_allclose(ours["validation_value"], theirs["validation_value"], atol=1e-6)
        assert {path.name for path in pathlib.Path(cell.run.workdir).iterdir()} <= RESULTS_ONLY
    assert results_of(job("cell0"))["weights_sha256"] != results_of(job("cell1"))["weights_sha256"]


@pytest.fixture
def source_job(tmp_path, data_dir):
    """Returns a function that makes pretraining jobs on three digits."""

    def make(name: str, **changes) -> JobConfig:
        settings = {
            "task": "pretrain",
            "architecture": "resnet8",
            "image_size": 8,
            "classes": (0, 1, 2),
            "subset": "100",
            "epsilon": 0.5,
            "attack_steps": 2,
            "eval_steps": 2,
            "epochs": 2,
            "alarm_every_epochs": 0,
            "outputs": "classifier",
        }
        return JobConfig.from_flags(workdir=str(tmp_path / name), data_dir=str(data_dir), **{**settings, **changes})

    return make


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_sources_have_the_results_of_jobs_by_themselves(source_job, recipe):
    first, shared, alone = (
        source_job(name, seed=seed, **RECIPES[recipe]) for name, seed in (("first", 0), ("shared", 1), ("alone", 1))
    )
    run_sharing(first)
    run_sharing(shared)  # with the trainer of the first, if the recipe allows it
    train.run(alone)
    ours, theirs = results_of(shared), results_of(alone)
    assert predictions_of(shared) == predictions_of(alone)
    for name in ("clean_accuracy", "robust_accuracy", "weights_sha256", "validation_value", "alarms"):
        assert ours[name] == theirs[name], name
    histories = [(pathlib.Path(job.run.workdir) / "history.csv").read_text() for job in (shared, alone)]
    assert histories[0] == histories[1]
    assert {path.name for path in pathlib.Path(shared.run.workdir).iterdir()} == {*RESULTS_ONLY, "classifier.keras"}
    assert results_of(first)["weights_sha256"] != ours["weights_sha256"]


@pytest.mark.slow
def test_the_training_step_is_traced_once_for_all_seeds_of_a_source(source_job, monkeypatch):
    traced = []
    step = AdversarialTrainer.train_step
    monkeypatch.setattr(AdversarialTrainer, "train_step", lambda *a: traced.append(a) or step(*a))
    for seed in range(3):
        run_sharing(source_job(f"source{seed}", seed=seed))
    assert len(traced) == 1
    run_sharing(source_job("other", epsilon=0.25))
    assert len(traced) == 2


@pytest.mark.slow
def test_a_source_that_failed_does_not_affect_the_next(source_job, monkeypatch):
    run_sharing(source_job("first"))

    def full_disk(self, epoch, logs=None):
        raise UserError("No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(SaveProgress, "on_epoch_end", full_disk)
        with pytest.raises(UserError, match="No space left"):
            run_sharing(source_job("broken", seed=1))
    run_sharing(source_job("again", seed=1))
    train.run(source_job("alone", seed=1))
    assert results_of(source_job("again"))["weights_sha256"] == results_of(source_job("alone"))["weights_sha256"]


@pytest.mark.slow
def test_the_attack_is_traced_once_for_all_heads_of_a_source(job, monkeypatch):
    traced = []
    attack = testing.run_pgd
    monkeypatch.setattr(testing, "run_pgd", lambda *a, **k: traced.append(a) or attack(*a, **k))
    for seed in range(3):
        run_sharing(job(f"cell{seed}", seed=seed, **KINDS["attacked"]))
    assert len(traced) == 1
    assert len({results_of(job(f"cell{seed}"))["weights_sha256"] for seed in range(3)}) == 3


def test_errors_are_those_of_jobs_and_later_cells_are_not_affected(job, tmp_path):
    bad = job("bad", source=str(tmp_path / "missing.keras"))
    with pytest.raises(UserError, match=r"missing\.keras"):
        run_sharing(bad)
    assert not list(pathlib.Path(bad.run.workdir).iterdir())  # so that a corrected command can use it
    good = job("bad")
    run_sharing(good)
    assert results_of(good)["num_test_images"] > 0


@pytest.mark.slow
def test_an_interrupted_cell_continues_to_the_same_weights(job, monkeypatch):
    whole, broken = job("whole", **FULL_NETWORK), job("broken", **FULL_NETWORK)
    run_sharing(whole)
    saved = SaveProgress.on_epoch_end

    def interrupted(self, epoch, logs=None):
        saved(self, epoch, logs)
        raise Interrupted(15)

    with monkeypatch.context() as patched:
        patched.setattr(SaveProgress, "on_epoch_end", interrupted)
        with pytest.raises(SystemExit):
            run_sharing(broken)
    assert not (pathlib.Path(broken.run.workdir) / "results.json").exists()
    run_sharing(broken)
    assert results_of(broken)["epochs_done"] == 2
    assert results_of(broken)["weights_sha256"] == results_of(whole)["weights_sha256"]
    assert predictions_of(broken) == predictions_of(whole)


@pytest.mark.slow
def test_two_processes_may_use_one_cache_of_features_at_once(job, tmp_path):
    # Views are stored on disk, unlike the features of a whole part that the cells of a process share.
    jobs = [job(f"cell{number}", views=2, head="ridge") for number in range(3)]
    program = (
        "import pathlib, sys; from robust_tf.config.job import read_flag_file; "
        "from robust_tf.studies.shared_jobs import run_sharing; run_sharing(read_flag_file(pathlib.Path(sys.argv[1])))"
    )
    processes = []
    for each in jobs[:2]:
        flags = tmp_path / f"{pathlib.Path(each.run.workdir).name}.cfg"
        flags.write_text(to_flag_file(each))
        processes.append(subprocess.Popen([sys.executable, "-c", program, str(flags)]))
    assert [process.wait(timeout=300) for process in processes] == [0, 0]
    run_sharing(jobs[2])
    first, *others = (results_of(each)["weights_sha256"] for each in jobs)
    assert others == [first, first]
    assert len(list((tmp_path / "cache" / "features").glob("*/complete.json"))) == 1


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_memory_of_a_process_does_not_grow_with_its_cells(job):
    sizes = []
    for number in range(60):
        run_sharing(job(f"cell{number}", seed=number))
        sizes.append(resident_megabytes())
    assert np.mean(sizes[-10:]) - np.mean(sizes[10:20]) < 25
