"""Is a data set there, and is it what it should be? If not, what to do."""

import collections
import dataclasses
import hashlib
import pathlib
from collections.abc import Iterator, Sequence

import tensorflow as tf
import tensorflow_datasets as tfds
from etils import epath

from robust_tf.data.datasets import FOLDER_PREFIX, DatasetInfo, dataset_info
from robust_tf.data.opening import open_dataset
from robust_tf.data.preparing import builder_of, ways_to_prepare
from robust_tf.data.records import LabelledImages, Part, check_classes_present, check_labels
from robust_tf.data.transforms import decode
from robust_tf.errors import UserError

# So many faults of one kind are named, the others counted.
_NAMED = 3


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """What was found.

    Attributes:
        name: of the data set.
        state: "ready"; "not prepared"; or "faulty", if something is there but not in order.
        facts: one line each: where, how large, how many, licence.
        advice: one line each: what is wrong, and what to do.
    """

    name: str
    state: str
    facts: tuple[str, ...]
    advice: tuple[str, ...] = ()


def diagnose(name: str, data_dir: epath.Path | pathlib.Path | None = None, *, thorough: bool = True) -> Diagnosis:
    """Examines a row of DATASETS, `tfds:NAME` or `folder:/path`; downloads and changes nothing.

    Of a prepared TFDS data set the files and counts are checked; `thorough` also reads all of it: whether every class
    has images in both parts, and of a folder whether each image can be decoded and none is in both parts.

    Raises:
        UserError: no such name.
    """
    if name.startswith(FOLDER_PREFIX):
        return _diagnose_folder(name, thorough=thorough)
    info, builder = dataset_info(name), builder_of(name, data_dir)
    if not builder.is_prepared():
        return Diagnosis(name, "not prepared", tuple(_known_facts(info)), ways_to_prepare(name, builder))
    faults = _missing_files(builder)
    if faults:
        advice = (*faults, f"Delete {builder.data_path}.", *ways_to_prepare(name, builder))
        return Diagnosis(name, "faulty", (f"in {builder.data_path}",), advice)
    try:
        images = open_dataset(name, data_dir)
    except UserError as error:
        return Diagnosis(name, "faulty", (f"in {builder.data_path}",), (str(error),))
    facts = [f"in {builder.data_path}, {_size(images.num_bytes)}", _counts(images), *_known_facts(info)[1:]]
    faults = [*_differences(images, info), *(_label_faults(images, name) if thorough else ())]
    return Diagnosis(name, "faulty" if faults else "ready", tuple(facts), tuple(faults))


def _diagnose_folder(name: str, *, thorough: bool) -> Diagnosis:
    try:
        images = open_dataset(name)
    except UserError as error:
        return Diagnosis(name, "faulty", (), (str(error),))
    faults = [*_label_faults(images, name)]  # the names of the files say these
    if thorough:
        faults += [*_broken_images(images), *_in_both_parts(images)]
    facts = (_size(images.num_bytes), _counts(images))
    return Diagnosis(name, "faulty" if faults else "ready", facts, tuple(faults))


def _known_facts(info: DatasetInfo) -> list[str]:
    """What the table says; first what there will be once it is prepared."""
    counts = [f"{info.num_classes:,} classes"] if info.num_classes else []
    if info.num_train and info.num_test:
        counts.append(f"{info.num_train:,} training and {info.num_test:,} test images")
    lines = [", ".join(counts), f"licence: {info.licence}; {info.homepage}" if info.licence else "", info.note]
    return [lines[0], *(line for line in lines[1:] if line)]


def _counts(images: LabelledImages) -> str:
    own = f" ({int(images.validation.sum()):,} of them validation)" if images.validation is not None else ""
    return (
        f"{len(images.class_names):,} classes, {images.train.num_examples:,} training{own} and "
        f"{images.test.num_examples:,} test images"
    )


def _differences(images: LabelledImages, info: DatasetInfo) -> Iterator[str]:
    """Counts that are not those of the row."""
    for what, expected, received in (
        ("classes", info.num_classes, len(images.class_names)),
        ("training images", info.num_train, images.train.num_examples),
        ("test images", info.num_test, images.test.num_examples),
    ):
        if expected is not None and received != expected:
            yield f"There must be {expected:,} {what}. Received: {received:,}. Delete the folder and prepare it again."


def _missing_files(builder: tfds.core.DatasetBuilder) -> list[str]:
    paths = [epath.Path(path) for split in builder.info.splits.values() for path in split.filepaths]
    missing = [path for path in paths if not path.is_file()]
    return [f"{len(missing)} of its {len(paths)} files are missing, e.g. {missing[0]}."] if missing else []


def _label_faults(images: LabelledImages, name: str) -> Iterator[str]:
    for part, where in ((images.train, "training"), (images.test, "test")):
        try:
            labels = part.labels()
            check_labels(labels, part, images.class_names, name=name)
            everything = range(len(images.class_names))
            check_classes_present(labels, everything, images.class_names, where=f"the {where} part of {name}")
        except UserError as error:
            yield str(error)
        except tf.errors.OpError as error:  # a file that is cut off or damaged
            yield f"The {where} part cannot be read: {error.message}. Delete the folder and prepare it again."


def _broken_images(images: LabelledImages) -> list[str]:
    broken = [path for part in (images.train, images.test) for path in _undecodable(part)]
    return _few(broken, "cannot be decoded: {}. Repair or remove them, or train with --skip_bad_images.")


def _undecodable(part: Part) -> Iterator[str]:
    for index, encoded, _ in part.records():
        try:
            decode(encoded)
        except tf.errors.InvalidArgumentError:
            yield part.name(int(index))


def _in_both_parts(images: LabelledImages) -> list[str]:
    """Test images that are training images too, byte for byte."""
    of_digest = collections.defaultdict(list)
    for index, encoded, _ in images.train.records().as_numpy_iterator():
        of_digest[hashlib.sha256(encoded).digest()].append(int(index))
    pairs = []
    for index, encoded, _ in images.test.records().as_numpy_iterator():
        same = of_digest.get(hashlib.sha256(encoded).digest())
        if same:
            pairs.append(f"{images.test.name(int(index))} = {images.train.name(same[0])}")
    return _few(pairs, "of the test part are in the training part too: {}. The accuracy would be too high.")


def _few(items: Sequence[str], sentence: str) -> list[str]:
    if not items:
        return []
    more = f" and {len(items) - _NAMED} more" if len(items) > _NAMED else ""
    return [f"{len(items)} images " + sentence.format(", ".join(items[:_NAMED]) + more)]


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.1f} MiB"
