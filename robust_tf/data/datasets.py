"""The DATASETS table: what each data set is, which of its splits the paper trains and tests on, and how to get it."""

import dataclasses

from robust_tf.data.augmentations import AUGMENTATIONS
from robust_tf.errors import unknown_name

_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_RAW_MEAN, _RAW_STD = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
_NO_LICENSE = "not stated; research use"


@dataclasses.dataclass(frozen=True, kw_only=True)
class DatasetInfo:
    """One row of the table.

    Attributes:
        builder: name in TFDS or of a builder of this package, with config and version; empty for a folder of images.
        train: split expression that the paper trains on.
        test: split expression that the paper tests on.
        num_classes, num_train, num_test: what must be there; None if that is not fixed.
        metric: what the paper reports: "accuracy" or "mean_per_class_accuracy".
        image_size: side in pixels that the recipe trains at.
        resize_size: shorter side before the center crop in evaluation.
        augmentation: key of AUGMENTATIONS for training.
        mean, std: per-channel normalization of [0, 1] pixels. For most transfer tasks the paper's code uses 0 and 1.
        license: of the images.
        homepage: of the data set.
        download_size: for people, e.g. "4.7 GiB"; empty if there is nothing to download.
        by_hand: its files cannot be downloaded by a program.
        note: where it is not as one would expect, or not as in the paper.
    """

    builder: str
    train: str = "train"
    test: str = "test"
    num_classes: int | None = None
    num_train: int | None = None
    num_test: int | None = None
    metric: str = "accuracy"
    image_size: int = 224
    resize_size: int = 256
    augmentation: str = "random_resized_crop"
    mean: tuple[float, float, float] = _RAW_MEAN
    std: tuple[float, float, float] = _RAW_STD
    license: str = ""
    homepage: str = ""
    download_size: str = ""
    by_hand: bool = False
    note: str = ""

    def __post_init__(self) -> None:
        if self.augmentation not in AUGMENTATIONS:
            raise unknown_name("augmentation", self.augmentation, AUGMENTATIONS)


