"""The training program from flags to files, on the digits data set with a small network."""

import dataclasses
import html
import json
import pathlib
import shlex
import shutil
import signal
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
import torch_writer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from robust_tf import train
from robust_tf.config.data import DataConfig
from robust_tf.config.job import JobConfig, read_flag_file
from robust_tf.data import load_task
from robust_tf.errors import UserError
from robust_tf.evaluation.outcomes import read_outcomes
from robust_tf.evaluation.subject import load_subject
from robust_tf.flags import to_flag_file
from robust_tf.job import outputs, run
from robust_tf.job.task import load_job_task
from robust_tf.job.workdir import claim_workdir
from robust_tf.models import build_classifier, fetch_published, load_classifier, to_reference_state
from robust_tf.results import JobResults
from robust_tf.serving.publish.model_card import decoding_from_results
from robust_tf.statistics import in_words, paired_difference
from robust_tf.training.callbacks import SaveProgress
from robust_tf.training.checkpoint import Checkpoints
from robust_tf.transfer import sources
from tests.data.images import write_folder
from tests.training import kill

ROOT = pathlib.Path(__file__).parents[1]
SMALL = {
    "architecture": "resnet8",
    "image_size": 8,
    "classes": (0, 1, 2),
    "examples_per_class": 24,
    "norm": "l2",
    "epsilon": 0.5,
    "attack_steps": 2,
    "eval_steps": 3,
    "epochs": 2,
    "batch_size": 24,
    "learning_rate": 0.05,
    "log_every_steps": 1,
    # No checks for alarms, which take seconds to trace: tests/training/test_alarms.py tests them.
    "alarm_every_epochs": 100,
}


@pytest.fixture
def job(tmp_path, data_dir):
    """Makes small jobs; each name is a different workdir."""

    def make(name: str = "job", **changes) -> JobConfig:
        return JobConfig.from_flags(workdir=str(tmp_path / name), data_dir=str(data_dir), **{**SMALL, **changes})

    return make


@pytest.fixture(scope="module")
def trained(tmp_path_factory, data_dir) -> JobConfig:
    """A small job that has been run, for the tests that only inspect it."""
    config = JobConfig.from_flags(
        workdir=str(tmp_path_factory.mktemp("trained") / "job"), data_dir=str(data_dir), **SMALL
    )
    train.run(config)
    keras.backend.clear_session(free_memory=False)
    return config


@pytest.fixture
def source_file(job, tmp_path):
    """The flag file of a pretraining job."""
    path = tmp_path / "source.cfg"
    path.write_text(to_flag_file(job(outputs="classifier").with_flags(workdir="")))
    return path


@pytest.fixture
def transfer(job, source_file):
    """Makes jobs that transfer the source to three other digits."""

    def make(name: str = "transfer", **changes) -> JobConfig:
        settings = {
            "task": "transfer",
            "source": str(source_file),
            "classes": (5, 6, 7),
            "architecture": "",
            "image_size": None,
            "epsilon": 0.0,
            "eval_epsilon": 0.5,
        }
        return job(name, **{**settings, **changes})

    return make


def results_of(config: JobConfig) -> dict:
    return json.loads((pathlib.Path(config.run.workdir) / "results.json").read_text())


def classifier_of(config: JobConfig) -> keras.Model:
    return load_classifier(pathlib.Path(config.run.workdir) / "classifier.keras")


def weights_by_path(classifier: keras.Model) -> dict[str, np.ndarray]:
    return {weight.path: weight.numpy() for weight in classifier.weights}


def events(config: JobConfig, part: str) -> EventAccumulator:
    accumulator = EventAccumulator(f"{config.run.workdir}/tensorboard/{part}", size_guidance={"tensors": 0})
    return accumulator.Reload()


def test_pretraining_writes_the_documented_files(trained):
    config = trained
    workdir = pathlib.Path(config.run.workdir)
    assert {path.name for path in workdir.iterdir()} == {
        "flags.cfg",
        "classifier.keras",
        "results.json",
        "predictions.csv",
        "history.csv",
        "report.html",
        "README.md",
        "figures",
        "tensorboard",
        "checkpoints",
    }
    assert read_flag_file(workdir / "flags.cfg") == config.resolved()
    results = results_of(config)
    assert results["task"] == "pretrain" and results["class_names"] == ["0", "1", "2"]
    assert results["robust_accuracy_attack"] == {
        "name": "PGD-3 (highest-loss iterate)",
        "norm": "l2",
        "epsilon": 0.5,
        "step_size": 2.5 * 0.5 / 3,
        "steps": 3,
    }
    outcomes = read_outcomes(workdir)
    assert (outcomes.right.mean(), outcomes.robust.mean()) == (results["clean_accuracy"], results["robust_accuracy"])
    assert len(list((workdir / "figures" / "examples").glob("*.png"))) > 6
    low, high = results["clean_accuracy_interval"]
    assert low < results["clean_accuracy"] < high
    assert results["robust_accuracy"] <= results["clean_accuracy"]
    assert results["seed"] == 0 and results["versions"]["keras"] == keras.__version__
    classifier = classifier_of(config)
    assert results["total_parameters"] == classifier.count_params()
    assert results["trainable_parameters"] == sum(weight.numpy().size for weight in classifier.trainable_weights)
    assert "--epsilon=0.5" in results["flags"]


