"""What the builders of this folder share: the features of an example, and archives that may be brought by hand."""

import hashlib
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar

import tensorflow_datasets as tfds

from robust_tf.errors import UserError

# (file name, which is the key; a path, or the encoded image itself; class name)
Example = tuple[str, pathlib.Path | bytes, str]


class ImageBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """Encoded images as their authors published them, each with its file name and its class.

    The classes are known when the files are there, so a builder calls `set_class_names` in `_split_generators`.

    Attributes:
        HOMEPAGE, CITATION: of the data set.
        URLS: what is downloaded; empty if every file is brought by hand.
    """

    HOMEPAGE: ClassVar[str]
    CITATION: ClassVar[str]
    URLS: ClassVar[tuple[str, ...]] = ()

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.__doc__,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(None, None, 3)),
                    "label": tfds.features.ClassLabel(),
                    "file_name": tfds.features.Text(),
                }
            ),
            supervised_keys=("image", "label"),
            homepage=self.HOMEPAGE,
            citation=self.CITATION,
        )

    def set_class_names(self, names: Sequence[str]) -> None:
        """Fixes the labels: positions in `names`."""
        self.info.features["label"].names = list(names)

    def _generate_examples(self, examples: Iterable[Example]) -> Iterator[tuple[str, dict[str, Any]]]:
        for name, image, class_name in examples:
            yield name, {"image": image, "label": class_name, "file_name": name}


def archive(dl_manager: tfds.download.DownloadManager, url: str, *, md5: str) -> pathlib.Path:
    """The archive of a URL for which TFDS has no checksum: from the manual folder if it is there, else downloaded.

    Args:
        dl_manager: of the builder, which has MANUAL_DOWNLOAD_INSTRUCTIONS.
        url: ends in the file's name.
        md5: of the file, as its publisher or torchvision states it.

    Raises:
        UserError: the file is another one, or was cut off.
    """
    try:
        path = pathlib.Path(dl_manager.manual_dir) / pathlib.Path(url).name
    except AssertionError:  # there is no manual folder
        path = None
    if path is None or not path.exists():
        path = pathlib.Path(dl_manager.download(url))
    with path.open("rb") as file:
        received = hashlib.file_digest(file, "md5").hexdigest()
    if received != md5:
        raise UserError(
            f"{path} is not the published {pathlib.Path(url).name}, or was cut off: its MD5 must be {md5}. "
            f"Received: {received}. Delete it and start again."
        )
    return path


def manual_folder(dl_manager: tfds.download.DownloadManager, name: str, needed: Sequence[str]) -> pathlib.Path:
    """A folder that the user has put into TFDS's manual folder.

    Raises:
        UserError: a file that is `needed` in it is missing.
    """
    folder = pathlib.Path(dl_manager.manual_dir) / name
    missing = [file for file in needed if not (folder / file).exists()]
    if missing:
        raise UserError(f"{folder} must hold {', '.join(needed)}. Received: no {', '.join(missing)}.")
    return folder
