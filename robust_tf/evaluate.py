"""Measures a classifier: clean and robust accuracy, calibration, common corruptions; writes numbers and pictures.

    python -m robust_tf.evaluate --classifier=runs/robust/classifier.keras --attack=autoattack --epsilon=0,0.25,0.5,1

Several epsilons give a robustness curve. Stopped or killed, the same command goes on where it was and ends with the
same evaluation.json; further attacks, epsilons and corruptions can be added to a finished evaluation.
"""

import dataclasses
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from absl import logging

from robust_tf.environment import set_tensorflow_defaults
from robust_tf.errors import UserError, exit_on_user_error
from robust_tf.flags import parse_flags, to_flag_file

set_tensorflow_defaults()

import numpy as np  # noqa: E402
import tensorflow as tf  # noqa: E402

from robust_tf.attacks.cascade import CompiledAttacks  # noqa: E402
from robust_tf.attacks.outputs import looks_like_probabilities  # noqa: E402
from robust_tf.console import console, meter  # noqa: E402
from robust_tf.evaluation import report  # noqa: E402
from robust_tf.evaluation.attacking import Robustness, attack_epsilons, unattacked  # noqa: E402
from robust_tf.evaluation.calibration import calibration  # noqa: E402
from robust_tf.evaluation.comparison import compare_classifiers, comparison_lines  # noqa: E402
from robust_tf.evaluation.corruption_error import (  # noqa: E402
    corrupted_images,
    error_of,
    mean_corruption_error,
    relative_corruption_error,
)
from robust_tf.evaluation.corruptions import CORRUPTIONS, SEVERITIES  # noqa: E402
from robust_tf.evaluation.pictures import Measured, draw_figures, kept_examples  # noqa: E402
from robust_tf.evaluation.predicting import Predict, batched_logits  # noqa: E402
from robust_tf.evaluation.settings import (  # noqa: E402
    DEFAULT_NUM_IMAGES,
    NONE,
    EvaluateConfig,
    attacks_of,
    is_randomised,
    with_threat_model,
)
from robust_tf.evaluation.state import StateFile  # noqa: E402
from robust_tf.evaluation.subject import Images, Subject, draw_images, load_subject, short_names  # noqa: E402
from robust_tf.files import check_output_folder, write_json  # noqa: E402
from robust_tf.models import pixel_warning  # noqa: E402


def main(argv: Sequence[str]) -> None:
    """The program: flags in, evaluation.json, pictures and a table out."""
    logging.set_verbosity(logging.ERROR)
    tf.get_logger().setLevel("ERROR")  # each classifier and attack has a graph of its own: tracing them is no mistake
    config, rest = parse_flags(EvaluateConfig, argv, __doc__ or "")
    if rest:
        raise UserError(f"Everything is a flag, --name=value. Received: {rest[0]!r}.")
    run(config)


def run(config: EvaluateConfig) -> None:
    """Measures one or two classifiers, from where the folder's state file has it, and writes everything."""
    check_output_folder(config.folder, "--output")
    subjects = [load(config, name) for name in (config.classifier, config.compare) if name]
    for subject in subjects:
        if warning := pixel_warning(subject.classifier):
            console.print(f"WARNING for {subject.name}: {warning}")
    config = with_threat_model(config, subjects)
    images = [draw_images(subject.task, count=count_of(config, subject), seed=config.seed) for subject in subjects]
    state_file = StateFile(config.folder / "state.json", identity(config, subjects, images))
    try:
        measured = [
            measure(config, subject, drawn, state_file) for subject, drawn in zip(subjects, images, strict=True)
        ]
    except KeyboardInterrupt:
        console.print(f"Interrupted. What was done is saved in {config.folder}; the same command goes on there.")
        raise SystemExit(130) from None
    comparison = compare_classifiers(measured)
    entries = [entry_of(config, each, measured[-1]) for each in measured]
    for each in measured:
        print_warnings(each)
    draw_figures(config.folder, measured, num_examples=config.num_examples)
    write_json(
        config.folder / "evaluation.json",
        {
            "classifiers": entries,
            "comparison": comparison,
            "flags": flags_of(config),
            "versions": report.versions(),
        },
    )
    console.print(report.closing_table(entries))
    for line in comparison_lines(comparison, short_names([each.subject.name for each in measured])):
        console.print(line, soft_wrap=True)
    console.print(f"Wrote {config.folder}.")


def flags_of(config: EvaluateConfig) -> list[str]:
    """The flags that the figures depend on: not the folders."""
    return to_flag_file(dataclasses.replace(config, output="", data_dir="")).splitlines()


def load(config: EvaluateConfig, name: str) -> Subject:
    """A classifier with its task."""
    return load_subject(
        name, dataset=config.dataset, classes=config.classes, data_dir=config.data_dir, batch_size=config.batch_size
    )


def count_of(config: EvaluateConfig, subject: Subject) -> int | None:
    """How many test images to draw; None for all."""
    if config.num_images is None:
        return min(DEFAULT_NUM_IMAGES, subject.task.num_test)
    return config.num_images or None


