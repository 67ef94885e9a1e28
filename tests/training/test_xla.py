"""XLA in training: bit-equal with deterministic kernels, one program for each kind of step, and lines that say so."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import warnings
import zipfile

import keras
import numpy as np
import pytest
import tensorflow as tf

from robust_tf.attacks import AttackConfig, run_pgd
from robust_tf.errors import UserError
from robust_tf.training import AdversarialTrainer, xla
from robust_tf.training.metrics import Accuracy, CrossEntropy, MeanPerClassAccuracy
from robust_tf.training.xla import CompilingLines, compiles_with_xla, execution_line
from tests.tasks import make_task

ROOT = pathlib.Path(__file__).parents[2]
ATTACK = AttackConfig(norm="l2", epsilon=0.5, step_size=0.2, steps=2, random_start=True)


def classifier_with(*layers: keras.layers.Layer) -> keras.Model:
    return keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            keras.layers.Conv2D(4, 3),
            keras.layers.BatchNormalization(),
            keras.layers.ReLU(),
            *layers,
            keras.layers.GlobalAveragePooling2D(),
            keras.layers.Dense(3),
        ]
    )


def compiled_trainer(*layers: keras.layers.Layer) -> AdversarialTrainer:
    keras.utils.set_random_seed(1)
    trainer = AdversarialTrainer(classifier_with(*layers), ATTACK, seed=1)
    trainer.compile(keras.optimizers.SGD(0.1, momentum=0.9), CrossEntropy(), jit_compile=True)
    trainer.build_metrics()
    trainer.optimizer.build(trainer.classifier.trainable_variables)
    return trainer


def batches(epochs: int, *, first: int = 0) -> tf.data.Dataset:
    rng = np.random.default_rng(0)
    images, labels = rng.random((32, 8, 8, 3)).astype(np.float32), rng.integers(0, 3, 32)
    return tf.data.Dataset.from_tensor_slices((images, labels)).batch(16).repeat(epochs).skip(first)


@pytest.mark.slow
def test_repeats_and_resumed_runs_are_bit_equal_with_deterministic_kernels():
    tf.config.experimental.enable_op_determinism()
    runs = []
    for resumed in (False, False, True):
        trainer = compiled_trainer(keras.layers.MaxPooling2D(3, 2, padding="same"))
        assert trainer.jit_compile
        if not resumed:
            trainer.fit(batches(2), shuffle=False, verbose=0)
        else:
            trainer.fit(batches(2).take(1), shuffle=False, verbose=0)
            state = [variable.numpy() for variable in trainer.state]
            trainer = compiled_trainer(keras.layers.MaxPooling2D(3, 2, padding="same"))
            for variable, value in zip(trainer.state, state, strict=True):
                variable.assign(value)
            trainer.fit(batches(2, first=1), shuffle=False, verbose=0)
        runs.append([variable.numpy() for variable in trainer.classifier.variables])
    for other in runs[1:]:
        for ours, theirs in zip(other, runs[0], strict=True):
            np.testing.assert_array_equal(ours, theirs)


class TensorFlowsPooling(keras.layers.Layer):
    """A layer of a user, whose operations nothing replaces."""

    def call(self, x):
        return tf.nn.max_pool2d(x, 2, 2, "VALID")


def test_an_operation_without_a_deterministic_kernel_is_refused_in_one_sentence():
    tf.config.experimental.enable_op_determinism()
    with pytest.raises(UserError, match=r"Received: .*deterministic.* Train without XLA \(jit_compile=False\)"):
        compiled_trainer(TensorFlowsPooling()).fit(batches(1), shuffle=False, verbose=0)


def test_a_layer_that_does_not_support_xla_is_named_in_a_warning():
    layer = keras.layers.ReLU()
    layer.supports_jit = False
    model = classifier_with(keras.Sequential([keras.Input((6, 6, 4)), layer]))
    assert not compiles_with_xla(True, model)
    with pytest.warns(UserWarning, match="does not support XLA"):
        AdversarialTrainer(model, ATTACK).compile("sgd", CrossEntropy(), jit_compile=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        AdversarialTrainer(model, ATTACK).compile("sgd", CrossEntropy())
        AdversarialTrainer(classifier_with(), ATTACK).compile("sgd", CrossEntropy(), jit_compile=True)


@pytest.mark.parametrize(("device", "expected"), [("CPU", False), ("GPU", True)])
def test_auto_means_xla_on_an_accelerator_also_with_deterministic_kernels(monkeypatch, device, expected):
    tf.config.experimental.enable_op_determinism()
    devices = [tf.config.PhysicalDevice("/physical_device:0", device)]
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind=None: devices)
    trainer = AdversarialTrainer(classifier_with(), ATTACK)
    trainer.compile("sgd", CrossEntropy())
    assert trainer.jit_compile is expected


LINES = [
    (
        "CPU",
        {},
        "not compiled with XLA, which is slow on a CPU (--jit_compile=true compiles anyway); kernels",
    ),
    ("CPU", {"compiled": True, "jit_compile": "true"}, "compiled with XLA, slow on a CPU; kernels"),
    ("GPU", {"compiled": True, "deterministic": True}, "compiled with XLA; deterministic kernels, slower on a GPU; "),
    ("GPU", {"compiled": True}, "products in TF32 (--notf32: in float32)."),
    ("GPU", {"compiled": True, "tf32": False}, "products in full precision."),
    ("GPU", {"jit_compile": "false", "precision": "mixed_bfloat16"}, "(--jit_compile=false), which is slower on a GPU"),
    ("GPU", {"compiled": True, "replicas": 2}, "compiled with XLA, except for the exchange between the replicas;"),
    ("GPU", {}, "because a layer of the network does not support it"),
]


@pytest.mark.parametrize(("device", "changes", "expected"), LINES)
def test_a_line_says_how_the_step_runs_and_why(monkeypatch, device, changes, expected):
    devices = [tf.config.PhysicalDevice("/physical_device:0", device)]
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind=None: devices if kind in (None, device) else [])
    settings = {"compiled": False, "deterministic": False, "replicas": 1, "precision": "float32", "tf32": True}
    line = execution_line(**{"jit_compile": "auto", **settings, **changes})
    assert line.startswith("The training step is ") and expected in line and line.count(".") == 1


@pytest.mark.slow
def test_each_compilation_is_announced_once(capsys, monkeypatch):
    monkeypatch.setattr(xla, "number_functions", lambda kind: None)  # which would take a moment
    trainer = compiled_trainer()
    lines = CompilingLines()
    for _ in range(2):
        trainer.fit(batches(1), validation_data=batches(1), epochs=2, shuffle=False, verbose=0, callbacks=[lines])
    trainer.compile("sgd", CrossEntropy(), jit_compile=True)  # as when layers are unfrozen
    trainer.fit(batches(1), shuffle=False, verbose=0, callbacks=[lines])
    printed = [line.partition(" step")[0] for line in capsys.readouterr().out.splitlines()]
    once = ["Compiling the training", "The first training"]
    assert printed == [*once, "Compiling the validation", "The first validation", *once]
    trainer.compile("sgd", CrossEntropy(), jit_compile=False)
    trainer.fit(batches(1), shuffle=False, verbose=0, callbacks=[lines])
    assert not capsys.readouterr().out


def test_filled_batches_hold_the_epoch_and_then_its_first_images(data_dir):
    task = make_task("digits", batch_size=64, augmentation="none", data_dir=data_dir)
    filled = dataclasses.replace(task, fill_remainder=True)
    assert task.num_train % 64 and filled.steps_per_epoch == task.steps_per_epoch
    for first_step in (0, 3):
        position = {"first_epoch": 1, "epochs": 2}
        plain = np.concatenate([images for images, _ in task.train(**position).as_numpy_iterator()])
        # `take`, so that a data set without an end fails too.
        dataset = filled.train(**position, first_step=first_step).take(2 * task.steps_per_epoch)
        parts = [images for images, _ in dataset.as_numpy_iterator()]
        assert [len(images) for images in parts] == [64] * (task.steps_per_epoch - first_step)
        images = np.concatenate(parts)
        expected = np.concatenate([plain, plain[: -task.num_train % 64]])[first_step * 64 :]
        np.testing.assert_array_equal(images, expected)
    assert filled.train(first_epoch=0, epochs=1).element_spec[0].shape[0] == 64  # known to XLA


def test_images_that_fill_up_a_batch_do_not_change_an_accuracy(data_dir):
    """Not even by rounding, although the weights of the other images are not 1."""
    task = make_task("digits", batch_size=64, data_dir=data_dir, subset="300")
    for metric in (Accuracy, lambda: MeanPerClassAccuracy(10)):
        figures = []
        for dataset in (task.validation, task.validation_share(replicas=1)):
            measured = metric()
            for images, labels, *weights in dataset:
                logits = tf.one_hot(tf.cast(10 * images[:, 3, 3, 0], tf.int32), 10)
                measured.update_state(labels, logits, *weights)
            figures.append(float(measured.result()))
        assert 0 < figures[0] < 1 and figures[0] == figures[1]


def test_the_whole_attack_is_one_loop_of_any_length():
    classifier = classifier_with()

    def program(steps: int) -> str:
        attack = dataclasses.replace(ATTACK, steps=steps)

        @tf.function(jit_compile=True, autograph=False)
        def run(images: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
            return run_pgd(classifier, images, labels, attack=attack, seed=tf.constant([1, 2])).images_adv

        return run.experimental_get_compiler_ir(tf.zeros((4, 8, 8, 3)), tf.zeros(4, tf.int32))(stage="hlo")

    short, long = program(2), program(20)
    assert " while(" in short and short.count(" convolution(") == long.count(" convolution(") > 0


def trained(tmp_path: pathlib.Path, name: str, data_dir: pathlib.Path, *flags: str) -> str:
    """Runs a small job of two epochs in a new process, and returns what it prints."""
    small = ["--dataset=digits", "--classes=0,1", "--subset=40", "--architecture=resnet8", "--image_size=8"]
    small += ["--norm=l2", "--epsilon=0.5", "--attack_steps=2", "--eval_steps=2", "--epochs=2", "--batch_size=24"]
    small += ["--alarm_every_epochs=100", "--deterministic", "--jit_compile=true", f"--data_dir={data_dir}"]
    command = [sys.executable, "-m", "robust_tf.train", *small, f"--workdir={tmp_path / name}", *flags]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_job_compiles_three_programs_which_later_jobs_find_unless_they_are_damaged(tmp_path, data_dir):
    """There are partial batches in training (40 images), validation and test, which must not compile anew."""
    cache = f"--cache_dir={tmp_path / 'cache'}"
    out = trained(tmp_path, "first", data_dir, cache)
    assert "The training step is compiled with XLA, slow on a CPU; deterministic kernels." in out
    assert out.count("most of it for compiling") == 2 and out.count("Compiling the ") == 3
    programs = sorted((tmp_path / "cache" / "xla").glob("*/*.pb"))
    assert len(programs) == 3
    content = {program: program.read_bytes() for program in programs}
    programs[0].write_bytes(content[programs[0]][:1000])
    programs[1].write_bytes(b"")
    out = trained(tmp_path, "second", data_dir, cache)
    assert "Compiling the test with XLA." in out
    weights = [
        zipfile.ZipFile(tmp_path / name / "classifier.keras").read("model.weights.h5") for name in ("first", "second")
    ]
    assert weights[0] == weights[1]
    figures = [json.loads((tmp_path / name / "results.json").read_text()) for name in ("first", "second")]
    assert figures[0]["robust_accuracy"] == figures[1]["robust_accuracy"]
