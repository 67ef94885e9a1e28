"""Turns the name of a data set into batches: chooses the examples, orders them and transforms them.

Every batch is (images, labels): float32 in [0, 1] of shape (batch, image_size, image_size, 3), and int32 of shape
(batch,). The order and the augmentation of an epoch depend only on the seed and the number of the epoch, so training
can be resumed at any epoch.
"""

import contextlib
import dataclasses
import functools
import hashlib
from typing import Any, cast

import numpy as np
import tensorflow as tf

from robust_tf.config.data import DataConfig, Mixing
from robust_tf.data.broken_images import broken_images_named, remembered_broken_images
from robust_tf.data.datasets import dataset_info
from robust_tf.data.examples import Examples, fits_in_memory
from robust_tf.data.keras_cv_layers import mix
from robust_tf.data.label_kinds import LABEL_KINDS
from robust_tf.data.preprocessing import ExamplePreprocessing, Preprocessing
from robust_tf.data.selection import checked_classes, part_masks
from robust_tf.errors import UserError, unknown_name
from robust_tf.files import cache_folder
from robust_tf.sharing import shared

# The batch size does not change the results of an evaluation, but small batches take longer.
_SMALLEST_EVALUATION_BATCH = 64

# Decoded validation images up to this size stay in memory.
_MOST_CACHED_BYTES = 64 * 1024**2


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskData:
    """The training, validation and test part of a classification task, as `load_task` returns them.

    `validation` and `test` hold all their images in a fixed order.

    Attributes:
        train_examples: Encoded images of the training part.
        validation_examples: Encoded images of the validation part.
        test_examples: Encoded images of the test part.
        preprocessing: Transforms that turn an encoded image into pixels.
        class_names: Names of the classes in use. A label is a position in this tuple.
        metric: Metric of the task: "accuracy" or "mean_per_class_accuracy".
        batch_size: Number of images in a training batch, over all workers.
        mixing: "none", "mixup" or "cutmix". The last two mix the images of a training batch, whose labels are then
            float32 of shape (batch, classes).
        seed: Seed for the order and the augmentation.
        fingerprint: Text that changes when other images or labels are in use.
        train_fingerprint: Text that changes with the part from which training and validation images are chosen.
        test_fingerprint: Text that changes when other test images or labels are in use.
        skipped: Names of the broken images that were left out.
        notes: Sentences about the data that its users should read.
        worker: Number of this worker, from 0.
        num_workers: Number of workers, each of which prepares an equal share of every training batch.
        drop_remainder: Whether to leave out the last batch of an epoch if it is smaller than the others. Workers that
            share batches need this.
        fill_remainder: Whether to fill up the last batch of an epoch with images from the start of the epoch, so that
            all training batches have one size, for which XLA compiles once. Ignored with `drop_remainder`.

    Example:
        >>> import tempfile
        >>> import tensorflow as tf
        >>> from robust_tf.data import DataConfig, load_task
        >>> image = tf.io.encode_png(tf.zeros((40, 50, 3), tf.uint8))
        >>> with tempfile.TemporaryDirectory() as root:
        ...     for name in ("train/cat/1", "train/cat/2", "train/dog/3", "test/cat/4", "test/dog/5"):
        ...         tf.io.write_file(f"{root}/{name}.png", image)
        ...     task = load_task(DataConfig(dataset=f"folder:{root}", image_size=32), batch_size=4)
        ...     images, labels = next(task.test.as_numpy_iterator())
        >>> task.class_names, task.augmentation, task.metric
        (('cat', 'dog'), 'random_resized_crop', 'accuracy')
        >>> images.shape, labels.tolist()
        ((2, 32, 32, 3), [0, 1])
    """

    train_examples: Examples
    validation_examples: Examples
    test_examples: Examples
    preprocessing: ExamplePreprocessing
    class_names: tuple[str, ...]
    metric: str
    batch_size: int
    mixing: Mixing
    seed: int
    fingerprint: str
    train_fingerprint: str = ""
    test_fingerprint: str = ""
    skipped: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    worker: int = 0
    num_workers: int = 1
    drop_remainder: bool = False
    fill_remainder: bool = False

    @property
    def num_train(self) -> int:
        """Number of training images."""
        return self.train_examples.count

    @property
    def num_validation(self) -> int:
        """Number of validation images."""
        return self.validation_examples.count

    @property
    def num_test(self) -> int:
        """Number of test images."""
        return self.test_examples.count

    @property
    def image_size(self) -> int:
        """Height and width of the images in a batch, in pixels."""
        return self.preprocessing.image_size

    @property
    def class_preprocessing(self) -> Preprocessing:
        """The transforms of a classification task, which those for boxes and masks differ from."""
        return cast(Preprocessing, self.preprocessing)

    @property
    def resize_size(self) -> int:
        """Length to which evaluation resizes the shorter side before the center crop, in pixels."""
        return self.preprocessing.resize_size

    @property
    def augmentation(self) -> str:
        """Key of `AUGMENTATIONS` for the training images."""
        return self.preprocessing.augmentation

    @property
    def steps_per_epoch(self) -> int:
        """Number of training batches in an epoch. It includes a smaller last batch unless `drop_remainder` is true."""
        full, rest = divmod(self.num_train, self.batch_size)
        return full if self.drop_remainder or not rest else full + 1

    def train(self, *, first_epoch: int, epochs: int, first_step: int = 0) -> tf.data.Dataset:
        """Returns the training batches of the epochs `first_epoch` to `epochs - 1` as one dataset.

        Args:
            first_epoch: Number of the first epoch, from 0.
            epochs: Number of epochs in all, so the last epoch has the number `epochs - 1`.
            first_step: Number of the batch with which the first epoch begins. Earlier batches are not decoded.
        """
        seed = self.seed

        def one_epoch(epoch: tf.Tensor) -> tf.data.Dataset:
            # Sets the seed of this function's graph, so that the order does not depend on the global seed. Also,
            # tf.data does not accept a tensor as seed if the global seed is 0.
            tf.random.set_seed(1)
            epoch_seed = tf.random.experimental.stateless_fold_in(tf.constant([seed, 0], tf.int64), epoch)
            order_seed, augmentation_seed = tf.unstack(tf.random.split(epoch_seed, 2))
            records = self.train_examples.shuffled(tf.cast(order_seed[0], tf.int64))
            if self.drop_remainder:
                records = records.take(self.steps_per_epoch * self.batch_size)
            elif self.fill_remainder:
                missing = self.steps_per_epoch * self.batch_size - self.num_train
                # Not `records.repeat()`, because tf.data would fuse it with the shuffling even where no image repeats.
                again = tf.data.Dataset.range(-(-missing // self.num_train)).flat_map(lambda _, once=records: once)
                records = records.concatenate(again.take(missing))
            skipped_steps = tf.where(tf.equal(epoch, first_epoch), tf.constant(first_step, tf.int64), 0)
            records = records.skip(skipped_steps * self.batch_size)
            if self.num_workers > 1:
                # Shards before decoding, so that each worker decodes only its own images. The k-th batches of all
                # workers together have the same images as the k-th batch of a single worker.
                records = records.shard(self.num_workers, self.worker)
            batches = self._augmented(records, augmentation_seed).batch(
                self.batch_size // self.num_workers, drop_remainder=self.fill_remainder
            )
            return batches if self.mixing == "none" else self._mixed(batches, augmentation_seed, skipped_steps)

        return _with_options(tf.data.Dataset.range(first_epoch, epochs).flat_map(one_epoch)).prefetch(2)

    @functools.cached_property
    def validation(self) -> tf.data.Dataset:
        """Batches of the validation part, in a fixed order. A pass must read all of them."""
        batches = self._evaluated(self.validation_examples)
        # For few images it takes longer to start the pipeline than to read them, and every epoch would start it again.
        size = 4 * 3 * self.image_size**2 * self.num_validation
        return batches.cache() if size <= _MOST_CACHED_BYTES else batches

    @functools.cached_property
    def test(self) -> tf.data.Dataset:
        """Batches of the test part, in a fixed order."""
        return self._evaluated(self.test_examples)

    def train_view(self, view: int, first: int = 0) -> tf.data.Dataset:
        """Returns the training images in a fixed order, in batches of the size that evaluation uses.

        Args:
            view: Number of the augmentation: 0 for the transform of evaluation, 1, 2, ... for random augmentations.
            first: Number of the first image.
        """
        if view == 0:
            return self._evaluated(self.train_examples, first)
        # The 1 in the seed makes the augmentations of the views differ from those of the epochs, which have a 0 there.
        seed = tf.random.experimental.stateless_fold_in(tf.constant([self.seed, 1], tf.int64), view)
        return _with_options(
            self._augmented(self.train_examples.in_order().skip(first), seed).batch(self._evaluation_batch)
        )

    def validation_from(self, first: int) -> tf.data.Dataset:
        """Returns the batches of the validation part, beginning with image number `first`."""
        return self._evaluated(self.validation_examples, first)

    def validation_share(self, *, replicas: int) -> tf.data.Dataset:
        """Returns this worker's share of the validation part, in batches for one replica.

        All replicas of all workers get the same number of batches of the same size. Images are repeated to fill the
        last batches.

        Args:
            replicas: Number of replicas of this worker.

        Returns:
            Batches (images, labels, weights). The weights, (batch,) float32, are 0 for repeated images and equal for
            all others, so that every image counts once in a weighted mean over all batches.
        """
        return self._share(self.validation_examples, replicas)

    def test_share(self, *, replicas: int) -> tf.data.Dataset:
        """Returns this worker's share of the test part. See `validation_share`."""
        return self._share(self.test_examples, replicas)

    def test_ids(self, *, replicas: int = 0) -> np.ndarray:
        """Returns the positions of the test images in the test part of the data set.

        Args:
            replicas: Number of replicas of each worker if the test part is read with `test_share`. 0 if it is read
                with `test`.

        Returns:
            (num_test,) int64, in the order of `test`. With `replicas`, in the order in which the steps read the images:
            each step reads one batch for every replica, first for the replicas of the first worker, and so on.
        """
        ids = np.flatnonzero(self.test_examples.mask)
        if not replicas:
            return ids
        batch, padded = self._share_sizes(self.num_test, replicas)
        # The k-th image is the image number k // num_workers of its worker, and the replicas of the worker take turns
        # in reading its batches.
        order = np.arange(padded).reshape(-1, replicas, batch, self.num_workers).transpose(0, 3, 1, 2).ravel()
        return ids[order[order < self.num_test]]

    def preview(self, count: int) -> tuple[np.ndarray, Any]:
        """Returns the first `count` validation images and their labels, the same in every call."""
        images, labels = next(self.validation_from(0).unbatch().batch(count).as_numpy_iterator())
        return images, labels

    def sample(self) -> bytes:
        """Returns the first test image, encoded as in the data set."""
        _, encoded, _ = next(self.test_examples.in_order().as_numpy_iterator())
        return bytes(encoded)

    def broken_images_named(self) -> contextlib.AbstractContextManager[None]:
        """Returns a context in which an image that cannot be decoded raises a UserError with the image's name."""
        return broken_images_named([self.train_examples.part, self.test_examples.part])

    @property
    def _evaluation_batch(self) -> int:
        return max(self.batch_size, _SMALLEST_EVALUATION_BATCH)

    def _evaluated(self, examples: Examples, first: int = 0) -> tf.data.Dataset:
        def transform(_: tf.Tensor, encoded: tf.Tensor, label: tf.Tensor) -> tuple[tf.Tensor, Any]:
            return self.preprocessing.evaluation_example(encoded, label)

        images = examples.in_order().skip(first).map(transform, num_parallel_calls=tf.data.AUTOTUNE)
        return _with_options(images.batch(self._evaluation_batch)).prefetch(2)

    def _share_sizes(self, count: int, replicas: int) -> tuple[int, int]:
        """Returns the batch size of one replica, and the number of images of all replicas including repeated ones."""
        batch_of_replica = -(-self._evaluation_batch // (self.num_workers * replicas))
        batch_of_all = batch_of_replica * self.num_workers * replicas
        return batch_of_replica, -(-count // batch_of_all) * batch_of_all

    def _share(self, examples: Examples, replicas: int) -> tf.data.Dataset:
        batch_of_replica, padded = self._share_sizes(examples.count, replicas)
        records = examples.in_order()
        records = records.concatenate(records.repeat().take(padded - examples.count)).enumerate()

        def transform(
            number: tf.Tensor, record: tuple[tf.Tensor, tf.Tensor, tf.Tensor]
        ) -> tuple[tf.Tensor, Any, tf.Tensor]:
            _, encoded, label = record
            weight = tf.where(number < examples.count, padded / examples.count, 0.0)
            return *self.preprocessing.evaluation_example(encoded, label), tf.cast(weight, tf.float32)

        records = records.shard(self.num_workers, self.worker)
        images = records.map(transform, num_parallel_calls=tf.data.AUTOTUNE)
        return _with_options(images.batch(batch_of_replica, drop_remainder=True)).prefetch(2)

    def _augmented(self, records: tf.data.Dataset, seed: tf.Tensor) -> tf.data.Dataset:
        def transform(index: tf.Tensor, encoded: tf.Tensor, label: tf.Tensor) -> tuple[tf.Tensor, Any]:
            # Each example has its own seed, so the order of parallel calls cannot change the result.
            example_seed = tf.random.experimental.stateless_fold_in(seed, index)
            return self.preprocessing.training_example(encoded, label, example_seed)

        return records.map(transform, num_parallel_calls=tf.data.AUTOTUNE)

    def _mixed(self, batches: tf.data.Dataset, seed: tf.Tensor, first_number: tf.Tensor) -> tf.data.Dataset:
        num_examples, num_classes = len(self.train_examples.mask), len(self.class_names)

        def transform(number: tf.Tensor, batch: tuple[tf.Tensor, tf.Tensor]) -> tuple[tf.Tensor, tf.Tensor]:
            # The number that is folded in is larger than the number of any example, and differs between the workers.
            batch_seed = tf.random.experimental.stateless_fold_in(
                seed, num_examples + number * self.num_workers + self.worker
            )
            return mix(*batch, batch_seed, kind=self.mixing, num_classes=num_classes)

        return batches.enumerate(first_number).map(transform, num_parallel_calls=tf.data.AUTOTUNE)


def load_task(
    data: DataConfig | str,
    *,
    batch_size: int,
    seed: int = 0,
    worker: int = 0,
    num_workers: int = 1,
    drop_remainder: bool = False,
) -> TaskData:
    """Loads a data set as a task with a training, a validation and a test part.

    The data set is downloaded and prepared first if necessary. The validation part is held out of the training split,
    and is the same in every call, whatever the seed.

    Args:
        data: Images to use, and how they are read and augmented. A string stands for `DataConfig(dataset=data)`: a key
            of `DATASETS`, `tfds:NAME[/config][:version]` or `folder:/path`.
        batch_size: Number of images in a training batch, over all workers. Evaluation uses at least 64.
        seed: Seed for the order, the augmentation and the choice of training images.
        worker: Number of this worker, from 0.
        num_workers: Number of workers that train together, each on an equal share of every batch.
        drop_remainder: Whether to leave out the last training batch of an epoch if it is smaller than the others. With
            several workers it is always left out.

    Returns:
        The task, whose images are read when its datasets are iterated over.

    Raises:
        UserError: If the name, a class or the augmentation is unknown, if an argument is out of range, if a part is
            empty, or if the data set cannot be prepared.

    Example:
        >>> import tempfile
        >>> import tensorflow as tf
        >>> from robust_tf.data import DataConfig, load_task
        >>> image = tf.io.encode_png(tf.zeros((40, 50, 3), tf.uint8))
        >>> with tempfile.TemporaryDirectory() as root:
        ...     for number in range(10):
        ...         tf.io.write_file(f"{root}/cat/{number}.png", image)
        ...         tf.io.write_file(f"{root}/dog/{number}.png", image)
        ...     task = load_task(DataConfig(dataset=f"folder:{root}", image_size=32), batch_size=4)
        ...     images, labels = next(task.train(first_epoch=0, epochs=1).as_numpy_iterator())
        >>> task.num_train, task.num_validation, task.num_test
        (14, 2, 4)
        >>> images.shape, labels.shape
        ((4, 32, 32, 3), (4,))
    """
    if isinstance(data, str):
        data = DataConfig(dataset=data)
    name, augmentation, classes = data.dataset, data.augmentation, data.classes or None
    kind, info = LABEL_KINDS[data.task_type], dataset_info(name)
    if augmentation and augmentation not in kind.augmentations:
        raise unknown_name("augmentation", augmentation, kind.augmentations)
    if not 0 <= worker < num_workers or batch_size % num_workers:
        raise UserError(
            "worker must be a number from 0 to num_workers - 1, and batch_size a multiple of num_workers. Received: "
            f"worker={worker}, num_workers={num_workers}, batch_size={batch_size}."
        )
    images = shared(
        ("data set", data.task_type, name, data.data_dir, data.split_seed, data.skip_bad_images),
        lambda: kind.open(data),
    )
    names = images.class_names
    if classes is not None:
        checked_classes(classes, len(names), name)
    folder = cache_folder(data.cache_dir or None)

    broken = {part: np.zeros(0, np.int64) for part in ("train", "test")}
    if data.skip_bad_images:
        for part in broken:
            broken[part] = remembered_broken_images(
                getattr(images, part), f"{images.fingerprint} {part}", folder / "broken_images"
            )
    train_mask, validation_mask, test_mask = part_masks(
        images,
        name,
        broken=broken,
        classes=classes,
        validation_fraction=data.validation_fraction,
        examples_per_class=data.examples_per_class,
        subset=data.subset,
        seed=seed,
    )
    new_labels = None
    if classes is not None:
        new_labels = np.zeros(len(names), np.int32)
        new_labels[list(classes)] = np.arange(len(classes))
    digest = hashlib.sha256(f"{images.fingerprint} {classes}".encode())
    test_digest = digest.copy()
    test_digest.update(test_mask.tobytes())
    for mask in (train_mask, validation_mask, test_mask):
        digest.update(mask.tobytes())
    fingerprint = digest.hexdigest()

    in_memory = data.cache == "memory" or (data.cache == "auto" and fits_in_memory(images.num_bytes))
    examples = functools.partial(
        Examples, new_labels=new_labels, example_bytes=images.num_bytes / (len(train_mask) + len(test_mask))
    )
    file = folder / "records" / f"{fingerprint[:20]}.tfrecord" if data.cache == "disk" else None
    train_examples = examples(part=images.train, mask=train_mask, in_memory=in_memory, file=file)
    train_examples = train_examples.written()

    return TaskData(
        train_examples=train_examples,
        validation_examples=examples(part=images.train, mask=validation_mask, in_memory=in_memory),
        test_examples=examples(part=images.test, mask=test_mask),  # not cached, because it is read only once
        preprocessing=kind.preprocessing(data, images),
        class_names=tuple(names[label] for label in classes or range(len(names))),
        metric=kind.metric or info.metric,
        batch_size=batch_size,
        mixing=data.mixing,
        seed=seed,
        fingerprint=fingerprint,
        train_fingerprint=images.fingerprint,
        test_fingerprint=test_digest.hexdigest(),
        skipped=(
            *images.bad_images,
            *(getattr(images, part).name(int(index)) for part in broken for index in broken[part]),
        ),
        notes=(*images.notes, *map(str, images.left_out)),
        worker=worker,
        num_workers=num_workers,
        drop_remainder=drop_remainder or num_workers > 1,
    )


def _with_options(dataset: tf.data.Dataset) -> tf.data.Dataset:
    options = tf.data.Options()
    # Several images are processed in parallel already. Splitting the work on one image over the cores as well would
    # only cost time.
    options.threading.max_intra_op_parallelism = 1
    return dataset.with_options(options)