def identity(config: EvaluateConfig, subjects: Sequence[Subject], images: Sequence[Images]) -> dict[str, Any]:
    """What a run must have in common with the one whose state it goes on from."""
    parts: dict[str, Any] = {
        "--seed": config.seed,
        "--batch_size": config.batch_size,
        "--num_images": [len(drawn.ids) for drawn in images],
        "--corruption_source": config.corruption_source,
        "versions": report.versions(),
    }
    for flag_name, subject, drawn in zip(("--classifier", "--compare"), subjects, images, strict=False):
        parts[f"weights of {flag_name}"] = subject.weights_sha256
        parts[f"images of {flag_name}"] = drawn.sha256  # a folder's may have changed in the meantime
        parts[f"data of {flag_name}"] = [subject.dataset, list(subject.classes), subject.task.image_size]
    return parts


def measure(config: EvaluateConfig, subject: Subject, images: Images, state_file: StateFile) -> Measured:
    """Everything about one classifier."""
    predict = batched_logits(subject.classifier, batch_size=config.batch_size)
    logits = predict(images.pixels)
    if looks_like_probabilities(logits):
        console.print(
            f"WARNING for {subject.name}: its outputs look like probabilities, and are taken for logits: every figure "
            "but the clean accuracy is wrong. Save the model with its logits as output."
        )
    robustness = attacked(config, subject, images, logits, state_file)
    source, errors = corruption_errors(config, subject, images, predict, state_file) if config.corruptions else ("", {})
    return Measured(
        subject=subject,
        images=images,
        logits=logits,
        calibration=calibration(with_probabilities_as_logits(logits), images.labels),
        robustness=robustness,
        corruption_source=source,
        corruption_errors=errors,
    )


def with_probabilities_as_logits(logits: np.ndarray) -> np.ndarray:
    """The logits; of a classifier that gives probabilities, which the attacks flag, their logarithms."""
    if not looks_like_probabilities(logits):
        return logits
    return np.log(np.maximum(logits, np.finfo(np.float32).tiny))


def attacked(
    config: EvaluateConfig, subject: Subject, images: Images, logits: np.ndarray, state_file: StateFile
) -> list[Robustness]:
    """Every attack at every epsilon."""
    if config.attack == (NONE,):
        return []
    compiled = CompiledAttacks(subject.classifier, config.norm)
    examples = kept_examples(images.labels, logits.argmax(axis=1) == images.labels, count=config.num_examples)
    epsilons = [value for value in config.epsilon if value > 0]
    results = []
    for name in config.attack:
        if 0.0 in config.epsilon:
            results.append(unattacked(images, logits, name=name, norm=config.norm))
        if not epsilons:
            continue
        with meter(f"{name} on {pathlib.Path(subject.name).name}", total=1, unit="passes") as bar:
            results += attack_epsilons(
                compiled,
                images,
                name=name,
                attacks=attacks_of(name),
                epsilons=epsilons,
                batch_size=config.batch_size,
                seed=config.seed,
                randomised=is_randomised(name),
                keep=images.ids[examples].tolist(),
                state_file=state_file,
                key=subject.weights_sha256[:16],
                on_batch=lambda done, total, robust, running: bar.update(
                    done, f"robust so far {robust:.1%}, now {running}", total=total
                ),
            )
    return results


def corruption_errors(
    config: EvaluateConfig, subject: Subject, images: Images, predict: Predict, state_file: StateFile
) -> tuple[str, dict[str, list[float]]]:
    """Where the corrupted images come from, and the error for each corruption and severity."""
    source, corrupted = corrupted_images(
        subject, images, source=config.corruption_source, data_dir=config.data_dir, seed=config.seed
    )
    errors: dict[str, list[float]] = {name: [] for name in CORRUPTIONS}
    cases = [(name, severity) for name in CORRUPTIONS for severity in SEVERITIES]
    with meter(f"corruptions on {pathlib.Path(subject.name).name}", total=len(cases), unit="sets") as bar:
        for done, (name, severity) in enumerate(cases):
            bar.update(done, name)
            key = f"{subject.weights_sha256[:16]}/{source}/{name}/{severity}"
            error = state_file.finished(key)
            if error is None:
                error = error_of(predict, corrupted(name, severity))
                state_file.finish(key, error)
            errors[name].append(error)
    return source, errors


def entry_of(config: EvaluateConfig, measured: Measured, baseline: Measured) -> dict[str, Any]:
    """One classifier's part of evaluation.json. `baseline` is what its corruption error is relative to, or itself."""
    entry = report.subject_entry(
        measured.subject, measured.images, measured.logits, measured.calibration, measured.robustness
    )
    if config.corruptions:
        errors = measured.corruption_errors
        entry["corruptions"] = {
            "source": measured.corruption_source,
            "errors": errors,
            "mean_corruption_error": mean_corruption_error(errors),
            "baseline": config.compare or None,
            "relative_mean_corruption_error": relative_corruption_error(errors, baseline.corruption_errors)
            if config.compare
            else None,
        }
    return entry


def print_warnings(measured: Measured) -> None:
    """The warning flags of the attacks, each once."""
    for text in sorted({text for result in measured.robustness for text in result.warnings.values()}):
        console.print(f"WARNING for {measured.subject.name}: {text}")


if __name__ == "__main__":
    with exit_on_user_error():
        main(sys.argv)
