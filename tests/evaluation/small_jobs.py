"""Small classifiers of the digits, in folders like those of training jobs."""

import json
import pathlib
from typing import NamedTuple

import keras

CLASSES = (0, 1, 2, 3, 4)


class Job(NamedTuple):
    """A folder with classifier.keras and results.json."""

    folder: pathlib.Path

    @property
    def classifier(self) -> str:
        return str(self.folder / "classifier.keras")


def small_classifier(seed: int, num_classes: int = len(CLASSES)) -> keras.Model:
    """Builds a network that is traced fast, because every attack is compiled for it."""
    keras.utils.set_random_seed(seed)
    images = keras.Input((8, 8, 3), name="images")
    x = keras.layers.Flatten()(images)
    x = keras.layers.Dense(24, activation="relu", name="features")(x)
    return keras.Model(images, keras.layers.Dense(num_classes, name="logits")(x), name="small")


def write_job(folder: pathlib.Path, classifier: keras.Model, *, classes: tuple[int, ...] = CLASSES) -> Job:
    folder.mkdir(parents=True)
    classifier.save(folder / "classifier.keras")
    attack = {"norm": "l2", "epsilon": 0.5, "step_size": 0.1, "steps": 20}
    results = {"dataset": "digits", "classes": list(classes), "robust_accuracy_attack": attack}
    (folder / "results.json").write_text(json.dumps(results))
    return Job(folder)