# Sources: Salman et al. 2020, appendix A.2, and the paper's code (splits, metrics, normalization); sizes: TFDS's
# checksum files, for the builders of this package the publishers' pages.
DATASETS = {
    # The paper's twelve.
    "aircraft": DatasetInfo(
        builder="fgvc_aircraft:1.0.0",
        train="train+validation",
        num_classes=100,
        num_train=6_667,
        num_test=3_333,
        license="non-commercial research only",
        homepage="https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft/",
        download_size="2.6 GiB",
        note="Labels are variants. As in the paper's code, the copyright banner at the bottom is not cut off.",
    ),
    "birdsnap": DatasetInfo(
        builder="birdsnap/fifth:1.0.0",
        num_classes=500,
        license="the photographers'; research use",
        homepage="http://thomasberg.org/",
        download_size="49,829 photographs from the web, one by one",
        by_hand=True,
        note="Not the paper's split: it had 32,677 and 8,171 of the photographs that were online then, and does not "
        "say which. Here too a fifth of what is there tests; tfds:birdsnap/official takes the authors' test list.",
    ),
    "caltech101": DatasetInfo(
        builder="caltech101_numbered:1.0.0",
        num_classes=101,
        num_train=3_030,
        num_test=5_647,
        metric="mean_per_class_accuracy",
        license="CC BY 4.0",
        homepage="https://doi.org/10.22002/D1.20086",
        download_size="131 MiB",
        note="Images 1 to 30 of each class train, without the background class. TFDS's caltech101 has 102 labels and "
        "another, random choice.",
    ),
    "caltech256": DatasetInfo(
        builder="caltech256:1.0.0",
        num_classes=257,
        num_train=15_420,
        num_test=15_187,
        metric="mean_per_class_accuracy",
        license="CC BY 4.0",
        homepage="https://doi.org/10.22002/D1.20087",
        download_size="1.1 GiB",
        note="Images 1 to 60 of each class train; clutter counts as a class, as in the paper.",
    ),
    "cifar10": DatasetInfo(
        builder="cifar10:3.0.2",
        num_classes=10,
        num_train=50_000,
        num_test=10_000,
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2023, 0.1994, 0.2010),
        license=_NO_LICENSE,
        homepage="https://www.cs.toronto.edu/~kriz/cifar.html",
        download_size="162 MiB",
    ),
    "cifar100": DatasetInfo(
        builder="cifar100:3.0.2",
        num_classes=100,
        num_train=50_000,
        num_test=10_000,
        mean=(0.5071, 0.4867, 0.4408),
        std=(0.2675, 0.2565, 0.2761),
        license=_NO_LICENSE,
        homepage="https://www.cs.toronto.edu/~kriz/cifar.html",
        download_size="161 MiB",
    ),
    "dtd": DatasetInfo(
        builder="dtd:3.0.1",
        train="train+validation",
        num_classes=47,
        num_train=3_760,
        num_test=1_880,
        license="research use",
        homepage="https://www.robots.ox.ac.uk/~vgg/data/dtd/",
        download_size="596 MiB",
        note="Fold 1 of ten, as in the paper, whose code has a head of 57 outputs for these 47 classes.",
    ),
    "flowers": DatasetInfo(
        builder="oxford_flowers102:2.1.1",
        train="train+validation",
        num_classes=102,
        num_train=2_040,
        num_test=6_149,
        metric="mean_per_class_accuracy",
        license=_NO_LICENSE,
        homepage="https://www.robots.ox.ac.uk/~vgg/data/flowers/102/",
        download_size="329 MiB",
        note="The test part is the largest.",
    ),
    "food": DatasetInfo(
        builder="food101:2.0.0",
        test="validation",
        num_classes=101,
        num_train=75_750,
        num_test=25_250,
        license=_NO_LICENSE,
        homepage="https://data.vision.ee.ethz.ch/cvl/datasets_extra/food-101/",
        download_size="4.7 GiB",
        note="TFDS calls the official test part validation.",
    ),
    "pets": DatasetInfo(
        builder="oxford_iiit_pet:4.0.0",
        num_classes=37,
        num_train=3_680,
        num_test=3_669,
        metric="mean_per_class_accuracy",
        license="CC BY-SA 4.0",
        homepage="https://www.robots.ox.ac.uk/~vgg/data/pets/",
        download_size="774 MiB",
    ),
    "cars": DatasetInfo(
        builder="stanford_cars:1.0.0",
        num_classes=196,
        num_train=8_144,
        num_test=8_041,
        license=_NO_LICENSE,
        homepage="https://ai.stanford.edu/~jkrause/cars/car_dataset.html",
        download_size="1.8 GiB",
        by_hand=True,
        note="The authors' addresses, from which TFDS's cars196 downloads, are dead.",
    ),
    "sun397": DatasetInfo(
        builder="sun397_original:1.0.0",
        num_classes=397,
        num_train=19_850,
        num_test=19_850,
        license=_NO_LICENSE,
        homepage="https://vision.princeton.edu/projects/2010/SUN/",
        download_size="36.4 GiB",
        note="Partition 01, in the original files as in the paper. The images of tfds:sun397/standard-part1-120k are "
        "reduced to 120,000 pixels and compressed anew.",
    ),
    # What the backbones are trained on, and what needs no download.
    "imagenet2012": DatasetInfo(
        builder="imagenet2012:5.1.0",
        test="validation",
        num_classes=1_000,
        num_train=1_281_167,
        num_test=50_000,
        augmentation="imagenet",
        mean=_IMAGENET_MEAN,
        std=_IMAGENET_STD,
        license="non-commercial research only, on registration",
        homepage="https://image-net.org/",
        download_size="144 GiB",
        by_hand=True,
        note="The validation part is the test, as everywhere; the labels of the test part are not public.",
    ),
    "fashion_mnist": DatasetInfo(
        builder="fashion_mnist:3.0.1",
        num_classes=10,
        num_train=60_000,
        num_test=10_000,
        image_size=28,
        resize_size=28,
        augmentation="shift_flip",
        mean=(0.286,) * 3,
        std=(0.353,) * 3,
        license="MIT",
        homepage="https://github.com/zalandoresearch/fashion-mnist",
        download_size="29 MiB",
    ),
    "digits": DatasetInfo(
        builder="digits:1.0.0",
        num_classes=10,
        num_train=1_000,
        num_test=797,
        image_size=16,
        resize_size=16,
        augmentation="shift",
        mean=(0.307,) * 3,
        std=(0.376,) * 3,
        license="CC BY 4.0",
        homepage="https://archive.ics.uci.edu/dataset/80",
        note="Comes with scikit-learn.",
    ),
}

FOLDER_PREFIX, TFDS_PREFIX = "folder:", "tfds:"


def is_row(name: str) -> bool:
    """Whether the table has a row of this name; other names are `tfds:` and `folder:` data sets."""
    return name in DATASETS


def dataset_info(name: str) -> DatasetInfo:
    """The row of `name`; for `tfds:NAME[/config][:version]` and `folder:/path` one with the paper's recipe.

    Raises:
        UserError: any other name; lists the valid ones.
    """
    if is_row(name):
        return DATASETS[name]
    for prefix in (FOLDER_PREFIX, TFDS_PREFIX):
        if name.startswith(prefix) and name != prefix:
            return DatasetInfo(builder=name.removeprefix(TFDS_PREFIX) if prefix == TFDS_PREFIX else "")
    raise unknown_name("dataset", name, [*DATASETS, "tfds:NAME", "folder:/path"])