def test_the_saved_classifier_is_plain_keras_and_has_the_measured_accuracy(trained, data_dir, tmp_path):
    """It is loaded in safe mode in a process that cannot import robust_tf."""
    config = trained
    task = load_task(
        DataConfig(dataset="digits", classes=(0, 1, 2), image_size=8, data_dir=str(data_dir)), batch_size=1000
    )
    images, labels = next(task.test.as_numpy_iterator())
    np.savez(tmp_path / "test.npz", images=images, labels=labels)
    code = (
        "import sys; sys.modules['robust_tf'] = None; import keras, numpy as np; data = np.load(sys.argv[2]);"
        "model = keras.saving.load_model(sys.argv[1], safe_mode=True);"
        "assert type(model).__name__ == 'Functional';"
        "print((model.predict(data['images'], verbose=0).argmax(1) == data['labels']).mean())"
    )
    command = [sys.executable, "-c", code, f"{config.run.workdir}/classifier.keras", tmp_path / "test.npz"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path).stdout
    assert float(printed) == pytest.approx(results_of(config)["clean_accuracy"])


def test_tensorboard_has_charts_pictures_flags_and_hyperparameters(trained):
    config = trained
    train_events, validation, test = (events(config, part) for part in ("train", "validation", "test"))
    figures = {"adversarial_loss", "adversarial_accuracy", "clean_loss", "clean_accuracy"}
    settings = {"learning_rate", "epsilon", "images_per_second"}
    tags = set(train_events.Tags()["tensors"])
    assert {f"{group}/{name}" for group in ("step", "epoch") for name in figures | settings} <= tags
    assert {f"epoch/{name}" for name in figures} <= set(validation.Tags()["tensors"])
    assert [event.step for event in train_events.Tensors("step/adversarial_loss")] == [0, 1, 2, 3, 4, 5]
    radii = [float(tf.make_ndarray(event.tensor_proto)) for event in train_events.Tensors("step/epsilon")]
    assert radii == [0.5] * 6
    shown = [train_events.Tensors(f"{group}/images_per_second") for group in ("step", "epoch")]
    rates = [float(tf.make_ndarray(event.tensor_proto)) for event in shown[1]]
    assert [event.step for event in shown[0]] == [
        1,
        2,
        3,
        4,
        5,
    ]  # the first step is traced, so its speed is not measured
    assert min(float(tf.make_ndarray(event.tensor_proto)) for event in shown[0]) > 0
    assert results_of(config)["images_per_second"] == pytest.approx(np.median(rates), abs=0.06)
    text = tf.make_ndarray(train_events.Tensors("flags")[0].tensor_proto)
    assert b"--epsilon=0.5" in text.item()
    # There is one picture of the attack for each epoch, with 8 images in 3 rows.
    pictures = [tf.make_ndarray(event.tensor_proto) for event in validation.Tensors("attack")]
    assert len(pictures) == 2
    picture = tf.io.decode_png(pictures[-1][2]).numpy()
    assert picture.shape == (3 * 66, 8 * 66, 3)
    clean, adversarial, perturbation = np.split(picture.astype(float), 3)
    assert np.abs(clean - adversarial).max() > 0
    assert np.abs(perturbation - 127.5).max() > 120  # stretched to the full range
    tags = test.Tags()["tensors"]
    assert "confusion" in tags and "test/clean_accuracy" in tags and "test/robust_accuracy" in tags
    assert "_hparams_/session_start_info" in test.summary_metadata


