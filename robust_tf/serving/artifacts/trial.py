"""Tries an artifact in a process that has nothing but the artifact's own runtime.

    python -m robust_tf.serving.artifacts.trial LOCATION IMAGES.npy ANSWERS.npz

This writes the logits of all images at once and of one image at a time, and the latency as JSON.
"""

import json
import sys

import numpy as np

from robust_tf.errors import exit_on_user_error
from robust_tf.serving.artifacts.latency import latency_entry
from robust_tf.serving.artifacts.opening import open_artifact


def main(location: str, images_path: str, answers_path: str) -> None:
    """Runs the artifact on the images, and measures its latency."""
    images = np.load(images_path)
    with open_artifact(location) as artifact:
        together = artifact.logits(images)
        alone = np.concatenate([artifact.logits(images[number : number + 1]) for number in range(len(images))])
        latency = latency_entry(artifact.logits, artifact.image_size)
    np.savez(answers_path, together=together, alone=alone, latency=json.dumps(latency))


if __name__ == "__main__":
    with exit_on_user_error():
        main(*sys.argv[1:])
