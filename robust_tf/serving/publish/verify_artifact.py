"""Checks an artifact before it is published: run in a fresh process, it must answer like the classifier."""

import json
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

import keras
import numpy as np

from robust_tf.errors import UserError
from robust_tf.serving.publish.formats import Samples
from robust_tf.serving.publish.verify import expect_close, logits_from, tolerance_of

# A file whose weights are rounded to 8 bits must predict the classifier's label at least this often. Less points to a
# layer that does not survive the rounding.
_LEAST_AGREEMENT = 0.9


def verify_artifact(folder: pathlib.Path, classifier: keras.Model, samples: Samples | None) -> dict[str, Any]:
    """Runs an artifact in a fresh process, alone and in batches, and compares its answers with the classifier.

    Args:
        folder: Folder of the artifact.
        classifier: The exported classifier.
        samples: Images on which labels and accuracies are compared, for a format that rounds. None compares logits.

    Returns:
        What the model card says about the comparison and about the latency.

    Raises:
        UserError: The artifact cannot be loaded or run, or its answers differ.
    """
    size = classifier.input_shape[1]
    images = np.random.default_rng(0).uniform(size=(5, size, size, 3)).astype(np.float32)
    if samples is not None:
        images = samples.for_checking.images
    answers = _answers_of(folder, images)
    expected = logits_from(classifier, images)
    found = answers["together"]
    if samples is None:
        # One image at a time must give the same as all five in one batch.
        differences = [
            expect_close(what, answers[what], expected, tolerance_of(classifier)) for what in ("together", "alone")
        ]
        checked = {"num_images": len(images), "largest_relative_difference": max(differences)}
    else:
        expect_close("logits, alone and in a batch", answers["alone"], found, 1e-5)
        labels = samples.for_checking.labels
        agreement = float(np.mean(found.argmax(axis=1) == expected.argmax(axis=1)))
        if agreement < _LEAST_AGREEMENT:
            raise UserError(
                f"An artifact must predict the classifier's label for at least {_LEAST_AGREEMENT:.0%} of the images. "
                f"Received: {agreement:.1%} of {len(images)}. Nothing was published. Publish the classifier in a "
                "format that does not round."
            )
        checked = {
            "num_images": len(images),
            "agreement": agreement,
            "accuracy": float(np.mean(found.argmax(axis=1) == labels)),
            "classifier_accuracy": float(np.mean(expected.argmax(axis=1) == labels)),
        }
    return {"comparison": checked, **json.loads(str(answers["latency"]))}


def _answers_of(folder: pathlib.Path, images: np.ndarray) -> dict[str, np.ndarray]:
    """Returns what `artifacts.trial` writes, which runs in a process without the objects of this one."""
    with tempfile.TemporaryDirectory(prefix="robust_tf-") as exchange:
        paths = [str(pathlib.Path(exchange) / name) for name in ("images.npy", "answers.npz")]
        np.save(paths[0], images)
        command = [sys.executable, "-m", "robust_tf.serving.artifacts.trial", str(folder), *paths]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        if run.returncode:
            lines = run.stderr.strip().splitlines() or [f"exit code {run.returncode}"]
            reason = lines[-1].removeprefix("error: ").rstrip(".")
            raise UserError(f"The artifact cannot be run. Received: {reason}. Nothing was published.")
        with np.load(paths[1]) as answers:
            return dict(answers)