RECIPES = {
    "fgsm": {"fast": "fgsm"},
    "free": {"fast": "free", "free_replays": 2, "epochs": 4},
    "epsilon_warmup": {"fast": "epsilon_warmup", "epsilon_warmup_epochs": 1.0},
    "trades": {"objective": "trades"},
    "trades_awp": {"objective": "trades_awp", "awp_warmup_epochs": 1.0},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_each_recipe_trains_and_reports_what_it_did(job, capsys, name):
    settings = {"attack_steps": None} if name in ("fgsm", "free") else {}
    config = job(**{**settings, **RECIPES[name]})
    train.run(config)
    out = capsys.readouterr().out
    assert read_flag_file(pathlib.Path(config.run.workdir) / "flags.cfg") == config.resolved()
    results = results_of(config)
    gradients = {"fgsm": 2, "free": 2, "epsilon_warmup": 3, "trades": 4, "trades_awp": 5}[name]
    assert (results["objective"], results["fast"]) == (config.adversarial.objective, config.adversarial.fast)
    assert (results["epochs"], results["gradients_per_image"]) == (2, gradients)
    assert "epoch 2/2" in out
    charts = events(config, "train")
    radii = [float(tf.make_ndarray(event.tensor_proto)) for event in charts.Tensors("step/epsilon")]
    # The radius of the next step, after each of the three steps of two epochs.
    rising = [0.5 / 3, 1 / 3, 0.5, 0.5, 0.5, 0.5]
    assert radii == pytest.approx(rising if name == "epsilon_warmup" else [0.5] * 6)
    assert ("epsilon 0.5" in out) == (name == "epsilon_warmup")
    # Training has clean figures only where they cost nothing; validation always has them.
    measured = name not in ("fgsm", "free")
    assert ("epoch/clean_accuracy" in charts.Tags()["tensors"]) == measured
    assert ("train clean" in out) == measured and "validation clean" in out
    assert "epoch/clean_accuracy" in events(config, "validation").Tags()["tensors"]


@pytest.mark.parametrize(
    ("settings", "lines"),
    [
        ({"fast": "fgsm", "attack_steps": None}, ["FGSM, l2 epsilon 0.5, step 0.625, random start", "2 forward"]),
        (
            {"fast": "free", "attack_steps": None, "epochs": 6},
            ["free, l2 epsilon 0.5, step 0.5", "2 epochs x 3 batches x 4 replays = 24 steps", "4 forward"],
        ),
        ({"fast": "epsilon_warmup"}, ["PGD-2, l2 epsilon 0.5, step 0.625, epsilon rises for 1 epochs", "3 forward"]),
        ({"objective": "trades_awp"}, ["TRADES with beta 6", "6 forward", "= 6 steps"]),
    ],
)
def test_the_plan_counts_the_passes_of_a_recipe(job, capsys, settings, lines):
    train.run(job(dry_run=True, **settings))
    out = capsys.readouterr().out
    assert all(line in out for line in lines), out


def interrupt(monkeypatch, *, where: str, epoch: int, after: int = 1) -> None:
    """Sends a signal in the given epoch, after some steps of training or validation, or when the epoch is saved."""
    method = getattr(SaveProgress, where)

    def and_a_signal(self, number, logs=None):
        here = self._progress.epochs_done == epoch and (where == "on_epoch_end" or number + 1 >= after)
        if here:
            self._pending.receive(signal.SIGTERM, None)
        method(self, number, logs)

    monkeypatch.setattr(SaveProgress, where, and_a_signal)


# In the order in which one run meets them: where the signal comes, in which epoch, and after how many steps.
INTERRUPTIONS = [
    ("on_train_batch_end", 0, 1),
    ("on_train_batch_end", 1, 3),  # the last step of the epoch, so only its validation is left
    ("on_test_batch_end", 1, 1),
    ("on_epoch_end", 1, 1),
    ("on_train_batch_end", 2, 2),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "interruptions"),
    [
        ({}, INTERRUPTIONS),
        ({"random_start": True, "ema_decay": 0.8}, INTERRUPTIONS[2:3]),
        ({"accumulate_steps": 2, "optimizer": "adam"}, INTERRUPTIONS[4:]),
        ({"jit_compile": "true"}, INTERRUPTIONS[4:]),
        ({"fast": "free", "attack_steps": None, "free_replays": 2, "epochs": 6}, INTERRUPTIONS[4:]),
    ],
)
def test_a_run_that_is_interrupted_several_times_ends_like_an_uninterrupted_one(
    job, monkeypatch, capsys, changes, interruptions
):
    settings = {"epochs": 3, "deterministic": True, "outputs": "classifier", **changes}
    train.run(job("whole", **settings))
    capsys.readouterr()
    for number, (where, epoch, after) in enumerate(interruptions):
        interrupt(monkeypatch, where=where, epoch=epoch, after=after)
        with pytest.raises(SystemExit) as stopped:
            train.run(job("parts", **settings))
        assert stopped.value.code == 143
        monkeypatch.undo()
        out = capsys.readouterr().out
        done = (epoch + 1, 0) if where == "on_epoch_end" else (epoch, 3 if where == "on_test_batch_end" else after)
        assert f"{done[0]} of 3 epochs are saved" in out and f"and {done[1]} steps of the next one" in out
        assert ("Continuing after" in out) == (number > 0)
    train.run(job("parts", **settings))
    assert "Continuing after" in capsys.readouterr().out
    whole, parts = classifier_of(job("whole")), classifier_of(job("parts"))
    for ours, theirs in zip(parts.weights, whole.weights, strict=True):
        np.testing.assert_array_equal(ours, theirs, err_msg=ours.path)
    ignored = ("seconds", "images_per_second", "flags")
    ours, theirs = ({k: v for k, v in results_of(job(n)).items() if k not in ignored} for n in ("parts", "whole"))
    assert ours == theirs
    history = [(pathlib.Path(job(n).run.workdir) / "history.csv").read_text() for n in ("parts", "whole")]
    assert history[0] == history[1]


@pytest.mark.slow
def test_a_killed_run_ends_like_an_uninterrupted_one():
    figures = kill.run(kills=3, seed=1, epochs=12)
    assert figures["different"] == []
    assert len(set(figures["states"]) - {""}) > 1  # killed at different steps


@pytest.mark.slow
def test_the_state_is_saved_within_an_epoch(job, monkeypatch):
    saved = []
    save = Checkpoints.save
    monkeypatch.setattr(
        Checkpoints,
        "save",
        lambda self, progress, arrays: (
            saved.append((progress.epochs_done, progress.steps_done)),
            save(self, progress, arrays),
        ),
    )
    train.run(job("steps", epochs=1, outputs="classifier", checkpoint_every_steps=2))
    assert saved == [(0, 2), (1, 0)]
    saved.clear()
    train.run(job("minutes", epochs=1, outputs="classifier", checkpoint_every_minutes=1e-9))
    assert saved == [(0, 1), (0, 2), (0, 3), (1, 0)]
    saved.clear()
    train.run(job("never", epochs=1, outputs="classifier", checkpoint_every_minutes=0))
    assert saved == [(1, 0)]


