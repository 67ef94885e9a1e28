"""The handwritten digits of scikit-learn: real images that need no download."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

_NUM_TRAIN = 1_000


class Digits(tfds.core.GeneratorBasedBuilder):
    """1,797 gray 8x8 images of the digits 0 to 9. The first 1,000 are for training, the other 797 for testing."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.__doc__,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(8, 8, 1)),
                    "label": tfds.features.ClassLabel(num_classes=10),
                }
            ),
            supervised_keys=("image", "label"),
            homepage="https://scikit-learn.org/stable/datasets/toy_dataset.html#optical-recognition-of-handwritten-digits-dataset",
            citation="E. Alpaydin, C. Kaynak: Optical Recognition of Handwritten Digits. UCI repository, 1998.",
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator[Any]]:
        from sklearn.datasets import load_digits  # slow to import, and needed only here

        digits = load_digits()
        images = np.round(digits.images * (255.0 / 16.0)).astype(np.uint8)[..., None]  # stored as 0-16
        return {
            "train": self._generate_examples(images[:_NUM_TRAIN], digits.target[:_NUM_TRAIN]),
            "test": self._generate_examples(images[_NUM_TRAIN:], digits.target[_NUM_TRAIN:]),
        }

    def _generate_examples(self, images: np.ndarray, labels: np.ndarray) -> Iterator[tuple[int, dict[str, Any]]]:
        for key, (image, label) in enumerate(zip(images, labels, strict=True)):
            yield key, {"image": image, "label": int(label)}
