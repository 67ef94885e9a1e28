"""Caltech-101 and Caltech-256, split by the numbers in the file names as in the paper, not at random."""

import pathlib
import re
from collections.abc import Iterator
from typing import Any

import tensorflow_datasets as tfds

from robust_tf.data.builders.image_builder import Example, ImageBuilder, archive

_CALTECH101_URL = "https://data.caltech.edu/records/mzrjq-6wc02/files/caltech-101.zip?download=1"
_CALTECH256_URL = "https://data.caltech.edu/records/nyy15-4j048/files/256_ObjectCategories.tar"


class Caltech101Numbered(ImageBuilder):
    """8,677 photographs of 101 classes. Images 1 to 30 of each class are the training part, the others the test part.

    TFDS's caltech101 has one more class (the background pictures) and chooses the 30 images at random.
    """

    VERSION = tfds.core.Version("1.0.0")
    HOMEPAGE = "https://doi.org/10.22002/D1.20086"
    CITATION = (
        "L. Fei-Fei, R. Fergus, P. Perona: Learning generative visual models from few training examples. "
        "CVPR Workshop on Generative-Model Based Vision, 2004."
    )
    URLS = (_CALTECH101_URL,)
    MANUAL_DOWNLOAD_INSTRUCTIONS = f"Put caltech-101.zip into the manual folder, from {_CALTECH101_URL}."
    NUM_TRAIN_PER_CLASS = 30
    url_infos = tfds.builder_cls("caltech101").url_infos  # TFDS has the same archive: its size and checksum

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator[Any]]:
        outer = pathlib.Path(dl_manager.download_and_extract(_CALTECH101_URL))
        images = pathlib.Path(dl_manager.extract(outer / "caltech-101" / "101_ObjectCategories.tar.gz"))
        folders = _class_folders(images / "101_ObjectCategories", r"(?!BACKGROUND_Google$)(.+)")
        self.set_class_names(list(folders))
        return _numbered_split(self, folders, r"image_\d{4}\.jpg", self.NUM_TRAIN_PER_CLASS)


class Caltech256(ImageBuilder):
    """30,607 photographs of 256 classes and "clutter". Images 1 to 60 of each class are the training part."""

    VERSION = tfds.core.Version("1.0.0")
    HOMEPAGE = "https://doi.org/10.22002/D1.20087"
    CITATION = "G. Griffin, A. Holub, P. Perona: Caltech-256 Object Category Dataset. Technical report 7694, 2007."
    URLS = (_CALTECH256_URL,)
    MD5 = "67b4f42ca05d46448c6bb8ecd2220f6d"
    MANUAL_DOWNLOAD_INSTRUCTIONS = f"Put 256_ObjectCategories.tar into the manual folder, from {_CALTECH256_URL}."
    NUM_TRAIN_PER_CLASS = 60

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator[Any]]:
        images = pathlib.Path(dl_manager.extract(archive(dl_manager, _CALTECH256_URL, md5=self.MD5)))
        folders = _class_folders(images / "256_ObjectCategories", r"\d{3}\.(.+)")
        self.set_class_names(list(folders))
        # The pattern leaves out a stray folder and an unfinished file that lie among the images.
        return _numbered_split(self, folders, r"\d{3}_\d{4}\.jpg", self.NUM_TRAIN_PER_CLASS)


def _class_folders(root: pathlib.Path, pattern: str) -> dict[str, pathlib.Path]:
    """Returns the folder of each class, in the order of the folder names as in the paper's code.

    Args:
        root: Folder that holds the class folders.
        pattern: Regular expression for the name of a class folder. Its first group is the name of the class.
    """
    matches = [(re.fullmatch(pattern, path.name), path) for path in sorted(root.iterdir()) if path.is_dir()]
    return {match[1]: path for match, path in matches if match}


def _numbered_split(
    builder: ImageBuilder, folders: dict[str, pathlib.Path], pattern: str, num_train: int
) -> dict[str, Iterator[Any]]:
    def examples(of_class: slice) -> Iterator[Example]:
        for class_name, folder in folders.items():
            # The numbers have leading zeros, so sorting by name sorts by number.
            images = sorted(path for path in folder.iterdir() if re.fullmatch(pattern, path.name))
            for path in images[of_class]:
                yield f"{folder.name}/{path.name}", path, class_name

    return {
        "train": builder._generate_examples(examples(slice(num_train))),
        "test": builder._generate_examples(examples(slice(num_train, None))),
    }
