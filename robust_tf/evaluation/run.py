"""Runs an evaluation, from its flags to evaluation.json, its pictures and its table."""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import tensorflow as tf

from robust_tf.attacks.autoattack import VERSIONS
from robust_tf.attacks.compiled import CompiledAttacks
from robust_tf.attacks.outputs import looks_like_probabilities
from robust_tf.attacks.table import check_attacks
from robust_tf.config.checks import check_default
from robust_tf.config.evaluation import (
    DEFAULT_ATTACK,
    DEFAULT_BATCH_SIZE,
    DEFAULT_NUM_IMAGES,
    GPU_BATCH_SIZE,
    NO_ATTACK,
    SMALL_IMAGE,
    EvaluateConfig,
)
from robust_tf.config.names import AUTOATTACK_VERSIONS
from robust_tf.console import console, meter
from robust_tf.environment import seal_xla_cache
from robust_tf.errors import UserError
from robust_tf.evaluation import report
from robust_tf.evaluation.artifact_report import artifact_entries, artifact_lines, artifact_table
from robust_tf.evaluation.artifacts import AttackPlan, Target, attacks_to_transfer, measure_targets, opened_artifacts
from robust_tf.evaluation.calibration import calibration
from robust_tf.evaluation.comparison import compare_classifiers, comparison_lines
from robust_tf.evaluation.corruption_error import (
    corrupted_images,
    error_of,
    mean_corruption_error,
    relative_corruption_error,
)
from robust_tf.evaluation.corruptions import CORRUPTIONS, SEVERITIES
from robust_tf.evaluation.dense import is_dense, run_dense_evaluation
from robust_tf.evaluation.pictures import Measured, draw_figures, kept_examples
from robust_tf.evaluation.prediction import Predict, batched_logits
from robust_tf.evaluation.robustness import Robustness, attack_epsilons, unattacked
from robust_tf.evaluation.state_file import StateFile, stored_identity
from robust_tf.evaluation.subject import Images, Subject, draw_images, load_subject, short_names
from robust_tf.files import check_output_folder, write_json
from robust_tf.flags import to_flag_file
from robust_tf.models import pixel_warning

STATE_NAME = "state.json"  # in the output folder


def run_evaluation(config: EvaluateConfig) -> None:
    """Measures one or two classifiers and writes the results to the output folder.

    An evaluation that was stopped continues from the state file in that folder.

    Raises:
        UserError: The folder cannot be written, a classifier or its data cannot be loaded, or the folder holds the
            state of another evaluation.
    """
    check_output_folder(config.folder, "--output")
    if is_dense(config.classifier):
        run_dense_evaluation(config)
        return
    check_default(config, ("attack_steps",), "a network for detection or segmentation")
    config = dataclasses.replace(config, attack=config.attack or (DEFAULT_ATTACK,))
    tf.config.experimental.enable_tensor_float_32_execution(config.tf32)
    if config.norm:
        for name in config.attack:
            check_attacks(attacks_in(name), config.norm)
    subjects = [load(config, name) for name in (config.classifier, config.compare) if name]
    for subject in subjects:
        if warning := pixel_warning(subject.classifier):
            console.print(f"WARNING for {subject.name}: {warning}")
    config = with_threat_model(config, subjects)
    config = with_batch_size(config, subjects)
    images = [draw_images(subject.task, count=count_of(config, subject), seed=config.seed) for subject in subjects]
    state_file = StateFile(config.folder / STATE_NAME, identity(config, subjects, images))
    try:
        measured = [
            measure(config, subject, drawn, state_file) for subject, drawn in zip(subjects, images, strict=True)
        ]
        artifacts = measure_artifacts(config, measured[0], state_file)
    except KeyboardInterrupt:
        console.print(f"Interrupted. The state is saved in {config.folder}; the same command continues from there.")
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
            "artifacts": artifacts,
            "flags": flags_of(config),
            "versions": report.versions(),
        },
    )
    console.print(report.closing_table(entries))
    for line in comparison_lines(comparison, short_names([each.subject.name for each in measured])):
        console.print(line, soft_wrap=True)
    if artifacts:
        console.print(artifact_table(artifacts))
        for line in artifact_lines(artifacts):
            console.print(line, soft_wrap=True)
    console.print(f"Wrote {config.folder}.")


