"""What a finished job leaves in writing: results.json, and the closing table."""

import importlib.metadata
import pathlib
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
from robust_tf.evaluation.outcomes import comparison, from_json, read_outcomes
from robust_tf.flags import to_flag_file
from robust_tf.job.head_fitting import HeadFit
from robust_tf.job.patience import patience_of
from robust_tf.job.testing import Evaluation
from robust_tf.statistics import in_words
from robust_tf.training.checkpoint import TrainingProgress
from robust_tf.transfer.stages import parameter_counts

Results = dict[str, Any]
BASELINE = "baseline"  # the sub-folder of a workdir with the same job from the standard source
_PACKAGES = ("tensorflow", "keras", "tensorflow-datasets", "numpy")


def job_results(
    config: JobConfig,
    task: TaskData,
    classifier: keras.Model,
    evaluation: Evaluation,
    progress: TrainingProgress,
    head_fit: HeadFit | None = None,
) -> dict[str, Any]:
    """Everything that results.json holds; accuracies in [0, 1], intervals at 95 % (Wilson)."""
    trainable, total = parameter_counts(classifier)
    transfer = config.is_transfer
    attack = config.adversarial.evaluation_attack
    return {
        "task": config.task,
        "dataset": config.data.dataset,
        "classes": list(config.data.classes) or None,
        "class_names": list(task.class_names),
        "architecture": classifier.name,
        "image_size": task.image_size,
        "resize_size": task.resize_size,
        "downscale": config.data.downscale,
        "exif": config.data.exif,
        "alpha_background": config.data.alpha_background,
        "split_seed": config.data.split_seed,
        "skip_bad_images": config.data.skip_bad_images,
        "source": config.transfer.source if transfer else None,
        "transfer_mode": config.transfer.transfer_mode if transfer else None,
        "head": config.transfer.head if transfer else None,
        "views": config.transfer.views if head_fit else None,
        "feature_cache": {
            "hits": head_fit.cache_hits,
            "misses": head_fit.cache_misses,
            "seconds": round(head_fit.feature_seconds, 1),
        }
        if head_fit
        else None,
        "head_penalty": head_fit.penalty if head_fit else None,
        "metric": task.metric,
        "clean_accuracy": evaluation.clean_accuracy,
        "clean_accuracy_interval": evaluation.clean_interval,
        "mean_per_class_accuracy": evaluation.mean_per_class_accuracy,
        "robust_accuracy": evaluation.robust_accuracy,
        "robust_accuracy_interval": evaluation.robust_interval,
        "robust_accuracy_attack": {
            "name": attack_name(attack),
            "norm": attack.norm,
            "epsilon": attack.epsilon,
            "step_size": attack.step_size,
            "steps": attack.steps,
        }
        if attack.active
        else None,
        "num_train_images": task.num_train,
        "num_validation_images": task.num_validation,
        "num_test_images": task.num_test,
        "skipped_images": list(task.skipped),
        "objective": config.adversarial.objective,
        "fast": config.adversarial.fast,
        "epochs": config.data_epochs,
        "gradients_per_image": config.gradients_per_image,
        "epochs_done": progress.epochs_done,
        "stopped_early": patience_of(config).is_exhausted(progress),
        "best_epoch": progress.best_epoch + 1,
        "alarms": progress.alarms,
        "validation_value": progress.best_value,
        "trainable_parameters": trainable,
        "total_parameters": total,
        "seconds": round(progress.seconds, 1),
        # Of the training steps alone, at the median speed of the epochs; `seconds` has validation and checkpoints, too.
        "images_per_second": round(statistics.median(progress.rates), 1) if progress.rates else None,
        "seed": config.run.seed,
        "versions": {
            "robust_tf": robust_tf.__version__,
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in _PACKAGES},
        },
        "flags": to_flag_file(config.resolved()).splitlines(),
        "baseline": None,
        "comparison": None,
    }


def attack_name(attack: AttackConfig) -> str:
    """What the attack of the final figures is called.

    `robust_tf.evaluate` counts an image as fallen when any iterate of PGD is misclassified, so its figure can be lower.
    """
    return f"PGD-{attack.steps} ({'highest-loss' if attack.use_best else 'last'} iterate)"


def with_baseline(results: dict[str, Any], baseline: dict[str, Any], workdir: pathlib.Path) -> dict[str, Any]:
    """The results of a job with those of its baseline and the paired differences between the two.

    Args:
        results, baseline: of the two jobs.
        workdir: of the job; the baseline's is the sub-folder baseline/ of it.
    """
    ours, theirs = read_outcomes(workdir), read_outcomes(workdir / BASELINE)
    compared = comparison(ours, theirs, metric=results["metric"])
    return {**results, "baseline": baseline, "comparison": compared}


def closing_table(results: dict[str, Any]) -> Table:
    """The figures on the test part, the baseline beside them when there is one."""
    attack = results["robust_accuracy_attack"]
    table = Table(
        title=f"{results['dataset']}: {results['num_test_images']} test images", title_justify="left", box=box.SIMPLE
    )
    table.add_column("")
    table.add_column("clean accuracy")
    if results["metric"] == "mean_per_class_accuracy":
        table.add_column("mean per class")
    if attack:
        table.add_column(attack_in_words(attack))
    rows = {results["architecture"]: results}
    if results["baseline"]:
        rows = {"from the robust source": results, "from the standard source": results["baseline"]}
    for name, row in rows.items():
        cells = [_share(row["clean_accuracy"], row["clean_accuracy_interval"])]
        if results["metric"] == "mean_per_class_accuracy":
            cells.append(f"{row['mean_per_class_accuracy']:.1%}")
        if attack:
            cells.append(_share(row["robust_accuracy"], row["robust_accuracy_interval"]))
        table.add_row(name, *cells)
    return table


def attack_in_words(attack: dict[str, Any]) -> str:
    """The attack of the final figures, from results.json. Those of older versions do not name it: it was the same."""
    name = attack.get("name", f"PGD-{attack['steps']} (highest-loss iterate)")
    return f"{name}, {attack['norm']} {attack['epsilon']:.4g}"


def comparison_lines(results: dict[str, Any]) -> list[str]:
    """The paired differences between a job and its baseline, a line for each figure; nothing without a baseline."""
    if not results["baseline"]:
        return []
    if not results.get("comparison"):
        return [
            "No paired difference between the two sources: one of the jobs has no predictions.csv (an older version "
            "has run it), or their test images differ."
        ]
    return [
        f"{figure_name(name, results)}, robust minus standard source: {in_words(from_json(compared))}"
        for name, compared in results["comparison"].items()
        if compared
    ]


def figure_name(name: str, results: dict[str, Any]) -> str:
    """A figure of results.json in words."""
    if name == "robust_accuracy":
        return f"accuracy under {attack_in_words(results['robust_accuracy_attack'])}"
    return {"clean_accuracy": "clean accuracy", "mean_per_class_accuracy": "mean-per-class accuracy"}[name]


def _share(value: float, interval: tuple[float, float]) -> str:
    return f"{value:.1%} ({interval[0]:.1%} to {interval[1]:.1%})"
