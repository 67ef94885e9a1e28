"""Checks whether a data set is prepared and has no faults, and says what to do if not."""

import collections
import dataclasses
import hashlib
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import tensorflow as tf
import tensorflow_datasets as tfds
from etils import epath

from robust_tf.config.data import AlphaBackground
from robust_tf.data.boxes.check import box_facts
from robust_tf.data.boxes.open_boxes import open_boxes
from robust_tf.data.datasets import FOLDER_PREFIX, TFDS_PREFIX, DatasetInfo, dataset_info
from robust_tf.data.masks.check import mask_facts
from robust_tf.data.masks.open_masks import open_masks
from robust_tf.data.open_dataset import open_dataset
from robust_tf.data.orientation import jpeg_orientation
from robust_tf.data.records import LabeledImages, Part, check_classes_present, check_labels, few
from robust_tf.data.tfds_preparation import builder_of, ways_to_prepare
from robust_tf.data.transforms import Decoding, decode
from robust_tf.errors import UserError, unknown_name

_REPAIR = "Convert, repair or remove them, or train with --skip_bad_images."


@dataclasses.dataclass(frozen=True)
class CheckResult:
    """The result of checking a data set.

    Attributes:
        name: Name of the data set.
        state: "ready", "not prepared", or "faulty" if the data set exists but has a fault.
        facts: Lines about the folder, the size, the number of images and the license.
        advice: Lines that say what is wrong and what to do.
        size: Size on the disk or of the download. Empty if it is not known.
    """

    name: str
    state: str
    facts: tuple[str, ...]
    advice: tuple[str, ...] = ()
    size: str = ""


def check_dataset(
    name: str,
    data_dir: epath.Path | pathlib.Path | None = None,
    *,
    thorough: bool = True,
    task_type: str = "classification",
) -> CheckResult:
    """Checks a data set without downloading or changing anything.

    Args:
        name: Key of `DATASETS`, `tfds:NAME[/config][:version]` or `folder:/path`.
        data_dir: Folder of TFDS. None uses TFDS's default.
        thorough: Whether to read the whole data set, instead of comparing only the files and the numbers of images.
            This checks that every class has images in both parts. For a folder, it also checks that every image can be
            decoded and that no image is in both parts, and counts the images that are rotated or transparent.
        task_type: Task that the data set is for: "classification", "detection" or "segmentation". For the last two, the
            boxes or masks are counted too.

    Raises:
        UserError: If the name or the type of the task is unknown.
    """
    if task_type != "classification":
        return _check_annotated(name, data_dir, task_type, thorough=thorough)
    if name.startswith(FOLDER_PREFIX) and name != FOLDER_PREFIX:
        return _check_folder(name, thorough=thorough)
    info, builder = dataset_info(name), builder_of(name, data_dir)
    missing = _not_there(name, info, builder)
    if missing is not None:
        return missing
    try:
        images = open_dataset(name, data_dir)
    except UserError as error:
        return CheckResult(name, "faulty", (f"in {builder.data_path}",), (str(error),))
    size = _size(images.num_bytes)
    facts = [f"in {builder.data_path}, {size}", _counts(images), *_known_facts(info)[1:], *images.notes]
    faults = [*_differences(images, info), *(_label_faults(images, name) if thorough else ())]
    return CheckResult(name, "faulty" if faults else "ready", tuple(facts), tuple(faults), size)


def _not_there(name: str, info: DatasetInfo, builder: tfds.core.DatasetBuilder) -> CheckResult | None:
    """Returns the result for a data set of TFDS that is not prepared or lacks files, and None for any other."""
    if not builder.is_prepared():
        advice = ways_to_prepare(name, builder)
        size = f"download: {info.download_size}" if info.download_size else ""
        return CheckResult(name, "not prepared", tuple(_known_facts(info)), advice, size)
    faults = _missing_files(builder)
    if faults:
        advice = (*faults, f"Delete {builder.data_path}.", *ways_to_prepare(name, builder))
        return CheckResult(name, "faulty", (f"in {builder.data_path}",), advice)
    return None


@dataclasses.dataclass(frozen=True)
class _Annotations:
    """How a data set with annotations is opened, and how its annotations are described in facts and faults."""

    open: Callable[[str, epath.Path | pathlib.Path | None], Any]
    describe: Callable[[Any], tuple[list[str], list[str]]]