@pytest.mark.slow
def test_the_moving_average_is_evaluated_and_saved(job):
    """The average includes the statistics of BatchNorm. Training itself uses the weights that are not averaged."""
    config = job("average", ema_decay=0.9, select_by="last")
    train.run(config)
    arrays = Checkpoints(pathlib.Path(config.run.workdir) / "checkpoints").latest().arrays
    averages = {name.split()[1].removesuffix("_average"): a for name, a in arrays.items() if name.endswith("_average")}
    kept = {path.replace("/", "_"): weight for path, weight in weights_by_path(classifier_of(config)).items()}
    assert averages.keys() == {name for name in kept if not name.startswith("normalization")}
    for name, average in averages.items():
        np.testing.assert_array_equal(kept[name], average, err_msg=name)
    trained = next(array for name, array in arrays.items() if name.endswith(" kernel"))
    assert np.abs(trained - averages["stem_conv_kernel"]).max() > 1e-3


@pytest.mark.slow
def test_profile_steps_are_recorded(job):
    train.run(job(epochs=1, profile_steps=(2, 3)))
    assert list((pathlib.Path(job().run.workdir) / "tensorboard" / "plugins" / "profile").rglob("*.xplane.pb"))


def test_the_workdir_of_another_job_is_refused_and_left_unchanged(trained):
    before = {path: path.read_bytes() for path in pathlib.Path(trained.run.workdir).rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=r"--epsilon: 0.5 -> 0.25; --epochs: 2 -> 3"):
        train.run(trained.with_flags(epsilon=0.25, epochs=3))
    assert {path: path.read_bytes() for path in before} == before


def test_a_finished_job_is_not_run_again(trained, capsys):
    first = (pathlib.Path(trained.run.workdir) / "classifier.keras").read_bytes()
    train.run(trained)
    assert "is finished already" in capsys.readouterr().out
    assert (pathlib.Path(trained.run.workdir) / "classifier.keras").read_bytes() == first


def test_a_finished_job_without_a_report_gets_one(trained, capsys):
    """A job of an older version has no predictions, so it gets no report, and nothing is printed about that."""
    workdir = pathlib.Path(trained.run.workdir)
    report = (workdir / "report.html").read_bytes()
    (workdir / "report.html").unlink()
    train.run(trained)
    assert (workdir / "report.html").read_bytes() == report
    (workdir / "report.html").unlink()
    predictions = (workdir / "predictions.csv").rename(workdir / "elsewhere.csv")
    capsys.readouterr()
    try:
        train.run(trained)
        assert not (workdir / "report.html").exists() and "report" not in capsys.readouterr().out
    finally:
        predictions.rename(workdir / "predictions.csv")
    train.run(trained)
    assert (workdir / "report.html").exists()


def test_a_report_that_cannot_be_drawn_is_a_warning_of_one_line(trained, monkeypatch, capsys):
    def fail(workdir):
        raise RuntimeError("no fonts\nat all")

    report = pathlib.Path(trained.run.workdir) / "report.html"
    content = report.read_bytes()
    report.unlink()
    monkeypatch.setattr(outputs, "write_report", fail)
    train.run(trained)
    report.write_bytes(content)
    out = capsys.readouterr().out
    assert (
        f"WARNING: The report of {trained.run.workdir} could not be written. Received: RuntimeError: no fonts at all"
        in out
    )
    assert "clean accuracy" in out


def test_a_baseline_that_is_already_finished_is_compared(trained, tmp_path, capsys):
    """The figures are compared image by image, on the page too. Without predictions, a line says why they are not."""
    workdir = tmp_path / "job"
    shutil.copytree(trained.run.workdir, workdir)
    shutil.copytree(trained.run.workdir, workdir / "baseline")
    ours = read_outcomes(workdir)
    worse = dataclasses.replace(ours, predictions=(ours.labels + (np.arange(len(ours.labels)) % 2)) % 3)
    worse.write(workdir / "baseline")
    config = trained.with_flags(workdir=str(workdir))
    results, baseline = (JobResults.read(folder / "results.json") for folder in (workdir, workdir / "baseline"))
    outputs.finish_job(config, results, baseline)
    compared = results_of(config)["comparison"]
    expected = paired_difference(ours.right, worse.right)
    clean = compared["clean_accuracy"]
    assert (clean["difference"], *clean["interval"], clean["p_value"]) == (
        expected.difference,
        *expected.interval,
        expected.p_value,
    )
    line = f"clean accuracy, robust minus standard source: {in_words(expected)}"
    assert line in capsys.readouterr().out
    assert html.escape(line) in (workdir / "report.html").read_text()
    (workdir / "baseline" / "predictions.csv").unlink()
    outputs.finish_job(config, results, baseline)
    assert results_of(config)["comparison"] is None
    assert "There are no paired differences between the two sources" in capsys.readouterr().out


@pytest.mark.slow
def test_best_epoch_is_chosen_on_the_validation_part(job, monkeypatch):
    """Epochs after the best one do not affect the classifier."""
    values = iter([0.2, 0.9, 0.5])
    save = SaveProgress.on_epoch_end
    weights = []

    def with_figures(self, epoch, logs=None):
        weights.append(self.model.classifier.get_weights())
        save(self, epoch, {**logs, "val_accuracy": next(values)})

    monkeypatch.setattr(SaveProgress, "on_epoch_end", with_figures)
    config = job(epochs=3, outputs="classifier")
    train.run(config)
    assert results_of(config)["best_epoch"] == 2 and results_of(config)["validation_value"] == 0.9
    for ours, best, last in zip(classifier_of(config).get_weights(), weights[1], weights[2], strict=True):
        np.testing.assert_array_equal(ours, best)
        assert not np.array_equal(best, last)


