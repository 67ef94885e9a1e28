"""The results of a finished job: the record for results.json, and the table that the program prints last."""

import importlib.metadata
import platform
import statistics
from typing import Any

import keras
from rich import box
from rich.table import Table

import robust_tf
from robust_tf.config.attack import AttackConfig
from robust_tf.config.job import JobConfig
from robust_tf.data import TaskData
from robust_tf.flags import to_flag_file
from robust_tf.job.head_fitting import HeadFit
from robust_tf.job.patience import patience_of
from robust_tf.job.testing import Evaluation
from robust_tf.models import weights_sha256
from robust_tf.results import FeatureCache, JobResults, MeasuredAttack
from robust_tf.tasks.measuring import Measurement
from robust_tf.training.checkpoint import TrainingProgress
from robust_tf.transfer.stages import parameter_counts

_PACKAGES = ("tensorflow", "keras", "tensorflow-datasets", "numpy")


def job_results(
    config: JobConfig,
    task: TaskData,
    classifier: keras.Model,
    evaluation: Evaluation | Measurement,
    progress: TrainingProgress,
    head_fit: HeadFit | None = None,
) -> JobResults:
    """Returns the results of a finished job, without a baseline.

    Args:
        config: Configuration of the job.
        task: Data of the job.
        classifier: The trained classifier.
        evaluation: Evaluation of the classifier, or measurement of the network, on the test images.
        progress: Progress of the training at its end.
        head_fit: Result of fitting the head, for a job with `--features=cached`.
    """
    trainable, total = parameter_counts(classifier)
    data, transfer, adversarial = config.data, config.transfer, config.adversarial
    return JobResults(
        task=config.task,
        task_type=data.task_type,
        dataset=data.dataset,
        classes=data.classes,
        class_names=tuple(task.class_names),
        architecture=classifier.name,
        image_size=task.image_size,
        resize_size=task.resize_size,
        downscale=data.downscale,
        exif=data.exif,
        alpha_background=data.alpha_background,
        split_seed=data.split_seed,
        skip_bad_images=data.skip_bad_images,
        source=transfer.source if config.is_transfer else None,
        transfer_mode=transfer.transfer_mode if config.is_transfer else None,
        head=transfer.head if config.is_transfer else None,
        views=transfer.views if head_fit else None,
        feature_cache=_feature_cache(head_fit) if head_fit else None,
        head_penalty=head_fit.penalty if head_fit else None,
        metric=task.metric,
        **_figures(evaluation),
        robust_accuracy_attack=measured_attack(adversarial.evaluation_attack),
        num_train_images=task.num_train,
        num_validation_images=task.num_validation,
        num_test_images=task.num_test,
        skipped_images=tuple(task.skipped),
        objective=adversarial.objective,
        fast=adversarial.fast,
        epochs=config.data_epochs,
        gradients_per_image=config.gradients_per_image,
        epochs_done=progress.epochs_done,
        stopped_early=patience_of(config).is_exhausted(progress),
        best_epoch=progress.best_epoch + 1,
        alarms=tuple(progress.alarms),
        validation_value=progress.best_value,
        trainable_parameters=trainable,
        total_parameters=total,
        weights_sha256=weights_sha256(classifier),
        seconds=round(progress.seconds, 1),
        # Training steps only, at the median speed of the epochs; `seconds` includes validation and checkpoints.
        images_per_second=round(statistics.median(progress.rates), 1) if progress.rates else None,
        seed=config.run.seed,
        versions=_versions(),
        flags=tuple(to_flag_file(config.resolved()).splitlines()),
    )


def _figures(evaluation: Evaluation | Measurement) -> dict[str, Any]:
    """Returns the figures of the test by their names in `JobResults`."""
    if isinstance(evaluation, Measurement):
        return {"clean": evaluation.clean_measures, "robust": evaluation.robust_measures}
    return {
        "clean_accuracy": evaluation.clean_accuracy,
        "clean_accuracy_interval": evaluation.clean_interval,
        "mean_per_class_accuracy": evaluation.mean_per_class_accuracy,
        "robust_accuracy": evaluation.robust_accuracy,
        "robust_accuracy_interval": evaluation.robust_interval,
    }


def measured_attack(attack: AttackConfig) -> MeasuredAttack | None:
    """Returns the attack of the final evaluation as results.json describes it, or None without an attack.

    The name says which iterate of PGD counts. `robust_tf.evaluate` counts an image as misclassified if any iterate is,
    so its accuracy can be lower.
    """
    if not attack.active:
        return None
    return MeasuredAttack(
        name=f"PGD-{attack.steps} ({'highest-loss' if attack.use_best else 'last'} iterate)",
        norm=attack.norm,
        epsilon=attack.epsilon,
        step_size=attack.step_size,
        steps=attack.steps,
    )


def closing_table(results: JobResults) -> Table:
    """Returns the table of the accuracies on the test images, see `JobResults.rows`."""
    table = Table(
        title=f"{results.dataset}: {results.num_test_images} test images", title_justify="left", box=box.SIMPLE
    )
    table.add_column("")
    figures = results.figures()
    for figure in figures:
        table.add_column(figure.short_title)
    for name, cells in results.rows(alone=results.architecture or ""):
        table.add_row(name, *cells)
    return table


def _feature_cache(head_fit: HeadFit) -> FeatureCache:
    return FeatureCache(
        hits=head_fit.cache_hits, misses=head_fit.cache_misses, seconds=round(head_fit.feature_seconds, 1)
    )


def _versions() -> dict[str, str]:
    return {
        "robust_tf": robust_tf.__version__,
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in _PACKAGES},
    }
