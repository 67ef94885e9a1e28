"""What an image is labeled with in each type of task: how its data sets are opened, and how its images are transformed.

A label is the number of a class for classification, and a string for the other types: boxes or an encoded mask.
"""

import dataclasses
from collections.abc import Callable, Collection

from robust_tf.config.data import DataConfig, TaskType
from robust_tf.data.augmentations import AUGMENTATIONS
from robust_tf.data.boxes import BoxPreprocessing, open_boxes
from robust_tf.data.boxes.geometry import AUGMENTATION_NAMES
from robust_tf.data.datasets import dataset_info
from robust_tf.data.masks import MaskPreprocessing, open_masks
from robust_tf.data.open_dataset import data_folder, open_dataset
from robust_tf.data.preprocessing import ExamplePreprocessing, Preprocessing
from robust_tf.data.records import LabeledImages
from robust_tf.data.transforms import Decoding

# Image size and augmentation of detection and segmentation if the flags leave them out and there is no source.
_IMAGE_SIZE = 512
_AUGMENTATION = "crop_flip"
# Far more boxes than any image of COCO has. They are filled up to this number when a network is measured.
_MOST_BOXES = 1000


@dataclasses.dataclass(frozen=True, kw_only=True)
class LabelKind:
    """How the images of one `task_type` are opened and transformed.

    Attributes:
        open: Function that opens the data set of a `DataConfig`.
        preprocessing: Function from a `DataConfig` and the data set to the transforms.
        augmentations: Names of the augmentations.
        metric: Metric of the task. Empty if it depends on the data set.
    """

    open: Callable[[DataConfig], LabeledImages]
    preprocessing: Callable[[DataConfig, LabeledImages], ExamplePreprocessing]
    augmentations: Collection[str]
    metric: str = ""


def _open_classes(data: DataConfig) -> LabeledImages:
    return open_dataset(
        data.dataset, data_folder(data.data_dir), split_seed=data.split_seed, skip_bad_images=data.skip_bad_images
    )


def _open_boxes(data: DataConfig) -> LabeledImages:
    images = open_boxes(data.dataset, data_folder(data.data_dir), split_seed=data.split_seed)
    return dataclasses.replace(images, label_kind="boxes")


def _open_masks(data: DataConfig) -> LabeledImages:
    images = open_masks(data.dataset, data_folder(data.data_dir), split_seed=data.split_seed)
    return dataclasses.replace(images, label_kind="masks")


def _class_preprocessing(data: DataConfig, images: LabeledImages) -> Preprocessing:
    info = dataset_info(data.dataset)
    size = data.image_size or info.image_size
    return Preprocessing(
        image_size=size,
        # In the same proportion as in the row, such as the paper's 256 to 224. Small images are not cropped.
        resize_size=max(size, round(size * info.resize_size / info.image_size)),
        augmentation=data.augmentation or info.augmentation,
        rand_augment=data.rand_augment,
        downscale=data.downscale,
        decoding=Decoding(exif=data.exif, alpha_background=data.alpha_background),
        highest_float=images.highest_float,
    )


def _box_preprocessing(data: DataConfig, images: LabeledImages) -> BoxPreprocessing:
    del images
    return BoxPreprocessing(
        image_size=data.image_size or _IMAGE_SIZE,
        augmentation=data.augmentation or _AUGMENTATION,
        most_boxes=_MOST_BOXES,
        decoding=Decoding(exif=data.exif, alpha_background=data.alpha_background),
    )


def _mask_preprocessing(data: DataConfig, images: LabeledImages) -> MaskPreprocessing:
    del images
    return MaskPreprocessing(
        image_size=data.image_size or _IMAGE_SIZE,
        augmentation=data.augmentation or _AUGMENTATION,
        decoding=Decoding(exif=data.exif, alpha_background=data.alpha_background),
    )


LABEL_KINDS: dict[TaskType, LabelKind] = {
    "classification": LabelKind(open=_open_classes, preprocessing=_class_preprocessing, augmentations=AUGMENTATIONS),
    "detection": LabelKind(
        open=_open_boxes,
        preprocessing=_box_preprocessing,
        augmentations=AUGMENTATION_NAMES,
        metric="average_precision",
    ),
    "segmentation": LabelKind(
        open=_open_masks,
        preprocessing=_mask_preprocessing,
        augmentations=AUGMENTATION_NAMES,
        metric="mean_iou",
    ),
}