@pytest.mark.slow
def test_transfer_with_a_baseline(transfer, tmp_path, capsys):
    config = transfer(baseline=True, export_dir=str(tmp_path / "exports"), model_name="digits")
    train.run(config)
    results = results_of(config)
    robust_source, standard_source = tmp_path / "source", tmp_path / "source_eps0"
    assert "--epsilon=0.5" in (robust_source / "flags.cfg").read_text()
    assert "--epsilon=0.0" in (standard_source / "flags.cfg").read_text()
    assert results["transfer_mode"] == "fixed_feature"
    assert results["baseline"]["source"] == str(standard_source / "classifier.keras")
    assert results["baseline"]["num_test_images"] == results["num_test_images"]
    out = capsys.readouterr().out
    for row in (results, results["baseline"]):
        low, high = row["clean_accuracy_interval"]
        assert f"{row['clean_accuracy']:.1%} ({low:.1%} to {high:.1%})" in out
    # With fixed features the backbone is bit-equal to its source, including BatchNorm statistics, and the head is new.
    for folder, job_folder in (
        (robust_source, config.run.workdir),
        (standard_source, f"{config.run.workdir}/baseline"),
    ):
        before = weights_by_path(load_classifier(folder / "classifier.keras"))
        after = weights_by_path(load_classifier(pathlib.Path(job_folder) / "classifier.keras"))
        assert before.keys() == after.keys()
        for path, weight in before.items():
            assert np.array_equal(weight, after[path]) == (not path.startswith("logits")), path
    # The classifier is published as version 1, and the same command publishes it as version 2.
    assert (tmp_path / "exports" / "digits" / "1" / "saved_model.pb").exists()
    assert f"--model_base_path={tmp_path / 'exports' / 'digits'}" in out
    train.run(config)
    assert (tmp_path / "exports" / "digits" / "2" / "saved_model.pb").exists()


@pytest.mark.slow
def test_transfer_of_the_packaged_classifiers(transfer, monkeypatch):
    """It works without a connection, and the twin is found by its name."""

    def no_connection(*args, **kwargs):
        raise OSError("a connection was tried")

    monkeypatch.setattr("socket.socket.connect", no_connection)
    config = transfer(source="resnet20_fashion_mnist_l2_eps1", baseline=True)
    train.run(config)
    results = results_of(config)
    assert results["source"] == "resnet20_fashion_mnist_l2_eps1"
    assert results["baseline"]["source"] == "resnet20_fashion_mnist_l2_eps0"
    source = weights_by_path(load_classifier(fetch_published(config.transfer.source)))
    after = weights_by_path(classifier_of(config))
    assert all(np.array_equal(weight, after[path]) for path, weight in source.items() if not path.startswith("logits"))


@pytest.mark.slow
def test_partial_transfer_with_moving_statistics(transfer):
    """Frozen weights stay bit-equal, while frozen_batchnorm=update changes their BatchNorm statistics."""
    config = transfer(
        transfer_mode="partial", freeze_through="stage2", frozen_batchnorm="update", epochs=1, outputs="classifier"
    )
    train.run(config)
    source = weights_by_path(classifier_of(config.with_flags(workdir=config.run.workdir[:-8] + "source")))
    after = weights_by_path(classifier_of(config))
    for path, weight in source.items():
        frozen = path.startswith(("stem", "stage1", "stage2")) and "moving" not in path
        assert np.array_equal(weight, after[path]) == frozen, path


@pytest.mark.slow
def test_unfreezing_at_an_epoch_survives_an_interruption(transfer, monkeypatch):
    settings = {"unfreeze_at_epoch": 1, "epochs": 3, "deterministic": True, "outputs": "classifier"}
    train.run(transfer("whole", **settings))
    interruptions = [("on_epoch_end", 0, 1), ("on_train_batch_end", 1, 1), ("on_test_batch_end", 1, 1)]
    for where, epoch, after in interruptions:
        interrupt(monkeypatch, where=where, epoch=epoch, after=after)
        with pytest.raises(SystemExit):
            train.run(transfer("parts", **settings))
        monkeypatch.undo()
    train.run(transfer("parts", **settings))
    whole, parts = classifier_of(transfer("whole")), classifier_of(transfer("parts"))
    for ours, theirs in zip(parts.weights, whole.weights, strict=True):
        np.testing.assert_array_equal(ours, theirs, err_msg=ours.path)


