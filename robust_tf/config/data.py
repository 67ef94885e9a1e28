"""Which images a job uses and what it does to them, as a record that checks itself."""

import dataclasses
from typing import Literal

from robust_tf.config.checks import check_choices, check_default, check_local_folders, check_ranges
from robust_tf.errors import UserError
from robust_tf.flags import flag, parse_amount

Mixing = Literal["none", "mixup", "cutmix"]
Exif = Literal["ignore", "apply"]
AlphaBackground = Literal["none", "white", "black"]
CacheMode = Literal["auto", "memory", "disk", "none"]
TaskType = Literal["classification", "detection", "segmentation"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """A data set, the part of it that is used, and how its images are read and augmented. See `--help` for each field.

    Example:
        >>> data = DataConfig(dataset="digits", classes=(5, 6, 7), image_size=16)
        >>> data.augmentation  # "" stands for the augmentation that the table lists for the data set
        ''
    """

    task_type: TaskType = flag(
        "classification",
        "What the network predicts. classification: the class of an image. detection: boxes around objects, and their "
        "classes (RetinaNet). segmentation: the class of each pixel (DeepLabV3+). The last two need --task=transfer.",
    )
    dataset: str = flag(
        "digits",
        "Data set: one of the package's own names (an unknown name prints them all), tfds:NAME[/config][:version], or "
        "folder:/path for a folder of images. With --task_type=detection or segmentation: tfds:NAME, or a folder with "
        "annotations in the format of COCO or Pascal VOC, or with masks.",
    )
    data_dir: str = flag(
        "",
        "TFDS folder, which may be in a store such as gs://bucket/folder. If it is left out, TFDS uses its own folder.",
        identity=False,
    )
    classes: tuple[int, ...] = flag(
        (), "Labels to keep, such as 5,6,7. They are renumbered in this order. By default all are kept."
    )
    image_size: int | None = flag(
        None,
        "Height and width of the images in pixels. If it is left out, transfer uses the image size of the source, and "
        "pretraining the image size of the data set.",
    )
    augmentation: str = flag(
        "",
        "Augmentation of the training images: none, shift, shift_flip, random_resized_crop or imagenet. If it is left "
        "out, the data set decides. With --task_type=detection or segmentation: none, flip, crop_flip or "
        "crop_flip_color, by default crop_flip.",
    )
    validation_fraction: float = flag(
        0.1,
        "Share of the training split that is held out to choose the best epoch. A tfds: or folder: data set that has a "
        "validation split uses that split instead.",
    )
    split_seed: int = flag(0, "Seed that chooses the test images of a folder without a test part.")
    rand_augment: float = flag(
        0.0, "Magnitude of RandAugment on top of --augmentation, up to 1. 0 leaves RandAugment out."
    )
    mixing: Mixing = flag("none", "How the images of a training batch, and their labels, are mixed with each other.")
    downscale: int | None = flag(
        None,
        "Length in pixels to which the shorter side of every image is reduced before anything else. By default images "
        "are not reduced.",
    )
    exif: Exif = flag(
        "ignore", "Whether JPEG images are rotated as their EXIF data says, which is what image viewers do."
    )
    alpha_background: AlphaBackground = flag(
        "none",
        "Color that fills transparent areas. With none, the network sees the colors that are stored in transparent "
        "pixels.",
    )
    examples_per_class: int | None = flag(
        None, "Number of training images of each class, for few-shot training. By default all are used."
    )
    subset: str = flag(
        "",
        "Number (1000) or share (0.1) of the training images to use, taken from all classes as evenly as possible. By "
        "default all are used.",
    )
    skip_bad_images: bool = flag(
        False, "Leave out images that cannot be decoded. Without this flag, such an image ends the job."
    )
    cache: CacheMode = flag(
        "auto",
        "Where encoded images are kept between epochs. auto: in memory if they fit into a quarter of the free memory. "
        "disk: the training images, below --cache_dir.",
        identity=False,
    )
    cache_dir: str = flag(
        "",
        "Folder for cached images, features and programs that XLA has compiled. If it is left out, ~/.cache/robust_tf "
        "is used.",
        identity=False,
    )

    def __post_init__(self) -> None:
        check_choices(self)
        check_ranges(self, ("image_size", "examples_per_class", "downscale"), lowest=1)
        check_ranges(self, ("split_seed",), lowest=0)
        if not 0 < self.validation_fraction < 1:
            raise UserError(f"--validation_fraction must be between 0 and 1. Received: {self.validation_fraction}.")
        if not 0 <= self.rand_augment <= 1:
            raise UserError(f"--rand_augment must be in [0, 1]. Received: {self.rand_augment}.")
        if self.subset:
            parse_amount(self.subset)
        if self.examples_per_class is not None and self.subset:
            raise UserError(
                "--subset and --examples_per_class cannot be combined: both choose the training images. Received: "
                f"--subset={self.subset} --examples_per_class={self.examples_per_class}."
            )
        if self.task_type != "classification":
            # These choose or mix images by their one label, or would move pixels away from their annotations.
            names = ("classes", "mixing", "rand_augment", "examples_per_class", "downscale", "skip_bad_images")
            check_default(self, names, "--task_type=classification")
        check_local_folders(self, ("cache_dir",))
