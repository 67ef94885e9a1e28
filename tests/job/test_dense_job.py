"""Training jobs for detection and segmentation, from flags to files, and their evaluation."""

import csv
import dataclasses
import json
import pathlib
import shutil
from typing import cast

import keras
import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from robust_tf import train
from robust_tf.config.data import DataConfig
from robust_tf.config.evaluation import EvaluateConfig
from robust_tf.config.job import JobConfig
from robust_tf.data import load_task
from robust_tf.data.boxes import BoxPreprocessing
from robust_tf.errors import UserError
from robust_tf.evaluation import dense as dense_evaluation
from robust_tf.evaluation.run import run_evaluation
from robust_tf.job.dense import MeasureEachEpoch
from robust_tf.models import read_model
from robust_tf.results import JobResults
from robust_tf.tasks.table import DENSE_TASKS, task_type_of
from robust_tf.training.interruption import Interrupted
from tests.dense_data import CLASSES, MASK_CLASSES, SIZE, dense_job, write_scenes, write_source

TASK_TYPES = ("detection", "segmentation")
METRICS = {"detection": "average_precision", "segmentation": "mean_iou"}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> pathlib.Path:
    return write_scenes(tmp_path_factory.mktemp("scenes"))


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> pathlib.Path:
    return write_source(tmp_path_factory.mktemp("source") / "source.keras")


@pytest.fixture(scope="module", params=TASK_TYPES)
def trained(request, tmp_path_factory, scenes, source) -> JobConfig:
    """A job that has been run, for the tests that only inspect it."""
    workdir = tmp_path_factory.mktemp("trained") / request.param
    job = dense_job(request.param, scenes, source, workdir)
    train.run(job)
    keras.backend.clear_session(free_memory=False)
    return job


def results_of(job: JobConfig) -> JobResults:
    results = JobResults.read(pathlib.Path(job.run.workdir) / "results.json")
    assert results is not None
    return results


def network_of(job: JobConfig) -> keras.Model:
    return read_model(pathlib.Path(job.run.workdir) / "classifier.keras")


@pytest.mark.slow
def test_a_job_writes_its_network_and_its_figures(trained):
    workdir, task_type = pathlib.Path(trained.run.workdir), trained.data.task_type
    results, metric = results_of(trained), METRICS[task_type]
    assert (results.task_type, results.metric) == (task_type, metric)
    assert results.class_names == (CLASSES if task_type == "detection" else MASK_CLASSES)
    assert results.clean_accuracy is None and results.num_test_images == 6
    assert 0 <= results.clean.value <= 1 and 0 <= results.robust.value <= 1
    assert results.clean.interval.low <= results.clean.value <= results.clean.interval.high
    assert results.robust_accuracy_attack.epsilon == 0.5
    assert [figure.name for figure in results.figures()] == ["clean", "robust"]
    assert task_type_of(network_of(trained)) == task_type
    with (workdir / "history.csv").open() as file:
        history = list(csv.DictReader(file))
    values = [float(row[f"val_robust_{metric}"]) for row in history]
    assert len(values) == 2 and f"val_clean_{metric}" in history[0]
    best = max(range(2), key=lambda epoch: (values[epoch], -float(history[epoch]["val_loss"])))
    assert results.best_epoch == best + 1 and results.validation_value == pytest.approx(values[best])
    with Image.open(workdir / "examples.png") as sheet:
        assert sheet.width > 1000
    events = EventAccumulator(str(workdir / "tensorboard" / "validation")).Reload()
    tags = events.Tags()
    assert f"epoch/robust_{metric}" in {tag for tag in tags["tensors"]} and "attack" in tags["tensors"]
    if task_type == "detection":  # the losses by part
        assert {"epoch/boxes_loss", "epoch/classes_loss"} <= set(tags["tensors"])


@pytest.mark.slow
def test_a_finished_job_is_not_run_again(trained, monkeypatch):
    monkeypatch.setattr(MeasureEachEpoch, "on_epoch_end", None)
    before = results_of(trained)
    train.run(trained)
    assert results_of(trained) == before