_ANNOTATIONS = {
    "detection": _Annotations(open_boxes, box_facts),
    "segmentation": _Annotations(open_masks, mask_facts),
}


def _check_annotated(
    name: str, data_dir: epath.Path | pathlib.Path | None, task_type: str, *, thorough: bool
) -> CheckResult:
    """Checks a data set for detection or segmentation."""
    if task_type not in _ANNOTATIONS:
        raise unknown_name("task type", task_type, ["classification", *_ANNOTATIONS])
    annotations = _ANNOTATIONS[task_type]
    facts = []
    if name.startswith(TFDS_PREFIX) and name != TFDS_PREFIX:
        builder = builder_of(name, data_dir)
        missing = _not_there(name, dataset_info(name), builder)
        if missing is not None:
            # The command that prepares the data set also needs the type of the task.
            flags = f"--task_type={task_type} --prepare="
            return dataclasses.replace(
                missing, advice=tuple(line.replace("--prepare=", flags) for line in missing.advice)
            )
        facts.append(f"in {builder.data_path}")
    try:
        images = annotations.open(name, data_dir)
        counts = _counts(images)
        facts += [_size(images.num_bytes), counts.replace("1 classes", "1 class") if counts[:2] == "1 " else counts]
        described, faults = annotations.describe(images) if thorough else ([], [])
        facts += [*described, *images.notes]
    except (UserError, OSError) as error:
        return CheckResult(name, "faulty", tuple(facts), (str(error),))
    except tf.errors.OpError as error:  # a file is cut off or damaged
        advice = f"The data set cannot be read: {error.message}. Delete the folder and prepare the data set again."
        return CheckResult(name, "faulty", tuple(facts), (advice,))
    if thorough and name.startswith(FOLDER_PREFIX):
        looks = {where: list(_looks(part)) for where, part in (("train", images.train), ("test", images.test))}
        broken = [look.name for part in looks.values() for look in part if not look.decodable]
        faults += [
            *_few(broken, "that cannot be decoded", "Convert, repair or remove them."),
            *_in_both_parts(looks["train"], looks["test"]),
        ]
        facts += _peculiarities([look for part in looks.values() for look in part])
    return CheckResult(name, "faulty" if faults else "ready", tuple(facts), tuple(faults), _size(images.num_bytes))


def _check_folder(name: str, *, thorough: bool) -> CheckResult:
    try:
        images = open_dataset(name, skip_bad_images=True)  # to find all bad images, not only the first
    except (UserError, OSError) as error:
        return CheckResult(name, "faulty", (), (str(error),))
    faults = [*_label_faults(images, name)]  # cheap for a folder, whose labels are names of folders
    faults += _few(images.bad_images, "that cannot be read", _REPAIR)
    facts = [_size(images.num_bytes), _counts(images), *map(str, images.left_out)]
    if thorough:
        looks = {where: list(_looks(part)) for where, part in (("train", images.train), ("test", images.test))}
        broken = [look.name for part in looks.values() for look in part if not look.decodable]
        faults += [*_few(broken, "that cannot be decoded", _REPAIR), *_in_both_parts(looks["train"], looks["test"])]
        facts += _peculiarities([look for part in looks.values() for look in part])
    return CheckResult(name, "faulty" if faults else "ready", tuple(facts), tuple(faults), facts[0])


@dataclasses.dataclass(frozen=True)
class _Look:
    """What is known about one image: whether it can be decoded, and whether a flag of a job affects it."""

    name: str
    digest: bytes
    decodable: bool
    rotated: bool = False
    transparent: bool = False


def _looks(part: Part) -> Iterator[_Look]:
    """Looks at every image of a folder. A file that was deleted in the meantime counts as not decodable."""
    for index in range(part.num_examples):
        name, encoded = part.name(index), b""
        try:
            encoded = part.record(tf.constant(index))[1].numpy()  # type: ignore[attr-defined]
            decode(encoded)
        except tf.errors.OpError:
            yield _Look(name, hashlib.sha256(encoded).digest(), decodable=False)
            continue
        # Transparent pixels are those that take the color of the background.
        backgrounds: tuple[AlphaBackground, ...] = ("white", "black")
        white, black = (decode(encoded, Decoding(alpha_background=color)) for color in backgrounds)
        rotated = int(jpeg_orientation(tf.constant(encoded))) != 1
        transparent = bool(tf.reduce_any(white != black))
        yield _Look(name, hashlib.sha256(encoded).digest(), True, rotated, transparent)


