"""Transfer jobs on stored features: the same files and the same recipe, and the head is put into the classifier."""

import json
import pathlib

import numpy as np
import pytest

from robust_tf import train
from robust_tf.config.data import DataConfig
from robust_tf.config.job import JobConfig
from robust_tf.data import load_task
from robust_tf.job import head_fitting
from robust_tf.models import build_classifier, load_classifier


@pytest.fixture
def job(tmp_path, data_dir):
    """Returns a function that makes transfer jobs from one untrained source to three digits."""
    source = tmp_path / "source.keras"
    build_classifier("resnet8", 10, image_size=8, mean=(0.3,) * 3, std=(0.4,) * 3).save(source)

    def make(name: str, **changes) -> JobConfig:
        settings = {
            "task": "transfer",
            "source": str(source),
            "classes": (0, 1, 2),
            "features": "cached",
            "augmentation": "none",
            "eval_epsilon": 0.1,
            "eval_steps": 2,
            "epochs": 15,
            "batch_size": 32,
            "learning_rate": 0.1,
            "cache_dir": str(tmp_path / "cache"),
        }
        return JobConfig.from_flags(workdir=str(tmp_path / name), data_dir=str(data_dir), **{**settings, **changes})

    return make


def run(config: JobConfig) -> dict:
    train.run(config)
    return json.loads((pathlib.Path(config.run.workdir) / "results.json").read_text())


def weights_of(path) -> dict[str, np.ndarray]:
    return {weight.path: weight.numpy() for weight in load_classifier(pathlib.Path(path)).weights}


@pytest.mark.slow
def test_the_job_writes_the_usual_files_and_a_classifier_with_the_new_head(job, data_dir):
    config = job("sgd", hidden_layers=1, views=2, augmentation="shift")
    results = run(config)
    reports = {"predictions.csv", "history.csv", "report.html", "README.md", "figures"}
    assert {"classifier.keras", "flags.cfg", "results.json", "tensorboard"} | reports == {
        path.name for path in pathlib.Path(config.run.workdir).iterdir()
    }
    rows = 2 * results["num_train_images"] + results["num_validation_images"]
    assert (results["head"], results["views"]) == ("sgd", 2)
    assert (results["feature_cache"]["hits"], results["feature_cache"]["misses"]) == (0, rows)
    assert results["clean_accuracy"] > 0.8 >= results["robust_accuracy"] - 0.2
    # The classifier in the file is the one that was measured, and its backbone is bit-equal to its source's.
    classifier = load_classifier(pathlib.Path(config.run.workdir) / "classifier.keras")
    task = load_task(
        DataConfig(dataset="digits", classes=(0, 1, 2), image_size=8, data_dir=str(data_dir)), batch_size=1000
    )
    images, labels = next(task.test.as_numpy_iterator())
    assert (classifier(images).numpy().argmax(1) == labels).mean() == pytest.approx(results["clean_accuracy"])
    before, after = weights_of(config.transfer.source), weights_of(f"{config.run.workdir}/classifier.keras")
    backbone = [path for path in before if not path.startswith("logits")]
    assert backbone and all(np.array_equal(before[path], after[path]) for path in backbone)


@pytest.mark.slow
def test_further_heads_use_the_stored_features(job, capsys):
    run(job("first"))
    for head in ("lbfgs", "ridge"):
        results = run(job(head, head=head))
        assert results["head"] == head and results["head_penalty"] > 0
        assert results["feature_cache"]["misses"] == 0 < results["feature_cache"]["hits"]
        assert results["clean_accuracy"] > 0.8
    assert "0 computed" in capsys.readouterr().out


@pytest.mark.slow
def test_sgd_on_features_takes_the_same_steps_as_on_images(job, monkeypatch):
    """One epoch of one batch is one step, with the same initial weights and the same class weights."""
    options = {"epochs": 1, "batch_size": 500, "select_by": "last", "eval_epsilon": 0.0, "class_weight": "balanced"}
    cached = run(job("cached", **options))
    live = run(job("live", features="live", **options))
    ours, theirs = (weights_of(f"{job(name).run.workdir}/classifier.keras") for name in ("cached", "live"))
    before = weights_of(job("cached").transfer.source)
    assert ours.keys() == theirs.keys() == before.keys()
    for path in ours:
        np.testing.assert_allclose(ours[path], theirs[path], atol=1e-5, err_msg=path)
    assert cached["trainable_parameters"] == live["trainable_parameters"]
    assert cached["clean_accuracy"] == live["clean_accuracy"]


@pytest.mark.slow
def test_the_head_of_the_best_epoch_is_kept(job, monkeypatch):
    """The metric is replaced by given values, two for each epoch."""
    values = iter([0.2, 0.2, 0.9, 0.9, 0.5, 0.5])
    monkeypatch.setattr(head_fitting, "metric_of", lambda *arguments: next(values))
    results = run(job("best", epochs=9, patience=1, lr_schedule="constant"))
    assert results["best_epoch"] == 2 and results["validation_value"] == 0.9
    assert results["stopped_early"] and results["epochs_done"] == 3
    monkeypatch.undo()
    run(job("two", epochs=2, select_by="last", lr_schedule="constant"))
    best, two = (weights_of(f"{job(name).run.workdir}/classifier.keras") for name in ("best", "two"))
    assert all(np.array_equal(best[path], two[path]) for path in best)


def test_the_plan_says_that_a_solved_head_takes_no_steps(job, capsys):
    train.run(job("plan", head="ridge", dry_run=True))
    assert "none: --head=ridge is fitted to all features at once" in capsys.readouterr().out
