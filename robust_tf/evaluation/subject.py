"""What is evaluated: a classifier, the task it was made for, and the test images that are looked at."""

import dataclasses
import hashlib
import pathlib
from collections.abc import Callable, Sequence

import keras
import numpy as np
import tensorflow as tf

from robust_tf.config.data import DataConfig
from robust_tf.data import TaskData, load_task
from robust_tf.errors import UserError, unknown_name
from robust_tf.models import PUBLISHED, fetch_published, load_classifier
from robust_tf.results import FILE_NAME, JobRecord, read_job_record

_PUBLISHED_DATASETS = {"imagenet": "imagenet2012", "fashion_mnist": "fashion_mnist"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Subject:
    """A classifier and its task.

    Attributes:
        name: as the user wrote it.
        classifier: [0, 1] images (batch, size, size, 3) to logits.
        dataset: a row of DATASETS.
        classes: labels that were kept, in the order of the logits; empty: all.
        norm, epsilon: of the perturbations that it was made for, where that is known and not 0.
    """

    name: str
    classifier: keras.Model
    dataset: str
    classes: tuple[int, ...]
    task: TaskData
    norm: str | None
    epsilon: float | None

    @property
    def weights_sha256(self) -> str:
        """Of the values and shapes of all weights, in order: the same for the same weights in another file."""
        digest = hashlib.sha256()
        for weight in self.classifier.get_weights():
            digest.update(f"{weight.dtype}{weight.shape}".encode())
            digest.update(np.ascontiguousarray(weight).tobytes())
        return digest.hexdigest()


@dataclasses.dataclass(frozen=True)
class Images:
    """Test images in the order of their ids.

    Attributes:
        ids: (count,) int64, positions in the test split of the data set as TFDS stores it.
        pixels: (count, size, size, 3) float32 in [0, 1].
        labels: (count,) int32.
    """

    ids: np.ndarray
    pixels: np.ndarray
    labels: np.ndarray

    @property
    def sha256(self) -> str:
        """Of ids, pixels and labels: whether two evaluations look at the same."""
        digest = hashlib.sha256()
        for array in (self.ids, self.pixels, self.labels):
            digest.update(f"{array.dtype}{array.shape}".encode())
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()


def load_subject(
    name: str, *, dataset: str = "", classes: Sequence[int] = (), data_dir: str = "", batch_size: int = 128
) -> Subject:
    """A classifier by path or published name, with the data that it is evaluated on.

    Args:
        name: path of a `.keras` file, or the name of a published model.
        dataset: "" takes that of the job that trained it (`results.json` beside the file) or of the published model.
        classes: labels to keep; with `dataset` left out, those of its job.
        data_dir: TFDS folder; "" takes TFDS's default.
        batch_size: of the test batches.

    Raises:
        UserError: no such classifier, a data set that isn't known or prepared, or one of another number of classes.
    """
    path = pathlib.Path(name)
    if path.suffix != ".keras" and name not in PUBLISHED:
        raise unknown_name(
            "classifier (neither the path of a .keras file nor the name of a published model)", name, PUBLISHED
        )
    classifier = load_classifier(fetch_published(name) if name in PUBLISHED else path)
    job = _job_of(path, name)
    job.check_image_size(classifier.input_shape[1], path)
    if dataset:
        kept = tuple(classes)
    elif job.dataset:
        dataset, kept = job.dataset, tuple(classes or job.classes)
    else:
        raise UserError(f"No {FILE_NAME} beside {name} tells its data set. Received: no --dataset. Add it.")
    same_data = dataset == job.dataset
    task = load_task(
        DataConfig(
            dataset=dataset,
            classes=kept,
            image_size=classifier.input_shape[1] or job.image_size,
            downscale=job.downscale,  # the classifier was made for such images, whatever the data
            exif=job.exif,
            alpha_background=job.alpha_background,
            split_seed=job.split_seed if same_data else 0,  # or some of the training images would be among the others
            skip_bad_images=same_data and job.skip_bad_images,
            data_dir=data_dir,
        ),
        batch_size=batch_size,
    )
    if same_data and job.resize_size is not None:
        preprocessing = dataclasses.replace(task.preprocessing, resize_size=job.resize_size)
        task = dataclasses.replace(task, preprocessing=preprocessing)
    logits = classifier.output_shape[-1]
    if logits != len(task.class_names):
        raise UserError(
            f"The labels of the data must be those of the classifier. Received: {name} with {logits} logits for "
            f"{len(task.class_names)} classes of {dataset}. Choose another --dataset, or --classes."
        )
    return Subject(
        name=name,
        classifier=classifier,
        dataset=dataset,
        classes=kept,
        task=task,
        norm=job.norm,
        epsilon=job.epsilon,
    )


def draw_images(task: TaskData, *, count: int | None, seed: int) -> Images:
    """`count` test images, the same for the same seed; None takes all.

    Raises:
        UserError: more images than the test part has.
    """
    if count is not None and count > task.num_test:
        raise UserError(
            f"--num_images is more than the test part has. Received: {count}; it has {task.num_test}. Use "
            "--num_images=0 for all."
        )
    chosen = chosen_positions(task.num_test, count, seed)
    with task.broken_images_named():
        return chosen_images(task.test_examples.in_order(), chosen, task.preprocessing.for_evaluation)


def chosen_positions(total: int, count: int | None, seed: int) -> np.ndarray:
    """(total,) bool, true for `count` of them, the same for the same seed."""
    chosen = np.zeros(total, bool)
    chosen[np.random.default_rng(seed).permutation(total)[:count]] = True
    return chosen


def chosen_images(records: tf.data.Dataset, chosen: np.ndarray, preprocess: Callable[[tf.Tensor], tf.Tensor]) -> Images:
    """The images at the chosen positions of (index, encoded image, label) records, in their order."""
    kept = tf.constant(chosen)

    def transform(index: tf.Tensor, encoded: tf.Tensor, label: tf.Tensor) -> tuple[tf.Tensor, ...]:
        return index, preprocess(encoded), tf.cast(label, tf.int32)

    records = records.enumerate().filter(lambda position, _: tf.gather(kept, position)).map(lambda _, record: record)
    batches = records.map(transform, num_parallel_calls=tf.data.AUTOTUNE).batch(256).as_numpy_iterator()
    ids, pixels, labels = zip(*batches, strict=True)
    return Images(np.concatenate(ids), np.concatenate(pixels), np.concatenate(labels))


def short_names(names: Sequence[str]) -> list[str]:
    """What classifiers are called in tables and pictures: short, and different.

    That is the folder of a job's classifier.keras, the name of any other file, or the name of a published model.
    """
    paths = [pathlib.Path(name) for name in names]
    short = [path.parent.name if path.stem == "classifier" and path.parent.name else path.stem for path in paths]
    return short if len(set(short)) == len(short) else [f"{name} ({number})" for number, name in enumerate(short, 1)]


def _job_of(path: pathlib.Path, name: str) -> JobRecord:
    """What is known about how a classifier was made."""
    if name not in PUBLISHED:
        return read_job_record(path.parent / FILE_NAME)
    model = PUBLISHED[name]
    threat_model = (model.norm, model.epsilon) if model.epsilon else (None, None)
    return JobRecord(dataset=_PUBLISHED_DATASETS[model.dataset], norm=threat_model[0], epsilon=threat_model[1])
