"""FGVC-Aircraft, which TFDS does not have (tensorflow/datasets#1216)."""

import pathlib
from collections.abc import Iterator
from typing import Any

import tensorflow_datasets as tfds

from robust_tf.data.builders.image_builder import Example, ImageBuilder, archive

_URL = "https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft/archives/fgvc-aircraft-2013b.tar.gz"


class FgvcAircraft(ImageBuilder):
    """10,000 photographs of aircraft of 100 variants. The copyright banner at the bottom is not cut off."""

    VERSION = tfds.core.Version("1.0.0")
    HOMEPAGE = "https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft/"
    CITATION = (
        "S. Maji, J. Kannala, E. Rahtu, M. Blaschko, A. Vedaldi: Fine-Grained Visual Classification of Aircraft. "
        "arXiv 1306.5151, 2013."
    )
    URLS = (_URL,)
    MD5 = "d4acdd33327262359767eeaa97a4f732"
    MANUAL_DOWNLOAD_INSTRUCTIONS = f"Put fgvc-aircraft-2013b.tar.gz into the manual folder, from {_URL}."

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator[Any]]:
        root = dl_manager.extract(archive(dl_manager, _URL, md5=self.MD5))
        data = pathlib.Path(root) / "fgvc-aircraft-2013b" / "data"
        # In alphabetical order, as in the paper's code.
        self.set_class_names(sorted(filter(None, (data / "variants.txt").read_text(encoding="utf-8").splitlines())))
        parts = {"train": "train", "validation": "val", "test": "test"}
        return {
            split: self._generate_examples(_examples(data, f"images_variant_{part}.txt"))
            for split, part in parts.items()
        }


def _examples(data: pathlib.Path, list_name: str) -> Iterator[Example]:
    for line in (data / list_name).read_text(encoding="utf-8").splitlines():
        image_id, _, variant = line.strip().partition(" ")
        yield f"{image_id}.jpg", data / "images" / f"{image_id}.jpg", variant
