"""What the report and the model card of a job say in common: its commands, its flags, its data, its warnings."""

import pathlib
import re
import shlex
from typing import Any

from robust_tf.config.job import JobConfig
from robust_tf.flags import flat_values, to_text
from robust_tf.job.results import BASELINE
from robust_tf.reporting.job_files import FinishedJob

_PROGRAM = ["python", "-m"]


def title_of(job: FinishedJob) -> str:
    """The classifier and its data in one line."""
    return f"{job.results['architecture']} on {job.results['dataset']}"


def training_of(job: FinishedJob) -> str:
    """How the classifier was trained, in one sentence."""
    config, results = job.config, job.results
    attack = config.adversarial.training_attack
    if attack.active:
        recipe = {"fgsm": "single-step FGSM", "free": "free adversarial training"}.get(
            config.adversarial.fast, f"PGD-{attack.steps} adversarial training"
        )
        objective = (
            "" if config.adversarial.objective == "adversarial" else f", objective {config.adversarial.objective}"
        )
        how = f"{recipe} ({attack.norm}, epsilon {attack.epsilon:.4g}{objective})"
    else:
        how = "standard training, without an attack"
    if not config.is_transfer:
        return f"Trained from scratch on {results['num_train_images']:,} images: {how}."
    return (
        f"Transferred from {config.transfer.source} to {results['num_train_images']:,} images "
        f"({config.transfer.transfer_mode.replace('_', ' ')}, head {config.transfer.head}): {how}."
    )


def changed_flags(config: JobConfig) -> list[tuple[str, str, str]]:
    """Name, value and default of every flag that differs from its default."""
    values, defaults = flat_values(config.resolved()), flat_values(JobConfig().resolved())
    return [
        (f"--{name}", _value(value), _value(defaults[name]))
        for name, value in values.items()
        if value != defaults[name]
    ]


def commands(job: FinishedJob, *, workdir: pathlib.Path) -> list[tuple[str, str]]:
    """What a command does, and the command, quoted for a shell.

    Args:
        job: to go on from.
        workdir: its folder as the commands name it.
    """
    classifier = f"--classifier={workdir / 'classifier.keras'}"
    name, exports = _served_name(job), job.config.run.export_dir or "exports"
    found = [
        (
            "Repeat the job in another folder",
            ["robust_tf.train", f"--flagfile={workdir / 'flags.cfg'}", "--workdir=NEW"],
        ),
        ("Measure it with AutoAttack", ["robust_tf.evaluate", classifier, "--attack=autoattack"]),
    ]
    if job.results["baseline"]:
        other = f"--compare={workdir / BASELINE / 'classifier.keras'}"
        found.append(("Compare both sources with AutoAttack", ["robust_tf.evaluate", classifier, other]))
    found += [
        ("See what it looks at", ["robust_tf.visualize", classifier]),
        ("Publish it", ["robust_tf.export", classifier, f"--export_dir={exports}", f"--model_name={name}"]),
        (
            "Serve it",
            ["robust_tf.serve", "--rest_api_port=8501", f"--model_name={name}"]
            + [f"--model_base_path={pathlib.Path(exports) / name}"],
        ),
        (
            "Ask the server about images",
            ["robust_tf.predict", "--server=http://localhost:8501", f"--model_name={name}", "IMAGE_OR_FOLDER"],
        ),
    ]
    if not job.config.is_transfer:
        source = f"--source={workdir / 'classifier.keras'}"
        found.append(
            ("Transfer it to other data", ["robust_tf.train", "--task=transfer", source, "--dataset=folder:FOLDER"])
        )
    quoted = [(what, shlex.join([*_PROGRAM, *words])) for what, words in found]
    return [("Look at the training", shlex.join(["tensorboard", "--logdir", str(workdir)])), *quoted]


def _served_name(job: FinishedJob) -> str:
    """The name that the job has published its classifier under, or one that is easy to type."""
    name = job.config.run.model_name or job.workdir.absolute().name
    return name if job.config.run.export_dir else re.sub(r"[^\w-]+", "_", name).strip("_") or "classifier"


def _value(value: Any) -> str:
    return "none" if value in (None, "", ()) else to_text(value)


def limits_of(job: FinishedJob) -> list[str]:
    """What the figures do not say."""
    results = job.results
    limits = [
        f"The figures are those of {results['num_test_images']:,} test images of {results['dataset']} and of one run "
        f"(seed {results['seed']}); other images, cameras and seeds give others."
    ]
    if attack := results["robust_accuracy_attack"]:
        limits.append(
            f"PGD is one attack: a stronger one leaves less. The accuracy under attack says nothing about "
            f"perturbations beyond {attack['norm']} {attack['epsilon']:.4g}, nor about other changes of an image; "
            "measure it with AutoAttack before relying on it."
        )
    else:
        limits.append("No attack was run: small, deliberate changes of an image may turn any prediction.")
    limits.append("It always names one of its classes, also for an image that shows none of them.")
    if results["skipped_images"]:
        limits.append(f"Images left out of the data, since they cannot be decoded: {len(results['skipped_images'])}.")
    return limits