@pytest.mark.slow
def test_transfer_from_a_checkpoint_of_the_reference(transfer, tmp_path):
    """The normalization in the checkpoint is kept, and the backbone stays bit-equal."""
    original = build_classifier("resnet8", 10, image_size=16, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    state = {f"module.model.{key}": value for key, value in to_reference_state(original).items()}
    state["module.normalizer.new_mean"] = np.array([0.1, 0.2, 0.3], np.float32).reshape(3, 1, 1)
    state["module.normalizer.new_std"] = np.array([0.4, 0.5, 0.6], np.float32).reshape(3, 1, 1)
    torch_writer.write_zip(tmp_path / "source.ckpt", {"model": torch_writer.tensors(state), "epoch": 3})
    config = transfer(source=str(tmp_path / "source.ckpt"), architecture="resnet8", image_size=16, epochs=1)
    train.run(config)
    classifier = classifier_of(config)
    before, after = weights_by_path(original), weights_by_path(classifier)
    assert all(np.array_equal(before[path], after[path]) for path in before if not path.startswith("logits"))
    np.testing.assert_allclose(classifier.get_layer("normalization").get_config()["mean"], [0.1, 0.2, 0.3])


@pytest.mark.parametrize("tf32", [True, False])
def test_tf32_is_set_as_its_flag_says(job, tf32):
    tf.config.experimental.enable_tensor_float_32_execution(not tf32)
    train.run(job(dry_run=True, tf32=tf32))
    assert tf.config.experimental.tensor_float_32_execution_enabled() == tf32
    assert JobConfig.from_flags().optimization.tf32  # TensorFlow's own default


@pytest.mark.slow
def test_a_job_compiled_by_xla_gives_the_same_figures(job, recwarn):
    results = []
    for jit_compile in ("false", "true"):
        config = job(jit_compile, jit_compile=jit_compile, epochs=1, outputs="classifier")
        train.run(config)
        results.append(results_of(config))
    assert not [
        warning for warning in recwarn if "jit_compile" in str(warning.message)
    ]  # Keras would warn if it did not compile
    assert results[0]["validation_value"] == pytest.approx(results[1]["validation_value"], abs=0.1)
    assert results[0]["clean_accuracy"] == pytest.approx(results[1]["clean_accuracy"], abs=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["mixed_bfloat16", "mixed_float16"])
def test_mixed_precision_job(job, monkeypatch, capsys, precision):
    monkeypatch.setattr(run, "emulation_warning", lambda precision: f"{precision} is emulated here")
    config = job(precision=precision, epochs=1)
    train.run(config)
    assert f"{precision} is emulated here" in capsys.readouterr().out
    classifier = classifier_of(config)
    assert classifier.output.dtype == "float32"
    assert classifier.get_layer("stage1_block1_conv1").compute_dtype == precision.removeprefix("mixed_")
    assert classifier.get_layer("normalization").compute_dtype == "float32"
    assert keras.config.dtype_policy().name == "float32"  # the next job starts with the default again


@pytest.mark.slow
@pytest.mark.parametrize(("mixing", "epsilon"), [("mixup", 0.1), ("mixup", 0.0), ("cutmix", 0.0)])
def test_a_job_with_mixed_images(job, mixing, epsilon):
    """Labels are shares of classes in training, with or without an attack, and classes in evaluation."""
    config = job(
        mixing=mixing, rand_augment=0.2, epsilon=epsilon, eval_epsilon=0.0, epochs=3, subset="", deterministic=True
    )
    train.run(config)
    results = results_of(config)
    assert results["clean_accuracy"] > 0.5  # with three classes, so the labels reach the loss
    validation = events(config, "validation")
    figure = "epoch/adversarial_accuracy" if epsilon else "epoch/clean_accuracy"
    accuracies = [float(tf.make_ndarray(e.tensor_proto)) for e in validation.Tensors(figure)]
    assert results["validation_value"] == pytest.approx(max(accuracies))


def image_folder(tmp_path: pathlib.Path) -> pathlib.Path:
    """Writes light and dark images, one of which is broken, and returns its path."""
    rng = np.random.default_rng(0)
    for name, low in (("dark", 0), ("light", 128)):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(30):
            pixels = rng.integers(low, low + 128, (16, 16, 3), np.uint8)
            tf.io.write_file(str(tmp_path / "images" / name / f"{number}.jpg"), tf.io.encode_jpeg(pixels))
    broken = tmp_path / "images" / "dark" / "7.jpg"
    broken.write_bytes(broken.read_bytes()[:-100])
    return broken


@pytest.mark.slow
def test_a_broken_image_is_named_or_it_is_skipped_and_counted(job, tmp_path, capsys):
    broken = image_folder(tmp_path)
    options = {"dataset": f"folder:{tmp_path / 'images'}", "classes": (), "examples_per_class": None, "epochs": 1}
    options |= {"cache_dir": str(tmp_path / "cache"), "augmentation": "none", "epsilon": 0.0}
    with pytest.raises(UserError, match=f"Cannot decode the image {broken}.*--skip_bad_images"):
        train.run(job("stops", **options))
    options |= {"skip_bad_images": True, "exif": "apply", "alpha_background": "white", "split_seed": 3}
    notes = tmp_path / "images" / "dark" / "notes.txt"
    notes.write_text("left out")
    train.run(job("goes_on", **options))
    results = results_of(job("goes_on"))
    assert results["skipped_images"] == [str(broken)]
    assert results["num_train_images"] + results["num_validation_images"] + results["num_test_images"] == 59
    out = capsys.readouterr().out
    assert f"Left out: files that are not images (1): {notes}." in out
    assert f"Left out 1 images that cannot be decoded: {broken}" in out
    assert (results["exif"], results["alpha_background"], results["split_seed"]) == ("apply", "white", 3)

    # The evaluation uses the same images, and reads them in the same way.
    subject = load_subject(f"{job('goes_on').run.workdir}/classifier.keras")
    of_training = load_job_task(job("goes_on", **options))
    assert subject.task.class_preprocessing.decoding == of_training.class_preprocessing.decoding
    assert subject.task.class_preprocessing.decoding == decoding_from_results(JobResults.from_json(results))
    assert subject.task.test_examples.part.paths == of_training.test_examples.part.paths  # type: ignore[attr-defined]
    assert subject.task.num_test == results["num_test_images"]


def test_a_loss_that_is_not_a_number_stops_the_run(job):
    config = job(learning_rate=1e30, epochs=3)
    with pytest.raises(UserError, match=r"Received: loss=(nan|inf) in step \d+ of epoch \d"):
        train.run(config)
    assert not (pathlib.Path(config.run.workdir) / "results.json").exists()


def test_weights_that_break_in_the_last_step_of_an_epoch_are_not_saved(job, monkeypatch):
    """A step reports the loss before its update, so only the validation shows such weights."""
    save = SaveProgress.on_epoch_end

    def save_and_watch_out(self, epoch, logs=None):
        save(self, epoch, logs)
        for weight in self.model.classifier.weights:
            assert np.isfinite(weight.numpy()).all(), weight.path

    monkeypatch.setattr(SaveProgress, "on_epoch_end", save_and_watch_out)
    config = job(examples_per_class=8, epsilon=0.0, learning_rate=1e38, epochs=2)  # one step an epoch
    with pytest.raises(UserError, match="Received: val_loss=(nan|inf) in the validation of epoch 1"):
        train.run(config)
    assert not list((pathlib.Path(config.run.workdir)).rglob("*.npz"))


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ({"dataset": "digit"}, "Did you mean 'digits'"),
        ({"epsilon": 128.0}, "Did you mean 128/255"),
        ({"learning_rate_multipliers": ("stage9=0.1",)}, "'stage9'.*Valid: head, stage1"),
        ({"export_dir": "exports", "model_name": "a/b"}, "Received: 'a/b'"),
    ],
)
def test_a_corrected_command_may_use_the_workdir_of_a_mistaken_one(job, mistake, message):
    with pytest.raises(UserError, match=message):
        train.run(job(**mistake))
    claim_workdir(job())
    assert read_flag_file(pathlib.Path(job().run.workdir) / "flags.cfg") == job().resolved()


