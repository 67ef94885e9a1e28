"""Facts for both the report and the model card of a job: training, flags, commands and limitations."""

import pathlib
import re
import shlex
from typing import Any

from robust_tf.config.job import JobConfig
from robust_tf.flags import flat_values, to_text
from robust_tf.reporting.job_files import FinishedJob
from robust_tf.results import BASELINE

_PROGRAM = ["python", "-m"]
BASELINE_NOTE = (
    "The two classifiers come from the same job, except that the standard source was trained without an attack."
)


def title_of(job: FinishedJob) -> str:
    """Returns the architecture and the data set in one line."""
    return f"{job.results.architecture} on {job.results.dataset}"


def training_of(job: FinishedJob) -> str:
    """Returns a sentence about how the classifier was trained."""
    config, num_images = job.config, f"{job.results.num_train_images:,}"
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
        return f"Trained from scratch on {num_images} images: {how}."
    return (
        f"Transferred from {config.transfer.source} to {num_images} images "
        f"({config.transfer.transfer_mode.replace('_', ' ')}, head {config.transfer.head}): {how}."
    )


def changed_flags(config: JobConfig) -> list[tuple[str, str, str]]:
    """Returns the name, value and default of every flag that differs from its default."""
    values, defaults = flat_values(config.resolved()), flat_values(JobConfig().resolved())
    return [
        (f"--{name}", _value(value), _value(defaults[name]))
        for name, value in values.items()
        if value != defaults[name]
    ]


def commands(job: FinishedJob, *, workdir: pathlib.Path) -> list[tuple[str, str]]:
    """Returns commands that a reader may want to run next.

    Args:
        job: The finished job.
        workdir: Folder of the job, as the commands name it.

    Returns:
        Pairs of what a command does and the command itself, quoted for a shell.
    """
    classifier = f"--classifier={workdir / 'classifier.keras'}"
    name, exports = _served_name(job), job.config.run.export_dir or "exports"
    found = [
        (
            "Repeat the job in another folder",
            ["robust_tf.train", f"--flagfile={workdir / 'flags.cfg'}", "--workdir=NEW"],
        ),
        ("Measure its robust accuracy with AutoAttack", ["robust_tf.evaluate", classifier, "--attack=autoattack"]),
    ]
    if job.results.baseline:
        other = f"--compare={workdir / BASELINE / 'classifier.keras'}"
        found.append(("Compare both sources with AutoAttack", ["robust_tf.evaluate", classifier, other]))
    found += [
        ("Visualize what it looks at", ["robust_tf.visualize", classifier]),
        ("Export it for serving", ["robust_tf.export", classifier, f"--export_dir={exports}", f"--model_name={name}"]),
        (
            "Serve it over HTTP",
            ["robust_tf.serve", "--rest_api_port=8501", f"--model_name={name}"]
            + [f"--model_base_path={pathlib.Path(exports) / name}"],
        ),
        (
            "Classify images with the server",
            ["robust_tf.predict", "--server=http://localhost:8501", f"--model_name={name}", "IMAGE_OR_FOLDER"],
        ),
    ]
    if not job.config.is_transfer:
        source = f"--source={workdir / 'classifier.keras'}"
        found.append(
            (
                "Transfer it to your own images",
                ["robust_tf.train", "--task=transfer", source, "--dataset=folder:FOLDER"],
            )
        )
    quoted = [(what, shlex.join([*_PROGRAM, *words])) for what, words in found]
    return [("Look at the training curves", shlex.join(["tensorboard", "--logdir", str(workdir)])), *quoted]


def _served_name(job: FinishedJob) -> str:
    """Returns the name under which the job exported its classifier, or else one that is easy to type."""
    name = job.config.run.model_name or job.workdir.absolute().name
    return name if job.config.run.export_dir else re.sub(r"[^\w-]+", "_", name).strip("_") or "classifier"


def _value(value: Any) -> str:
    return "none" if value in (None, "", ()) else to_text(value)


def limitations_of(job: FinishedJob) -> list[str]:
    """Returns sentences about what the reported accuracies do not show."""
    results = job.results
    limitations = [
        f"These figures come from {results.num_test_images:,} test images of {results.dataset} and from one run (seed "
        f"{results.seed}). Expect different figures for other images, cameras and seeds."
    ]
    if attack := results.robust_accuracy_attack:
        limitations.append(
            "PGD is only one attack, and a stronger one may fool the classifier more often: measure the accuracy with "
            "AutoAttack before you rely on it. It covers perturbations up to "
            f"{attack.epsilon:.4g} in the {attack.norm} norm, but neither larger ones nor other changes of an image."
        )
    else:
        limitations.append("No attack was run: small, deliberate changes of an image may change any prediction.")
    limitations.append("The classifier always names one of its classes, even if an image shows none of them.")
    if results.skipped_images:
        limitations.append(f"Images that were left out because they cannot be decoded: {len(results.skipped_images)}.")
    return limitations