def flags_of(config: EvaluateConfig) -> list[str]:
    """Returns the flags that the results depend on, which are all flags except the folders."""
    return to_flag_file(dataclasses.replace(config, output="", data_dir="")).splitlines()


def load(config: EvaluateConfig, name: str) -> Subject:
    """Loads a classifier together with its data."""
    return load_subject(name, dataset=config.dataset, classes=config.classes, data_dir=config.data_dir)


def count_of(config: EvaluateConfig, subject: Subject) -> int | None:
    """Returns the number of test images to draw, or None for all of them."""
    if config.num_images is None:
        return min(DEFAULT_NUM_IMAGES, subject.task.num_test)
    return config.num_images or None


def identity(config: EvaluateConfig, subjects: Sequence[Subject], images: Sequence[Images]) -> dict[str, Any]:
    """Returns the values that must be equal in two runs if the second is to continue from the state of the first."""
    parts: dict[str, Any] = {
        "--seed": config.seed,
        "--batch_size": config.batch_size,
        "--num_images": [len(drawn.ids) for drawn in images],
        "--corruption_source": config.corruption_source,
        "versions": report.versions(),
    }
    for flag_name, subject, drawn in zip(("--classifier", "--compare"), subjects, images, strict=False):
        parts[f"weights of {flag_name}"] = subject.weights_sha256
        parts[f"images of {flag_name}"] = drawn.sha256  # the files in a folder may have changed
        parts[f"data of {flag_name}"] = [subject.dataset, list(subject.classes), subject.task.image_size]
    return parts


def with_threat_model(config: EvaluateConfig, subjects: Sequence[Subject]) -> EvaluateConfig:
    """Returns the config with a norm and epsilons. If the flags leave them out, they come from a classifier.

    Args:
        config: Flags of the evaluation.
        subjects: Classifiers. The first one whose training is known supplies what is missing.

    Raises:
        UserError: A flag is missing and no classifier can supply its value.
    """
    if config.attack == (NO_ATTACK,):
        return dataclasses.replace(config, norm="", epsilon=())
    known = next((subject for subject in subjects if subject.epsilon), None)
    if known is None and not (config.norm and config.epsilon):
        raise UserError(
            "--norm and --epsilon are needed, because the norm and epsilon of the training are not known. "
            f"Received: --norm={config.norm!r}, --epsilon={','.join(map(str, config.epsilon))}. Name both."
        )
    norm = config.norm or str(known.norm if known else "")
    # The epsilon used in training is meaningless for another norm.
    if not config.epsilon and (known is None or known.norm != norm):
        raise UserError(
            f"--epsilon is needed, because the classifier was trained for another norm. Received: --norm={norm}. Add "
            "--epsilon."
        )
    epsilon = config.epsilon or (0.0, float(known.epsilon if known and known.epsilon else 0.0))
    return dataclasses.replace(config, norm=norm, epsilon=tuple(sorted(epsilon)))


def batch_size_of(config: EvaluateConfig) -> int:
    """Returns the largest number of images in a batch."""
    return config.batch_size or DEFAULT_BATCH_SIZE


def with_batch_size(config: EvaluateConfig, subjects: Sequence[Subject]) -> EvaluateConfig:
    """Returns the config with a batch size.

    If the flag leaves it out, it is the one of the evaluation that is to be continued, because that may have begun on
    another device. Otherwise a GPU gets larger batches of small images, which would not keep it busy.

    Args:
        config: Flags of the evaluation.
        subjects: Classifiers. The size of their images counts.
    """
    if config.batch_size is not None:
        return config
    size = stored_identity(config.folder / STATE_NAME).get("--batch_size")
    if not isinstance(size, int) or size < 1:
        small = all(subject.task.image_size <= SMALL_IMAGE for subject in subjects)
        size = GPU_BATCH_SIZE if small and tf.config.list_logical_devices("GPU") else DEFAULT_BATCH_SIZE
    return dataclasses.replace(config, batch_size=size)


def jit_compile_of(config: EvaluateConfig) -> bool | Literal["auto"]:
    """Returns whether XLA compiles the attacks, as `CompiledAttacks` takes it."""
    return "auto" if config.jit_compile == "auto" else config.jit_compile == "true"


