"""The model card of a job's workdir: README.md with the YAML front matter that the Hugging Face Hub reads."""

import json
import pathlib
from html import escape
from typing import Any

from robust_tf.data import dataset_info
from robust_tf.job.results import attack_in_words, comparison_lines, figure_name
from robust_tf.reporting.facts import commands, limits_of, title_of, training_of
from robust_tf.reporting.job_files import FinishedJob
from robust_tf.serving.publish.model_card import card_from_results

_FIGURES = {"clean_accuracy": "accuracy", "mean_per_class_accuracy": "balanced_accuracy", "robust_accuracy": "accuracy"}


def readme(job: FinishedJob) -> str:
    """The whole file."""
    results = job.results
    parts = [
        _front_matter(job),
        f"# {title_of(job)}",
        f"An image classifier of {len(results['class_names'])} classes. {training_of(job)} "
        "[report.html](report.html) has figures, pictures and every flag.",
        "## Figures",
        "\n".join(_figures_table(job)),
        *(["\n".join(f"* {line}" for line in comparison_lines(results))] if results["baseline"] else []),
        *(["## Warnings", "\n".join(f"* {text}" for text in results["alarms"])] if results["alarms"] else []),
        "## Data",
        _data(job),
        "## Intended use",
        f"Classifying images of the kind that it was trained on into {_names(results['class_names'])}; studying robust "
        "features and their transfer. It was not made for decisions about people.",
        "## Limits",
        "\n".join(f"* {text}" for text in limits_of(job)),
        "## How to use it",
        _usage(job),
        "## Made with",
        ", ".join(f"{name} {version}" for name, version in results["versions"].items()) + ".",
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(job: FinishedJob) -> str:
    """The front matter; every value is JSON, which is YAML as well."""
    results = job.results
    card = card_from_results(results)
    measured = [
        {"type": kind, "name": figure_name(name, results), "value": card[name]}
        for name, kind in _FIGURES.items()
        if card.get(name) is not None
    ]
    data = {"type": results["dataset"], "name": results["dataset"], "split": "test"}
    entry = {
        "name": job.workdir.absolute().name,
        "results": [{"task": {"type": "image-classification"}, "dataset": data, "metrics": measured}],
    }
    fields: dict[str, Any] = {
        "library_name": "keras",
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", "adversarial-robustness", results["architecture"]],
        "metrics": ["accuracy"],
        "model-index": [entry],
    }
    lines = [f"{name}: {json.dumps(value, ensure_ascii=False)}" for name, value in fields.items()]
    return "\n".join(["---", *lines, "---"])


def _figures_table(job: FinishedJob) -> list[str]:
    results = job.results
    rows = {"this classifier": results}
    if results["baseline"]:
        rows = {"from the robust source": results, "from the standard source": results["baseline"]}
    names = [name for name in _FIGURES if results.get(name) is not None]
    if results["metric"] != "mean_per_class_accuracy":
        names.remove("mean_per_class_accuracy")
    titles = [figure_name(name, results) for name in names]
    head = f"| {results['num_test_images']:,} test images | {' | '.join(titles)} |"
    table = [head, "|---" * (len(names) + 1) + "|"]
    for title, row in rows.items():
        table.append(f"| {title} | {' | '.join(_share(row, name) for name in names)} |")
    return [*table, "", "In brackets: 95 % Wilson intervals."]


def _share(results: dict[str, Any], name: str) -> str:
    interval = results.get(f"{name}_interval")
    within = f" ({interval[0]:.1%} to {interval[1]:.1%})" if interval else ""
    return f"{results[name]:.1%}{within}" if results[name] is not None else "not measured"


def _data(job: FinishedJob) -> str:
    results = job.results
    info = dataset_info(results["dataset"])
    about = f" {info.homepage}" if info.homepage else ""
    licence = info.license or "not stated"
    return (
        f"{results['dataset']}: {results['num_train_images']:,} training, {results['num_validation_images']:,} "
        f"validation and {results['num_test_images']:,} test images.{about} License of the images: {licence}; of the "
        f"classifier: {card_from_results(results)['license']}."
    )


def _usage(job: FinishedJob) -> str:
    results = job.results
    size = results["image_size"]
    lines = [
        "```python",
        "import keras",
        "import numpy as np",
        "",
        'classifier = keras.models.load_model("classifier.keras")  # needs Keras alone',
        f"# Images ({size}, {size}, 3) with values in [0, 1]; the normalization is inside.",
        f"images = np.zeros((1, {size}, {size}, 3), np.float32)",
        "labels = classifier.predict(images).argmax(axis=-1)  # positions in class_names of results.json",
        "```",
        "",
        "```sh",
        *(line for what, command in commands(job, workdir=pathlib.Path()) for line in (f"# {what}", command)),
        "```",
    ]
    attack = results["robust_accuracy_attack"]
    note = f"\n\nThe attack of the figures above: {attack_in_words(attack)}." if attack else ""
    return "\n".join(lines) + note


def _names(names: list[str], most: int = 10) -> str:
    shown = ", ".join(escape(" ".join(name.split())) for name in names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more classes"
