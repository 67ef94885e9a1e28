"""Trained classifiers that the tests of this folder share."""

import keras
import numpy as np
import pytest
from small_jobs import CLASSES, Job, small_classifier, write_job

from tests.tasks import make_task


@pytest.fixture(scope="session")
def jobs(tmp_path_factory, data_dir) -> dict[str, Job]:
    """Three jobs: a good and a poor classifier of the same digits, and a classifier of other digits."""
    folder = tmp_path_factory.mktemp("jobs")
    made = {}
    for name, epochs, classes in (("good", 12, CLASSES), ("poor", 1, CLASSES), ("other", 8, (5, 6, 7, 8, 9))):
        task = make_task("digits", classes=classes, image_size=8, batch_size=32, augmentation="none", data_dir=data_dir)
        images, labels = (np.concatenate(part) for part in zip(*task.train(first_epoch=0, epochs=1), strict=True))
        classifier = small_classifier(seed=1)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        classifier.compile(keras.optimizers.Adam(0.01), loss)
        classifier.fit(images, labels, batch_size=32, epochs=epochs, verbose=0)
        made[name] = write_job(folder / name, classifier, classes=classes)
    return made