@pytest.mark.slow
@pytest.mark.parametrize("trained", ["detection"], indirect=True)
def test_a_job_that_was_interrupted_ends_with_the_same_weights(trained, scenes, source, tmp_path, monkeypatch):
    """Interrupted after the first epoch, in the measurement of the second one."""
    parts = dense_job(trained.data.task_type, scenes, source, tmp_path / "parts", outputs="classifier")
    measure = MeasureEachEpoch.on_epoch_end

    def interrupted(self, epoch, logs=None):
        if epoch == 1:
            raise Interrupted(15)
        measure(self, epoch, logs)

    monkeypatch.setattr(MeasureEachEpoch, "on_epoch_end", interrupted)
    with pytest.raises(SystemExit):
        train.run(parts)
    monkeypatch.setattr(MeasureEachEpoch, "on_epoch_end", measure)
    train.run(parts)
    for ours, theirs in zip(network_of(parts).weights, network_of(trained).weights, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert results_of(parts).robust == results_of(trained).robust


@pytest.mark.slow
def test_a_frozen_backbone_does_not_change(scenes, source, tmp_path):
    job = dense_job(
        "segmentation",
        scenes,
        source,
        tmp_path / "job",
        transfer_mode="fixed_feature",
        epochs=1,
        epsilon=0.0,
        eval_epsilon=0.0,
    )
    train.run(job)
    before = {weight.path: weight.numpy() for weight in read_model(source).weights}
    network = network_of(job)
    kept = [weight for weight in network.weights if not weight.path.startswith("head_")]
    assert len(kept) > 20
    for weight in kept:
        np.testing.assert_array_equal(weight, before[weight.path])
    assert results_of(job).robust is None


@pytest.mark.slow
def test_an_evaluation_gives_the_figures_of_the_job_and_continues(trained, tmp_path, monkeypatch, capsys):
    network = str(pathlib.Path(trained.run.workdir) / "classifier.keras")
    config = EvaluateConfig(
        classifier=network, compare=network, output=str(tmp_path), norm="l2", epsilon=(0.5,), attack_steps=2
    )
    run_evaluation(config)
    content = json.loads((tmp_path / "evaluation.json").read_text())
    results = results_of(trained)
    clean, robust = content["networks"][0]["results"]
    assert clean["value"] == pytest.approx(results.clean.value, abs=1e-9)
    assert robust["value"] == pytest.approx(results.robust.value, abs=1e-9)
    assert (tmp_path / "examples_0.5.png").exists()
    assert [each["value"] for each in content["differences"]] == [0.0, 0.0]
    assert "first minus second" in capsys.readouterr().out
    monkeypatch.setattr(dense_evaluation, "Measurer", None)  # everything is stored
    run_evaluation(config)
    assert json.loads((tmp_path / "evaluation.json").read_text()) == content


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"attack": ("autoattack",)}, "--attack must be pgd or none. Received: --attack=autoattack"),
        ({"corruptions": True}, "--corruptions is for classifiers"),
        ({"artifact": ("x",)}, "--artifact is for classifiers"),
    ],
)
def test_flags_of_an_evaluation_that_are_for_classifiers_are_refused(flags, message):
    with pytest.raises(UserError) as error:
        dense_evaluation.run_dense_evaluation(EvaluateConfig(classifier="x.keras", **flags))
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"features": "cached", "head": "lbfgs"}, "--features is for classification"),
        ({"task": "pretrain", "source": "none"}, "needs --task=transfer"),
        ({"hidden_layers": 1}, "--hidden_layers is for classification"),
        ({"class_weight": "balanced"}, "--class_weight is for classification"),
        ({"objective": "trades"}, "TRADES compares the class probabilities"),
        ({"mixing": "mixup"}, "--mixing is for --task_type=classification"),
        ({"classes": (0, 1)}, "--classes is for --task_type=classification"),
        ({"examples_per_class": 3}, "--examples_per_class is for --task_type=classification"),
        ({"downscale": 16}, "--downscale is for --task_type=classification"),
        ({"baseline": True}, "--baseline is for classification"),
    ],
)
@pytest.mark.parametrize("task_type", TASK_TYPES)
def test_flags_that_mean_nothing_for_boxes_and_masks_are_refused(task_type, flags, message, tmp_path):
    with pytest.raises(UserError) as error:
        dense_job(
            task_type,
            tmp_path,
            tmp_path / "source.keras",
            tmp_path / "job",
            **{"transfer_mode": "fixed_feature", **flags},
        )
    assert message in str(error.value) and "Received" in str(error.value)


@pytest.mark.parametrize("task_type", TASK_TYPES)
def test_an_unknown_augmentation_names_the_known_ones(task_type, scenes):
    with pytest.raises(UserError, match="crop_flip_color"):
        load_task(DataConfig(task_type=task_type, dataset=f"folder:{scenes}", augmentation="shift"), batch_size=4)