def _peculiarities(looks: Sequence[_Look]) -> list[str]:
    """Returns lines about images that have no fault, but that a job may not use in the way that people expect."""
    without_suffix = collections.defaultdict(list)
    for look in looks:
        without_suffix[str(pathlib.PurePath(look.name).with_suffix("")).casefold()].append(look.name)
    namesakes = [" = ".join(names) for names in without_suffix.values() if len(names) > 1]
    return [
        *_few(
            [look.name for look in looks if look.rotated],
            "that are rotated or mirrored (EXIF), and are used as they are stored",
            "--exif=apply rotates and mirrors them.",
        ),
        *_few(
            [look.name for look in looks if look.transparent],
            "with transparent pixels, where the network sees the colors that are stored",
            "--alpha_background=white or black puts the images on a background.",
        ),
        *_few(namesakes, "whose names differ only in the suffix", "They count as different images."),
    ]


def _known_facts(info: DatasetInfo) -> list[str]:
    """Returns lines from the table. The first one has the numbers of classes and images."""
    counts = [f"{info.num_classes:,} classes"] if info.num_classes else []
    if info.num_train and info.num_test:
        counts.append(f"{info.num_train:,} training and {info.num_test:,} test images")
    lines = [", ".join(counts), f"license: {info.license}; {info.homepage}" if info.license else "", info.note]
    return [lines[0], *(line for line in lines[1:] if line)]


def _counts(images: LabeledImages) -> str:
    own = f" ({int(images.validation.sum()):,} of them validation)" if images.validation is not None else ""
    return (
        f"{len(images.class_names):,} classes, {images.train.num_examples:,} training{own} and "
        f"{images.test.num_examples:,} test images"
    )


def _differences(images: LabeledImages, info: DatasetInfo) -> Iterator[str]:
    """Yields a line for each number that differs from the row of the table."""
    for what, expected, received in (
        ("classes", info.num_classes, len(images.class_names)),
        ("training images", info.num_train, images.train.num_examples),
        ("test images", info.num_test, images.test.num_examples),
    ):
        if expected is not None and received != expected:
            yield (
                f"There must be {expected:,} {what}. Received: {received:,}. Delete the folder and prepare the "
                "data set again."
            )


def _missing_files(builder: tfds.core.DatasetBuilder) -> list[str]:
    paths = [epath.Path(path) for split in builder.info.splits.values() for path in split.filepaths]
    missing = [str(path) for path in paths if not path.is_file()]
    return [f"Files that are missing ({len(missing)} of {len(paths)}): {few(missing)}."] if missing else []


def _label_faults(images: LabeledImages, name: str) -> Iterator[str]:
    for part, where in ((images.train, "training"), (images.test, "test")):
        try:
            labels = part.labels()
            check_labels(labels, part, images.class_names, name=name)
            everything = range(len(images.class_names))
            check_classes_present(labels, everything, images.class_names, where=f"the {where} part of {name}")
        except UserError as error:
            yield str(error)
        except tf.errors.OpError as error:  # a file is cut off or damaged
            yield f"The {where} part cannot be read: {error.message}. Delete the folder and prepare the data set again."


def _in_both_parts(train: Sequence[_Look], test: Sequence[_Look]) -> list[str]:
    """Returns a line about the test images whose bytes are equal to those of a training image."""
    of_digest = {look.digest: look.name for look in reversed(train)}
    pairs = [f"{look.name} = {of_digest[look.digest]}" for look in test if look.digest in of_digest]
    return _few(pairs, "of the test part that are also in the training part", "The accuracy would be too high.")


def _few(names: Sequence[str], kind: str, advice: str) -> list[str]:
    """Returns a list with one line about the images of a kind, or an empty list if there are no such images."""
    return [f"Images {kind} ({len(names)}): {few(names)}. {advice}"] if names else []


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.1f} MiB"