def test_a_source_that_would_use_the_workdir_of_its_transfer_is_refused(transfer, tmp_path):
    with pytest.raises(
        UserError, match=f"--source={tmp_path / 'source.cfg'}, whose job would use the workdir of this job"
    ):
        train.run(transfer("source"))


@pytest.mark.parametrize("flags", [["--flagfile=configs/pets.cfg"], ["--flagfile", "configs/pets.cfg", "--seed=1"]])
def test_the_workdir_is_named_after_the_flag_file(flags):
    assert train.default_workdir(["train", *flags]) == "runs/pets"


def test_dry_run_prints_the_plan_and_writes_nothing(transfer, capsys):
    train.run(transfer(dry_run=True))
    out = capsys.readouterr().out
    assert "72 training" in out and "3 classes" in out
    assert "195 trainable" in out  # 64 features to 3 logits
    assert "2 epochs x 3 = 6 steps" in out
    assert "GB (estimate)" in out
    assert not pathlib.Path(transfer().run.workdir).exists()


def broken_file(tmp_path: pathlib.Path) -> str:
    path = tmp_path / "broken.keras"
    path.write_bytes(b"PK no archive")
    return str(path)


@pytest.mark.parametrize(
    ("source", "architecture", "message"),
    [
        ("nowhere.keras", "", "nowhere.keras"),
        (broken_file, "", r"broken\.keras \(13 bytes\).*damaged"),
        ("resnet50_l2_eps33", "", "Received: 'resnet50_l2_eps33'. Did you mean 'resnet50_l2_eps3'"),
        ("some/folder/model.h5", "", "Received: source=some/folder/model.h5"),
        ("model.ckpt", "", "Received: source=model.ckpt. Set architecture to one of"),
        ("missing.cfg", "", "missing.cfg"),
    ],
)
def test_a_source_that_cannot_be_used_is_named(transfer, tmp_path, source, architecture, message):
    source = source(tmp_path) if callable(source) else source
    with pytest.raises(UserError, match=message):
        train.run(transfer(source=source, architecture=architecture))


def test_a_source_that_does_not_fit_is_refused(transfer, trained):
    source = f"{trained.run.workdir}/classifier.keras"
    with pytest.raises(UserError, match="has the architecture resnet8. Received: architecture=resnet20"):
        train.run(transfer("a", source=source, architecture="resnet20"))
    with pytest.raises(UserError, match="'stage9'.*stage3"):
        train.run(transfer("b", source=source, transfer_mode="partial", freeze_through="stage9"))
    with pytest.raises(UserError, match="standard counterpart is known"):
        train.run(transfer("c", source=source, baseline=True))


def test_a_workdir_that_cannot_be_written_is_named(job, tmp_path):
    (tmp_path / "blocked").write_text("")
    with pytest.raises(UserError, match="blocked"):
        train.run(job("blocked/job"))


