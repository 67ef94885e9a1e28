"""The table of data sets that have a name: what each one is, which of its splits are used, and where it comes from.

"The paper" is Salman et al. 2020 (arXiv 2007.08489), with its code in microsoft/robust-models-transfer.

To add a data set:

1. If TensorFlow Datasets has it with the splits that you want, add a row to `DATASETS` below. Its `builder` is the name
   in TFDS with the version, for example "oxford_iiit_pet:4.0.0".
2. If not, write a builder first: copy the most similar file of `robust_tf/data/builders/` (`aircraft.py` downloads an
   archive, `cars.py` reads files that the user has to fetch) and list the class in `builders/__init__.py`. Test it in
   `tests/data/test_builders.py`, on a small archive with the layout of the real one. Then add the row.
3. Run `python -m robust_tf.data --prepare=NAME`, which downloads and prepares the data set, and
   `python -m robust_tf.data --check NAME`, which compares it with the row. `tests/data/test_datasets.py` checks every
   row; add the new name to the lists there.

To use a data set only once, you need no row: `tfds:NAME` stands for any image classification data set of TFDS, and
`folder:/path` for any folder of images.
"""

import dataclasses

from robust_tf.data.augmentations import AUGMENTATIONS
from robust_tf.errors import unknown_name

_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_RAW_MEAN, _RAW_STD = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
_NO_LICENSE = "not stated; research use"


@dataclasses.dataclass(frozen=True, kw_only=True)
class DatasetInfo:
    """One row of `DATASETS`. The defaults are the transfer recipe of the paper.

    Attributes:
        builder: Name in TFDS or of a builder in `robust_tf.data.builders`, with config and version. Empty for a folder
            of images.
        train: TFDS split expression of the training images, for example "train+validation".
        test: TFDS split expression of the test images.
        num_classes: Number of classes. None if it is not fixed.
        num_train: Number of images in `train`. None if it is not fixed.
        num_test: Number of images in `test`. None if it is not fixed.
        metric: Metric that the paper reports: "accuracy" or "mean_per_class_accuracy".
        image_size: Height and width of the training images, in pixels.
        resize_size: Length to which evaluation resizes the shorter side before the center crop, in pixels.
        augmentation: Key of `AUGMENTATIONS` for the training images.
        mean: Mean of each channel, subtracted from pixels in [0, 1]. The paper's code subtracts 0 in most transfer
            tasks.
        std: Standard deviation of each channel, by which the difference is divided. The paper's code divides by 1 in
            most transfer tasks.
        license: License of the images.
        homepage: Address of the data set's home page.
        download_size: Size of the download for people to read, for example "4.7 GiB". Empty if nothing is downloaded.
        by_hand: Whether the user has to fetch the files, because no program can download them.
        note: What users should know, for example a difference from the paper.

    Example:
        >>> from robust_tf.data import DatasetInfo
        >>> flowers = DatasetInfo(builder="tf_flowers:3.0.1", train="train[:80%]", test="train[80%:]", num_classes=5)
        >>> flowers.image_size, flowers.resize_size, flowers.augmentation
        (224, 256, 'random_resized_crop')
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


# Splits, metrics and normalization are from Salman et al. 2020, appendix A.2, and the paper's code. Download sizes are
# from TFDS's checksum files, or from the publishers' pages for the builders of this package.
DATASETS = {
    # The twelve transfer tasks of the paper.
    "aircraft": DatasetInfo(
        builder="fgvc_aircraft:1.0.0",
        train="train+validation",
        num_classes=100,
        num_train=6_667,
        num_test=3_333,
        license="non-commercial research only",
        homepage="https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft/",
        download_size="2.6 GiB",
        note="The labels are variants. The copyright banner at the bottom is not cut off, as in the paper's code.",
    ),
    "birdsnap": DatasetInfo(
        builder="birdsnap/fifth:1.0.0",
        num_classes=500,
        license="the photographers'; research use",
        homepage="http://thomasberg.org/",
        download_size="49,829 photographs, each from its own web page",
        by_hand=True,
        note="Not the paper's split. The paper used the photographs that were online at the time, 32,677 for training "
        "and 8,171 for testing, and does not list them. Here, too, a fifth of the available photographs is the test "
        "part; tfds:birdsnap/official uses the authors' test list instead.",
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
        note="Images 1 to 30 of each class are the training part, and the background class is left out. TFDS's "
        "caltech101 has 102 labels and chooses the 30 images at random.",
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
        note="Images 1 to 60 of each class are the training part. Clutter counts as a class, as in the paper.",
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
        note="Fold 1 of 10, as in the paper. The paper's code uses a head of 57 outputs for these 47 classes.",
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
        note="The test part is larger than the training part.",
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
        note="TFDS calls the official test part 'validation'.",
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
        note="TFDS's cars196 cannot be used: it downloads from the authors' addresses, which no longer exist.",
    ),
    "sun397": DatasetInfo(
        builder="sun397_original:1.0.0",
        num_classes=397,
        num_train=19_850,
        num_test=19_850,
        license=_NO_LICENSE,
        homepage="https://vision.princeton.edu/projects/2010/SUN/",
        download_size="36.4 GiB",
        note="Partition 01 with the original files, as in the paper. TFDS's sun397/standard-part1-120k has the images "
        "reduced to 120,000 pixels and compressed again.",
    ),
    # Data sets that backbones are trained on, and one that needs no download.
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
        note="The validation part is used as the test part, because the labels of the test part are not public.",
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
        note="Included in scikit-learn.",
    ),
}

FOLDER_PREFIX, TFDS_PREFIX = "folder:", "tfds:"


def is_row(name: str) -> bool:
    """Returns whether `DATASETS` has a row of this name. All other valid names begin with `tfds:` or `folder:`."""
    return name in DATASETS


def dataset_info(name: str) -> DatasetInfo:
    """Returns the row of a data set, or one with the paper's transfer recipe if the data set has no row.

    Args:
        name: Key of `DATASETS`, `tfds:NAME[/config][:version]` or `folder:/path`.

    Raises:
        UserError: If the name is none of these. The message lists the valid names.

    Example:
        >>> from robust_tf.data import dataset_info
        >>> dataset_info("pets").num_classes
        37
        >>> dataset_info("tfds:eurosat").builder
        'eurosat'
    """
    if is_row(name):
        return DATASETS[name]
    for prefix in (FOLDER_PREFIX, TFDS_PREFIX):
        if name.startswith(prefix) and name != prefix:
            return DatasetInfo(builder=name.removeprefix(TFDS_PREFIX) if prefix == TFDS_PREFIX else "")
    raise unknown_name("dataset", name, [*DATASETS, "tfds:NAME", "folder:/path"])
