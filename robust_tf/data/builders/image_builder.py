"""The base class of the builders, and the files that users may put into TFDS's manual folder."""

import hashlib
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar

import tensorflow_datasets as tfds

from robust_tf.errors import UserError

# Name of the file, which identifies the example; path of the file, or the encoded image itself; name of the class.
Example = tuple[str, pathlib.Path | bytes, str]


class ImageBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """Base class for data sets of encoded images, which are stored as their authors published them.

    A subclass defines `VERSION`, the attributes below and `_split_generators`, which finds the files, calls
    `set_class_names` and passes the examples of each split to `_generate_examples`. If users have to fetch files, it
    also defines `MANUAL_DOWNLOAD_INSTRUCTIONS`.

    Attributes:
        HOMEPAGE: Address of the data set's home page.
        CITATION: Publication that introduced the data set.
        URLS: Addresses of the files that are downloaded. Empty if users have to fetch every file.
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
        """Sets the names of the classes. The label of a class is its position in `names`."""
        self.info.features["label"].names = list(names)

    def _generate_examples(self, examples: Iterable[Example]) -> Iterator[tuple[str, dict[str, Any]]]:
        for name, image, class_name in examples:
            yield name, {"image": image, "label": class_name, "file_name": name}


def archive(dl_manager: tfds.download.DownloadManager, url: str, *, md5: str) -> pathlib.Path:
    """Returns the path of an archive for which TFDS has no checksum, downloading it if the manual folder lacks it.

    Args:
        dl_manager: Download manager of the builder, which must have `MANUAL_DOWNLOAD_INSTRUCTIONS`.
        url: Address of the archive, ending in the name of the file.
        md5: MD5 of the file, as stated by its publisher or by torchvision.

    Raises:
        UserError: If the MD5 of the file is different, for example because the download was cut off.
    """
    try:
        path = pathlib.Path(dl_manager.manual_dir) / pathlib.Path(url).name
    except AssertionError:  # raised by TFDS if there is no manual folder
        path = None
    if path is None or not path.exists():
        path = pathlib.Path(dl_manager.download(url))
    with path.open("rb") as file:
        received = hashlib.file_digest(file, "md5").hexdigest()
    if received != md5:
        raise UserError(
            f"{path} is not the published {pathlib.Path(url).name}, or it was cut off: its MD5 must be {md5}. "
            f"Received: {received}. Delete the file and start again."
        )
    return path


def manual_folder(dl_manager: tfds.download.DownloadManager, name: str, needed: Sequence[str]) -> pathlib.Path:
    """Returns the path of a folder that the user has put into TFDS's manual folder.

    Args:
        dl_manager: Download manager of the builder.
        name: Name of the folder.
        needed: Paths of the files that the folder must hold, relative to it.

    Raises:
        UserError: If one of the needed files is missing.
    """
    folder = pathlib.Path(dl_manager.manual_dir) / name
    missing = [file for file in needed if not (folder / file).exists()]
    if missing:
        raise UserError(f"{folder} must hold {', '.join(needed)}. Received: no {', '.join(missing)}.")
    return folder