@pytest.mark.parametrize("blocked", ["export_dir", "workdir", "twin"])
def test_a_folder_that_cannot_be_written_is_refused_before_training(transfer, tmp_path, monkeypatch, capsys, blocked):
    monkeypatch.setattr(run, "run_job", lambda config: pytest.fail("training began"))
    (tmp_path / "afile").write_text("")
    changes = {
        "export_dir": {"export_dir": str(tmp_path / "afile" / "exports")},
        "workdir": {"workdir": str(tmp_path / "afile")},
        "twin": {"baseline": True},
    }[blocked]
    (tmp_path / "source_eps0").write_text("")  # the workdir of the twin of the source
    config = transfer().with_flags(**changes)
    flag = "--export_dir" if blocked == "export_dir" else "--workdir"
    with pytest.raises(UserError, match=f"{flag} needs a folder that can be made .* Received: .*Not a directory"):
        train.run(config)
    train.run(config.with_flags(dry_run=True))  # the plan may be for another machine
    out = capsys.readouterr().out
    assert "dry run: nothing is trained" in out and "WARNING: on this machine the job could not" in out


def test_the_next_commands_can_be_copied_into_a_shell(job, tmp_path, capsys):
    config = job("my run #1", export_dir=str(tmp_path / "ex & port"))
    outputs.print_next_commands(config)
    lines = [shlex.split(line, comments=True) for line in capsys.readouterr().out.splitlines()]
    assert lines[1] == ["tensorboard", "--logdir", str(tmp_path)]
    assert lines[2][-2:] == ["--model_name=my run #1", f"--model_base_path={tmp_path / 'ex & port' / 'my run #1'}"]
    assert lines[3][0] == "curl" and json.loads(lines[3][2])["instances"]
    assert lines[3][3] == "http://localhost:8501/v1/models/my%20run%20%231:predict"


def program(*arguments: str, **options) -> subprocess.Popen:
    command = [sys.executable, "-m", "robust_tf.train", *arguments]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--epsilon=8", "--norm=linf"], 2, "error: --epsilon of the linf norm"),
        (["--dataset=digit"], 2, "Did you mean 'digits'"),
        (["--epslon=1"], 2, "Did you mean: epsilon"),
        (["--task=pretrain", "configs/quickstart.cfg"], 2, "'configs/quickstart.cfg'"),
    ],
)
def test_the_program_explains_a_mistake_without_a_traceback(tmp_path, arguments, code, message):
    process = program(f"--workdir={tmp_path / 'w'}", *arguments)
    out, _ = process.communicate()
    assert process.returncode == code
    assert message in out and "Traceback" not in out


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_the_state_and_says_how_to_continue(job, tmp_path, number, code):
    (tmp_path / "job.cfg").write_text(to_flag_file(job(epochs=10_000)))
    # A shell that runs the tests in the background makes its children ignore Ctrl-C.
    listening = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    process = program(f"--flagfile={tmp_path / 'job.cfg'}", **listening)
    for line in process.stdout:
        if line.startswith("epoch     2/"):
            break
    process.send_signal(number)
    out = process.stdout.read()
    assert process.wait(timeout=60) == code
    assert "epochs are saved" in out and "Traceback" not in out
    assert Checkpoints(pathlib.Path(job().run.workdir) / "checkpoints").latest().progress.epochs_done >= 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pets", "imagenet_resnet50_l2_eps3"])
def test_the_large_configs_run_a_step_on_mocked_data(name, tmp_path, monkeypatch, mocked_tfds):
    """The images are random, and the ResNet-50 is untrained instead of downloaded."""
    overrides = [f"--workdir={tmp_path / name}", "--epochs=1", "--batch_size=4", "--eval_steps=1", "--nobaseline"]
    overrides.append("--alarm_every_epochs=100")  # no check for alarms, which would take a minute to trace
    config = read_flag_file(
        ROOT / "configs" / f"{name}.cfg", [*overrides, "--export_dir=", "--validation_fraction=0.1"]
    )
    source = tmp_path / "published.keras"
    imagenet = {"image_size": 224, "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    build_classifier("resnet50", 1000, **imagenet).save(source)
    monkeypatch.setattr(sources, "fetch_published", lambda published: source)
    with mocked_tfds(num_examples=5):
        train.run(config)
    results = results_of(config)
    assert (results["image_size"], results["resize_size"], results["num_test_images"]) == (224, 256, 5)
    assert len(results["class_names"]) == {"pets": 37, "imagenet_resnet50_l2_eps3": 1000}[name]
    if name == "pets":  # transfer normalizes nothing, as in the paper's code
        assert classifier_of(config).get_layer("normalization").get_config()["mean"] == [0.0, 0.0, 0.0]


@pytest.mark.slow
def test_a_job_on_a_folder_of_images(job, tmp_path):
    """The images are JPEG files, and the class names in results.json are the names of the folders."""
    root = write_folder(tmp_path / "photos", {"train/cat": 12, "train/dog": 12, "test/cat": 3, "test/dog": 2})
    config = job(dataset=f"folder:{root}", classes=(), examples_per_class=None)
    train.run(config)
    results = results_of(config)
    assert results["dataset"] == f"folder:{root}"
    assert results["class_names"] == ["cat", "dog"]
    assert (results["num_train_images"], results["num_validation_images"], results["num_test_images"]) == (22, 2, 5)
