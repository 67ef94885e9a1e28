"""The model card of a job: README.md, with the YAML front matter that the Hugging Face Hub reads."""

import json
import pathlib
import typing
from collections.abc import Sequence
from html import escape
from typing import Any

from robust_tf.data import dataset_info
from robust_tf.reporting.facts import BASELINE_NOTE, commands, limitations_of, title_of, training_of
from robust_tf.reporting.job_files import FinishedJob
from robust_tf.results import FigureName
from robust_tf.serving.publish.model_card import LICENSE_NOT_STATED

# Names of the accuracies on the Hugging Face Hub.
_HUB_METRICS: dict[FigureName, str] = {
    "clean_accuracy": "accuracy",
    "mean_per_class_accuracy": "balanced_accuracy",
    "robust_accuracy": "accuracy",
}


def readme(job: FinishedJob) -> str:
    """Returns the content of README.md."""
    results = job.results
    parts = [
        _front_matter(job),
        f"# {title_of(job)}",
        f"An image classifier for {len(results.class_names)} classes. {training_of(job)} "
        "[report.html](report.html) has figures, example images and all flags that differ from their defaults.",
        "## Results",
        "\n".join(_figures_table(job)),
        *(
            [BASELINE_NOTE, "\n".join(f"* {line}" for line in results.comparison_in_words())]
            if results.baseline
            else []
        ),
        *(["## Warnings", "\n".join(f"* {text}" for text in results.alarms)] if results.alarms else []),
        "## Data",
        _data(job),
        "## Intended use",
        f"It classifies images of the kind that it was trained on into {_names(results.class_names)}. It is meant for "
        "research on robust features and their transfer, and was not made for decisions about people.",
        "## Limitations",
        "\n".join(f"* {text}" for text in limitations_of(job)),
        "## How to use it",
        _usage(job),
        "## Versions",
        ", ".join(f"{name} {version}" for name, version in results.versions.items()) + ".",
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(job: FinishedJob) -> str:
    """Returns the front matter. Every value is JSON, which is valid YAML."""
    results = job.results
    figures = [results.figure(name) for name in typing.get_args(FigureName)]
    measured = [
        {"type": _HUB_METRICS[figure.name], "name": figure.title, "value": figure.value}
        for figure in figures
        if figure.value is not None
    ]
    data = {"type": results.dataset, "name": results.dataset, "split": "test"}
    entry = {
        "name": job.workdir.absolute().name,
        "results": [{"task": {"type": "image-classification"}, "dataset": data, "metrics": measured}],
    }
    fields: dict[str, Any] = {
        "library_name": "keras",
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", "adversarial-robustness", results.architecture],
        "metrics": ["accuracy"],
        "model-index": [entry],
    }
    lines = [f"{name}: {json.dumps(value, ensure_ascii=False)}" for name, value in fields.items()]
    return "\n".join(["---", *lines, "---"])


def _figures_table(job: FinishedJob) -> list[str]:
    results = job.results
    figures = results.figures()
    titles = " | ".join(figure.title for figure in figures)
    table = [f"| {results.num_test_images:,} test images | {titles} |", "|---" * (len(figures) + 1) + "|"]
    for title, cells in results.rows(alone="this classifier"):
        table.append(f"| {title} | {' | '.join(cells)} |")
    return [*table, "", "95 % Wilson confidence intervals are in brackets."]


def _data(job: FinishedJob) -> str:
    results = job.results
    info = dataset_info(results.dataset)
    about = f" {info.homepage}" if info.homepage else ""
    return (
        f"{results.dataset}: {results.num_train_images:,} training images, {results.num_validation_images:,} "
        f"validation images and {results.num_test_images:,} test images.{about} License of the images: "
        f"{info.license or LICENSE_NOT_STATED}. License of the classifier: {LICENSE_NOT_STATED}."
    )


def _usage(job: FinishedJob) -> str:
    size = job.results.image_size
    lines = [
        "```python",
        "import keras",
        "import numpy as np",
        "",
        'classifier = keras.models.load_model("classifier.keras")  # needs only Keras',
        f"# Images of shape ({size}, {size}, 3) with values in [0, 1]. The model normalizes them itself.",
        f"images = np.zeros((1, {size}, {size}, 3), np.float32)",
        "labels = classifier.predict(images).argmax(axis=-1)  # positions in class_names of results.json",
        "```",
        "",
        "```sh",
        *(line for what, command in commands(job, workdir=pathlib.Path()) for line in (f"# {what}", command)),
        "```",
    ]
    return "\n".join(lines)


def _names(names: Sequence[str], most: int = 10) -> str:
    shown = ", ".join(escape(" ".join(name.split())) for name in names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more classes"