@pytest.mark.parametrize("task_type", TASK_TYPES)
def test_boxes_and_masks_are_stored_with_their_images(task_type, scenes, tmp_path):
    """A copy on disk gives the same examples as the data set."""

    def batches(cache: str) -> list:
        data = DataConfig(
            task_type=task_type,
            dataset=f"folder:{scenes}",
            image_size=SIZE,
            cache=cache,
            cache_dir=str(tmp_path),
            augmentation="none",
        )
        task = load_task(data, batch_size=1)
        if task_type == "detection":
            task = dataclasses.replace(
                task,
                preprocessing=dataclasses.replace(
                    cast(BoxPreprocessing, task.preprocessing), encode_boxes=lambda *boxes: boxes[0]
                ),
            )
        found = list(task.train(first_epoch=0, epochs=1).as_numpy_iterator())
        return sorted(found, key=lambda batch: batch[0].tobytes())

    for ours, theirs in zip(batches("disk"), batches("none"), strict=True):
        np.testing.assert_array_equal(ours[0], theirs[0])
        np.testing.assert_array_equal(ours[1], theirs[1])


@pytest.mark.parametrize("subset", ["5", "0.5"])
def test_a_subset_of_images_with_boxes_is_drawn_by_the_seed(subset, scenes):
    data = DataConfig(task_type="detection", dataset=f"folder:{scenes}", subset=subset)
    tasks = [load_task(data, batch_size=4, seed=seed) for seed in (0, 0, 1)]
    assert {task.num_train for task in tasks} == {5 if subset == "5" else 9}
    masks = [task.train_examples.mask.tolist() for task in tasks]
    assert masks[0] == masks[1] != masks[2]


def test_a_subset_of_more_images_than_there_are_is_refused(scenes):
    data = DataConfig(task_type="segmentation", dataset=f"folder:{scenes}", subset="100")
    with pytest.raises(UserError, match="subset must keep 1 to 18 training images"):
        load_task(data, batch_size=4)


def random_records(task_type: str, count: int) -> list[tuple[dict, dict]]:
    """Returns annotations and predictions of random images."""
    rng = np.random.default_rng(0)
    records = []
    for _ in range(count):
        if task_type == "segmentation":
            records.append(({"mask": rng.integers(-1, 3, (8, 8))}, {"mask": rng.integers(0, 3, (8, 8))}))
            continue
        corners = np.sort(rng.uniform(0, 32, (2, 4, 2)), axis=0)
        boxes = np.concatenate([corners[0], corners[1]], axis=1).astype(np.float32)
        truth = {
            "boxes": boxes,
            "classes": np.array([0, 1, 2, -1]),
            "crowd": np.zeros(4, bool),
            "scale": np.float32(0.5),
        }
        found = {"boxes": boxes * 0.5, "classes": np.array([0, 2, 2, -1]), "scores": rng.random(4).astype(np.float32)}
        records.append((truth, found))
    return records


@pytest.mark.parametrize("task_type", TASK_TYPES)
def test_scores_are_restored_from_their_state(task_type, tmp_path):
    scores = DENSE_TASKS[task_type].scores(["a", "b", "c"])
    for truth, prediction in random_records(task_type, 7):
        scores.add(truth, prediction)
    np.savez(tmp_path / "state.npz", **scores.state())
    again = DENSE_TASKS[task_type].scores(["a", "b", "c"])
    with np.load(tmp_path / "state.npz") as arrays:
        again.restore(arrays)
    assert again.measures() == scores.measures()
    assert scores.value() == pytest.approx(scores.measures().value)
    assert again.difference(scores).value == 0.0


def test_detections_are_compared_in_pixels_of_the_original_image():
    """The square has half a pixel for each pixel of the image."""
    scores = DENSE_TASKS["detection"].scores(["a"])
    truth = {
        "boxes": np.array([[0.0, 0.0, 20.0, 20.0]], np.float32),
        "classes": np.array([0]),
        "crowd": np.array([False]),
        "scale": np.float32(0.5),
    }
    found = {
        "boxes": np.array([[0.0, 0.0, 10.0, 10.0]], np.float32),
        "classes": np.array([0]),
        "scores": np.array([0.9]),
    }
    scores.add(truth, found)
    assert scores.value() == pytest.approx(1.0)
    assert scores.measures().others["ap_small"] == pytest.approx(1.0) and "ap_large" not in scores.measures().others


def test_a_mask_that_changes_after_the_data_set_was_opened_is_named(scenes, tmp_path):
    folder = tmp_path / "scenes"
    shutil.copytree(scenes, folder)
    data = DataConfig(task_type="segmentation", dataset=f"folder:{folder}", image_size=SIZE, cache="none")
    task = load_task(data, batch_size=4)
    for path in (folder / "test" / "masks").iterdir():
        Image.new("L", (8, 8)).save(path)
    with pytest.raises(UserError, match="A mask must have the size of its image"), task.broken_images_named():
        list(task.test)
    for path in (folder / "test" / "masks").iterdir():
        path.write_bytes(b"no picture")
    with pytest.raises(UserError, match="A mask must be a PNG file"), task.broken_images_named():
        list(task.test)
