"""SUN397 with the original images. TFDS reduces them to 120,000 pixels and compresses them again."""

import io
import pathlib
from collections.abc import Iterator
from typing import Any

import tensorflow as tf
import tensorflow_datasets as tfds

from robust_tf.data.builders.image_builder import Example, ImageBuilder

_URL = "https://vision.princeton.edu/projects/2010/SUN/"
_IMAGES_URL, _PARTITIONS_URL = f"{_URL}SUN397.tar.gz", f"{_URL}download/Partitions.zip"


class Sun397Original(ImageBuilder):
    """39,700 photographs of 397 scenes: the authors' partition 01, with 50 training and 50 test images per class."""

    VERSION = tfds.core.Version("1.0.0")
    HOMEPAGE = _URL
    CITATION = (
        "J. Xiao, J. Hays, K. A. Ehinger, A. Oliva, A. Torralba: SUN Database: Large-scale Scene Recognition from "
        "Abbey to Zoo. CVPR 2010."
    )
    URLS = (_IMAGES_URL, _PARTITIONS_URL)
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        f"Put SUN397.tar.gz and Partitions.zip into the manual folder, from {_IMAGES_URL} and {_PARTITIONS_URL}."
    )
    url_infos = tfds.builder_cls("sun397").url_infos  # TFDS has the same archives: their sizes and checksums

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator[Any]]:
        images = tfds.download.Resource(
            path=dl_manager.download(_IMAGES_URL), extract_method=tfds.download.ExtractMethod.TAR_GZ_STREAM
        )
        partitions = pathlib.Path(dl_manager.download_and_extract(_PARTITIONS_URL))
        lists = {"train": "Training_01.txt", "test": "Testing_01.txt"}
        names = {split: set((partitions / name).read_text().split()) for split, name in lists.items()}
        self.set_class_names(sorted({_class_name(name) for name in names["train"] | names["test"]}))

        def examples(split: str) -> Iterator[Example]:
            # Read from the archive, because unpacking it would take another 37 GB.
            for path, file in dl_manager.iter_archive(images):
                name = "/" + pathlib.PurePosixPath(path).relative_to("SUN397").as_posix()
                if name in names[split]:
                    yield name, _readable(file.read()), _class_name(name)

        return {split: self._generate_examples(examples(split)) for split in lists}


def _class_name(name: str) -> str:
    return str(pathlib.PurePosixPath(name).parent)


def _readable(encoded: bytes) -> bytes:
    """Returns the image unchanged, or as PNG if only Pillow can decode it, which the paper's code uses."""
    from PIL import Image

    try:
        tf.io.decode_image(encoded, channels=3, expand_animations=False)
        return encoded
    except tf.errors.InvalidArgumentError:
        buffer = io.BytesIO()
        Image.open(io.BytesIO(encoded)).convert("RGB").save(buffer, "PNG")
        return buffer.getvalue()