def attacks_in(name: str) -> tuple[str, ...]:
    """Returns the attacks that a value of `--attack` stands for, in the order in which they run."""
    if name == NO_ATTACK:
        return ()
    return VERSIONS[AUTOATTACK_VERSIONS[name]] if name in AUTOATTACK_VERSIONS else tuple(name.split("+"))


def measure(config: EvaluateConfig, subject: Subject, images: Images, state_file: StateFile) -> Measured:
    """Measures one classifier: calibration, robust accuracy and, if asked for, the error under corruptions."""
    predict = batched_logits(subject.classifier, batch_size=batch_size_of(config))
    logits = predict(images.pixels)
    if looks_like_probabilities(logits):
        console.print(
            f"WARNING for {subject.name}: its outputs look like probabilities but are treated as logits. Every figure "
            "except the clean accuracy is wrong. Save the model with its logits as output."
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


def measure_artifacts(config: EvaluateConfig, measured: Measured, state_file: StateFile) -> list[dict[str, Any]]:
    """Measures the exports that --artifact names beside their classifier, and returns their entries."""
    if not config.artifact:
        return []
    subject, images = measured.subject, measured.images
    predict = batched_logits(subject.classifier, batch_size=batch_size_of(config))
    plan = AttackPlan(
        transferred=attacks_to_transfer([part for name in config.attack for part in attacks_in(name)]),
        norm=config.norm,
        epsilons=[value for value in config.epsilon if value > 0],
        queries=config.queries,
        batch_size=batch_size_of(config),
        seed=config.seed,
        jit_compile=jit_compile_of(config),
    )
    with (
        opened_artifacts(config.artifact, subject, images) as artifacts,
        meter("exports", total=100, unit="%") as bar,
    ):
        results = measure_targets(
            [Target.of_classifier(subject, predict), *artifacts],
            subject,
            images,
            plan,
            state_file=state_file,
            on_progress=lambda share, running: bar.update(100 * share, running),
        )
    names = subject.task.class_names
    return artifact_entries(results, images, names, norm=config.norm, queries=config.queries)


def with_probabilities_as_logits(logits: np.ndarray) -> np.ndarray:
    """Returns the logits, or the logarithms of outputs that are probabilities."""
    if not looks_like_probabilities(logits):
        return logits
    log_probabilities: np.ndarray = np.log(np.maximum(logits, np.finfo(np.float32).tiny))
    return log_probabilities


def attacked(
    config: EvaluateConfig, subject: Subject, images: Images, logits: np.ndarray, state_file: StateFile
) -> list[Robustness]:
    """Runs every attack at every epsilon."""
    if config.attack == (NO_ATTACK,):
        return []
    compiled = CompiledAttacks(
        subject.classifier,
        config.norm,
        jit_compile=jit_compile_of(config),
        tell=tell,
    )
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
                attacks=attacks_in(name),
                epsilons=epsilons,
                batch_size=batch_size_of(config),
                seed=config.seed,
                randomized=name == "autoattack-rand",
                keep=images.ids[examples].tolist(),
                state_file=state_file,
                key=subject.weights_sha256[:16],
                on_batch=lambda done, total, robust, running: bar.update(
                    done, f"robust so far {robust:.1%}, now {running}", total=total
                ),
            )
    return results


def tell(sentence: str) -> None:
    """Prints what XLA is about to compile or has compiled, and keeps the programs that it has compiled."""
    console.print(sentence, soft_wrap=True)
    seal_xla_cache()


def corruption_errors(
    config: EvaluateConfig, subject: Subject, images: Images, predict: Predict, state_file: StateFile
) -> tuple[str, dict[str, list[float]]]:
    """Returns the source of the corrupted images, and the error for each corruption and severity."""
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
    """Returns the entry of one classifier in evaluation.json.

    Args:
        config: Flags of the evaluation.
        measured: Results of the classifier.
        baseline: Results of the classifier that the corruption error is relative to, with --compare.
    """
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
    """Prints every warning of the attacks once."""
    for text in sorted({text for result in measured.robustness for text in result.warnings.values()}):
        console.print(f"WARNING for {measured.subject.name}: {text}")
