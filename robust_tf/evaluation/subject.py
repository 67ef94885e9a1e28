"""The subject of an evaluation: a classifier, its task, and the test images that are used."""

import dataclasses
import hashlib
import pathlib
from collections.abc import Callable, Sequence

import keras
import numpy as np
import tensorflow as tf

from robust_tf.config.data import DataConfig
from robust_tf.config.evaluation import DEFAULT_BATCH_SIZE
from robust_tf.data import TaskData, load_task
from robust_tf.errors import UserError, unknown_name
from robust_tf.models import PUBLISHED, fetch_published, load_classifier, weights_sha256
from robust_tf.models.published_results import published_results
from robust_tf.results import FILE_NAME, JobResults, MeasuredAttack


@dataclasses.dataclass(frozen=True, kw_only=True)
class Subject:
    """A classifier and its task.

    Attributes:
        name: Path or published name of the classifier, as the user wrote it.
        classifier: Model that maps images in [0, 1], (batch, size, size, 3), to logits.
        dataset: Name of the data set, see `load_task`.
        classes: Labels of the classes in use, in the order of the logits. Empty if all are used.
        task: Data of the task.
        norm: Norm of the perturbations that the classifier was trained for. None if it is not known or epsilon is 0.
        epsilon: Radius of these perturbations, in [0, 1] pixel units. None if it is not known or 0.
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
        """SHA-256 of the values and shapes of all weights. It does not depend on the file that holds them."""
        return weights_sha256(self.classifier)


@dataclasses.dataclass(frozen=True)
class Images:
    """Test images in the order of their ids.

    Attributes:
        ids: Positions of the images in the test part of the data set, (count,) int64.
        pixels: Images, (count, size, size, 3) float32 in [0, 1].
        labels: Labels, (count,) int32.
    """

    ids: np.ndarray
    pixels: np.ndarray
    labels: np.ndarray

    @property
    def sha256(self) -> str:
        """SHA-256 of ids, pixels and labels. It shows whether two evaluations use the same images."""
        digest = hashlib.sha256()
        for array in (self.ids, self.pixels, self.labels):
            digest.update(f"{array.dtype}{array.shape}".encode())
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()


def load_subject(name: str, *, dataset: str = "", classes: Sequence[int] = (), data_dir: str = "") -> Subject:
    """Loads a classifier and the data that it is evaluated on.

    Args:
        name: Path of a `.keras` file, or name of a published model.
        dataset: Name of the data set, see `load_task`. "" uses the data set of the training job, as stated in the
            `results.json` next to the file, or of the published model.
        classes: Labels to keep. If both `dataset` and `classes` are left out, the labels of the training job are kept.
        data_dir: Folder of TFDS. "" uses TFDS's default.

    Raises:
        UserError: If there is no such classifier, if the data set is unknown or cannot be prepared, or if it does not
            have as many classes as the classifier.
    """
    path = pathlib.Path(name)
    if path.suffix != ".keras" and name not in PUBLISHED:
        raise unknown_name(
            "classifier (neither the path of a .keras file nor the name of a published model)", name, PUBLISHED
        )
    classifier = load_classifier(fetch_published(name) if name in PUBLISHED else path)
    job = job_of(path, name)
    job.check_image_size(classifier.input_shape[1], path)
    if dataset:
        kept = tuple(classes)
    elif job.dataset:
        dataset, kept = job.dataset, tuple(classes or job.classes)
    else:
        raise UserError(
            f"The data set of {name} is not known, because there is no {FILE_NAME} next to it. Received: no --dataset. "
            "Add --dataset=NAME."
        )
    same_data = dataset == job.dataset
    task = load_task(
        DataConfig(
            dataset=dataset,
            classes=kept,
            image_size=classifier.input_shape[1] or job.image_size,
            downscale=job.downscale,  # the classifier was trained on such images, and needs them for any data set
            exif=job.exif,
            alpha_background=job.alpha_background,
            # With another seed, some of the images that it was trained on would be test images.
            split_seed=job.split_seed if same_data else 0,
            skip_bad_images=same_data and job.skip_bad_images,
            data_dir=data_dir,
        ),
        batch_size=DEFAULT_BATCH_SIZE,  # of the training batches, which an evaluation does not use
    )
    if same_data and job.resize_size is not None:
        preprocessing = dataclasses.replace(task.class_preprocessing, resize_size=job.resize_size)
        task = dataclasses.replace(task, preprocessing=preprocessing)
    attack = job.robust_accuracy_attack or MeasuredAttack()
    logits = classifier.output_shape[-1]
    if logits != len(task.class_names):
        raise UserError(
            f"The data set must have as many classes as the classifier has logits. Received: {name} with {logits} "
            f"logits for {len(task.class_names)} classes of {dataset}. Choose another --dataset or other --classes."
        )
    return Subject(
        name=name,
        classifier=classifier,
        dataset=dataset,
        classes=kept,
        task=task,
        norm=attack.norm,
        epsilon=attack.epsilon,
    )


def draw_images(task: TaskData, *, count: int | None, seed: int) -> Images:
    """Draws test images at random.

    Args:
        task: Data of the task.
        count: Number of images. None returns all.
        seed: Seed for the choice.

    Raises:
        UserError: If the test part has fewer images.
    """
    if count is not None and count > task.num_test:
        raise UserError(
            f"--num_images must be at most the number of test images. Received: {count}; there are {task.num_test}. "
            "Use --num_images=0 for all of them."
        )
    chosen = chosen_positions(task.num_test, count, seed)
    with task.broken_images_named():
        return chosen_images(task.test_examples.in_order(), chosen, task.class_preprocessing.for_evaluation)


def chosen_positions(total: int, count: int | None, seed: int) -> np.ndarray:
    """Returns a mask that is True at `count` random positions.

    Args:
        total: Number of positions.
        count: Number of positions to choose. None chooses all.
        seed: Seed for the choice.

    Returns:
        (total,) bool.
    """
    chosen = np.zeros(total, bool)
    chosen[np.random.default_rng(seed).permutation(total)[:count]] = True
    return chosen


def chosen_images(records: tf.data.Dataset, chosen: np.ndarray, preprocess: Callable[[tf.Tensor], tf.Tensor]) -> Images:
    """Returns the images at the chosen positions, in the order of the records.

    Args:
        records: Dataset of (index, encoded image, label).
        chosen: Whether to return each record, (count,) bool.
        preprocess: Function from an encoded image to pixels.
    """
    kept = tf.constant(chosen)

    def transform(index: tf.Tensor, encoded: tf.Tensor, label: tf.Tensor) -> tuple[tf.Tensor, ...]:
        return index, preprocess(encoded), tf.cast(label, tf.int32)

    records = records.enumerate().filter(lambda position, _: tf.gather(kept, position)).map(lambda _, record: record)
    batches = records.map(transform, num_parallel_calls=tf.data.AUTOTUNE).batch(256).as_numpy_iterator()
    ids, pixels, labels = zip(*batches, strict=True)
    return Images(np.concatenate(ids), np.concatenate(pixels), np.concatenate(labels))


def short_names(names: Sequence[str]) -> list[str]:
    """Returns short and distinct names of classifiers for tables and pictures.

    The short name of a job's classifier.keras is the name of its folder. For any other file it is the name of the file,
    and for a published model its name.

    Args:
        names: Paths or published names of the classifiers.
    """
    paths = [pathlib.Path(name) for name in names]
    short = [path.parent.name if path.stem == "classifier" and path.parent.name else path.stem for path in paths]
    return short if len(set(short)) == len(short) else [f"{name} ({number})" for number, name in enumerate(short, 1)]


def job_of(path: pathlib.Path, name: str) -> JobResults:
    """Returns the results of the job that trained a classifier, as far as they are known.

    Args:
        path: File of the classifier.
        name: The classifier as the user wrote it, which may be the name of a published model.
    """
    if name in PUBLISHED:
        return published_results(name)
    return JobResults.read(path.parent / FILE_NAME) or JobResults()
