"""Stanford Cars from files that the user provides: the addresses that TFDS's cars196 downloads from are gone."""

import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from robust_tf.data.builders.image_builder import Example, ImageBuilder, manual_folder
from robust_tf.errors import UserError

_TEST_LABELS = "cars_test_annos_withlabels.mat"


class StanfordCars(ImageBuilder):
    """16,185 photographs of 196 car models, with the authors' split into 8,144 for training and 8,041 for testing."""

    VERSION = tfds.core.Version("1.0.0")
    HOMEPAGE = "https://ai.stanford.edu/~jkrause/cars/car_dataset.html"
    CITATION = (
        "J. Krause, M. Stark, J. Deng, L. Fei-Fei: 3D Object Representations for Fine-Grained Categorization. "
        "Workshop on 3D Representation and Recognition, 2013."
    )
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "The authors' addresses no longer exist; pytorch/vision#7545 lists copies. Put a folder stanford_cars with "
        f"cars_train/, cars_test/, devkit/ (from car_devkit.tgz) and {_TEST_LABELS} into the manual folder."
    )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator[Any]]:
        from scipy.io import loadmat  # slow to import, and needed only here

        needed = ["cars_train", "cars_test", "devkit/cars_meta.mat", "devkit/cars_train_annos.mat"]
        root = manual_folder(dl_manager, "stanford_cars", needed)
        test_labels = next(
            (path for path in (root / _TEST_LABELS, root / "devkit" / _TEST_LABELS) if path.exists()), None
        )
        if test_labels is None:
            raise UserError(f"{root} must hold {_TEST_LABELS}, because the test list in devkit/ has no labels.")
        names = [str(name) for name in loadmat(root / "devkit" / "cars_meta.mat", squeeze_me=True)["class_names"]]
        self.set_class_names(names)

        def examples(folder: pathlib.Path, labels: pathlib.Path) -> Iterator[Example]:
            nested = folder / folder.name  # the layout of one of the copies
            images = nested if nested.is_dir() else folder
            for row in np.atleast_1d(loadmat(labels, squeeze_me=True)["annotations"]):
                file_name = str(row["fname"])
                yield f"{folder.name}/{file_name}", images / file_name, names[int(row["class"]) - 1]

        return {
            "train": self._generate_examples(examples(root / "cars_train", root / "devkit" / "cars_train_annos.mat")),
            "test": self._generate_examples(examples(root / "cars_test", test_labels)),
        }
