"""Workdirs of finished jobs that never ran, with known predictions, a short history and a few pictures."""

import pathlib

import numpy as np

from robust_tf.config.job import JobConfig
from robust_tf.evaluation.example_choice import Example
from robust_tf.evaluation.outcomes import Outcomes
from robust_tf.flags import to_flag_file
from robust_tf.reporting import write_examples, write_history
from robust_tf.results import JobResults, MeasuredAttack
from robust_tf.statistics import mean_per_class, wilson_interval

# Folders, and so classes, may have such names: markup, a formula, a very long word.
CLASS_NAMES = ("cat", "dog & <b>wolf</b>", "$x^2$", "pneumonoultramicroscopicsilicovolcanoconiosis")
HISTORY = [
    {
        "loss": 1.4 - 0.2 * epoch,
        "accuracy": 0.3 + 0.1 * epoch,
        "val_loss": 1.5 - 0.2 * epoch,
        "val_accuracy": 0.3 + 0.1 * epoch,
        "val_clean_accuracy": 0.4 + 0.1 * epoch,
        "learning_rate": 0.1 / 10**epoch,
    }
    for epoch in range(3)
]


def outcomes(seed: int, *, attacked: bool = True, share: float = 0.75) -> Outcomes:
    """Returns predictions for 200 images of four classes."""
    rng = np.random.default_rng(seed)
    labels = np.arange(200) % 4
    predictions = np.where(rng.random(200) < share, labels, rng.integers(4, size=200))
    predictions_adv = np.where(rng.random(200) < 0.6, predictions, rng.integers(4, size=200))
    return Outcomes(np.arange(200), labels, predictions, predictions_adv if attacked else None)


def results_of(made: Outcomes, **changes) -> JobResults:
    """Returns the results of a job with these predictions."""
    right, robust = int(made.right.sum()), None if made.robust is None else int(made.robust.sum())
    attack = MeasuredAttack(name="PGD-20 (highest-loss iterate)", norm="l2", epsilon=0.5, step_size=0.0625, steps=20)
    values = {
        "task": "pretrain",
        "dataset": "folder:/pictures",
        "class_names": CLASS_NAMES,
        "architecture": "resnet8",
        "image_size": 8,
        "metric": "accuracy",
        "clean_accuracy": right / 200,
        "clean_accuracy_interval": wilson_interval(right, 200),
        "mean_per_class_accuracy": mean_per_class(made.confusion(4)),
        "robust_accuracy": None if robust is None else robust / 200,
        "robust_accuracy_interval": None if robust is None else wilson_interval(robust, 200),
        "robust_accuracy_attack": None if robust is None else attack,
        "num_train_images": 800,
        "num_validation_images": 80,
        "num_test_images": 200,
        "skipped_images": ("cat/broken <1>.jpg",),
        "epochs": 3,
        "best_epoch": 2,
        "alarms": ("Epoch 2: the accuracy under PGD fell by half.",),
        "validation_value": 0.5,
        "trainable_parameters": 1000,
        "total_parameters": 1200,
        "seconds": 12.5,
        "images_per_second": 80.0,
        "seed": 0,
        "versions": {"robust_tf": "0.1.0", "keras": "3.15.0"},
    }
    return JobResults(**{**values, **changes})


def write_job(
    workdir: pathlib.Path, *, attacked: bool = True, history: bool = True, examples: bool = True, **changes
) -> JobResults:
    """Writes the files of a finished job without its report. Returns its results."""
    workdir.mkdir(parents=True)
    epsilon = 0.5 if attacked else 0.0
    config = JobConfig.from_flags(
        workdir=str(workdir), dataset="folder:/pictures", norm="l2", epsilon=epsilon, batch_size=32
    )
    (workdir / "flags.cfg").write_text(to_flag_file(config))
    made = outcomes(0, attacked=attacked)
    made.write(workdir)
    if history:
        write_history(workdir, HISTORY)
    if examples:
        rng = np.random.default_rng(0)
        image = rng.random((8, 8, 3)).astype(np.float32)
        image_adv = image + 0.1 * rng.standard_normal((8, 8, 3)).astype(np.float32) if attacked else image
        kinds = (("resists", 1, 1, 1), ("falls", 2, 2, 3), ("wrong", 0, 3, 3)) if attacked else (("wrong", 0, 3, 3),)
        write_examples(workdir, [Example(*kind, image, image_adv) for kind in kinds])
    results = results_of(made, **changes)
    results.write(workdir / "results.json")
    return results
