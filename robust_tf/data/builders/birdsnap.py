"""Birdsnap. Each user has to collect its photographs from the web."""

import csv
import hashlib
import pathlib
from collections.abc import Iterator
from typing import Any

import tensorflow_datasets as tfds

from robust_tf.data.builders.image_builder import Example, ImageBuilder, manual_folder
from robust_tf.errors import UserError

_LISTS_URL = "http://thomasberg.org/datasets/birdsnap/1.1/birdsnap.tgz"


class Birdsnap(ImageBuilder):
    """Up to 49,829 photographs of 500 North American bird species: those that could still be downloaded.

    A photograph is used only if its checksum is the one in the authors' list, because many websites return a
    placeholder for a photograph that was deleted.
    """

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [
        # The paper's 32,677 and 8,171 photographs are 80 % and 20 % of those that it had. It does not list the 20 %.
        tfds.core.BuilderConfig(
            name="fifth", description="A fifth of each class is the test part, chosen by the names of the files."
        ),
        tfds.core.BuilderConfig(name="official", description="The authors' list of 2,443 images is the test part."),
    ]
    HOMEPAGE = "http://thomasberg.org/"
    CITATION = (
        "T. Berg, J. Liu, S. W. Lee, M. L. Alexander, D. W. Jacobs, P. N. Belhumeur: Birdsnap: Large-scale "
        "Fine-grained Visual Categorization of Birds. CVPR 2014."
    )
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        f"Unpack {_LISTS_URL} and run its get_birdsnap.py (Python 2), which collects the photographs from the web. "
        "Then put the folder birdsnap, with images.txt, test_images.txt and download/images/<species>/<photograph>, "
        "into the manual folder."
    )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator[Any]]:
        root = manual_folder(dl_manager, "birdsnap", ["images.txt", "test_images.txt", "download/images"])
        paths = [path for path, digest in _listed(root) if _is_original(root / "download" / "images" / path, digest)]
        if not paths:
            raise UserError(
                "At least one photograph must have the checksum that images.txt lists for it. Received: none in "
                f"{root / 'download/images'}."
            )
        self.set_class_names(sorted({pathlib.PurePosixPath(path).parent.name for path in paths}))
        official = self.builder_config.name == "official"
        test = _official_test(root) if official else _fifth(paths)
        return {
            "train": self._generate_examples(_examples(root, [path for path in paths if path not in test])),
            "test": self._generate_examples(_examples(root, [path for path in paths if path in test])),
        }


def _listed(root: pathlib.Path) -> Iterator[tuple[str, str]]:
    """Yields the path (relative to download/images) and the MD5 of every photograph in the authors' list."""
    with (root / "images.txt").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file, delimiter="\t"):
            yield row["path"], row["md5"]


def _is_original(path: pathlib.Path, digest: str) -> bool:
    return path.is_file() and hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest() == digest


def _official_test(root: pathlib.Path) -> set[str]:
    return set((root / "test_images.txt").read_text(encoding="utf-8").splitlines()[1:])  # the first line is a header


def _fifth(paths: list[str]) -> set[str]:
    of_class: dict[str, list[str]] = {}
    for path in paths:
        of_class.setdefault(pathlib.PurePosixPath(path).parent.name, []).append(path)
    # Ordered by digest, so that users who lack different photographs still get nearly the same split.
    ranked = (sorted(members, key=lambda path: hashlib.sha256(path.encode()).digest()) for members in of_class.values())
    return {path for members in ranked for path in members[: max(1, round(len(members) / 5))]}


def _examples(root: pathlib.Path, paths: list[str]) -> Iterator[Example]:
    for path in paths:
        yield path, root / "download" / "images" / path, pathlib.PurePosixPath(path).parent.name
