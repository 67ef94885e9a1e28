"""From a data set's name to batches: which examples, in which order, transformed how.

Every batch is (images, labels): (batch, image_size, image_size, 3) float32 in [0, 1] and (batch,) int32. The order and
the augmentation of epoch e are functions of (seed, e) alone, so training can start again at any epoch.
"""

import contextlib
import dataclasses
import functools
import hashlib

import numpy as np
import tensorflow as tf

from robust_tf.config.data import DataConfig, Mixing
from robust_tf.data.augmentations import AUGMENTATIONS
from robust_tf.data.broken_images import broken_images_named, remembered_broken_images
from robust_tf.data.datasets import dataset_info
from robust_tf.data.examples import Examples, fits_in_memory
from robust_tf.data.keras_cv_layers import mix
from robust_tf.data.open_dataset import data_folder, open_dataset
from robust_tf.data.preprocessing import Preprocessing
from robust_tf.data.selection import checked_classes, part_masks
from robust_tf.data.transforms import Decoding
from robust_tf.errors import UserError, unknown_name
from robust_tf.files import cache_folder

# Evaluation makes no use of small batches, which only take longer.
_SMALLEST_EVALUATION_BATCH = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskData:
    """The three parts of a classification task. `validation` and `test` are ordered and complete.

    Attributes:
        train_examples, validation_examples, test_examples: the encoded images of the parts.
        preprocessing: what becomes of them.
        class_names: of the classes in use; labels are positions in it.
        metric: "accuracy" or "mean_per_class_accuracy".
        batch_size: images in a training batch, of all workers together.
        mixing: "none", or what mixes the images of a training batch; labels are then (batch, classes) float32.
        seed: of the order and the augmentation.
        fingerprint: changes when other images or labels are in use.
        skipped: names of the broken images that were left out.
        notes: sentences about the data that whoever uses them has to know.
        worker, num_workers: which share of every training batch is made here.
        drop_remainder: leave out the last batch of an epoch where it is smaller, as those must that share batches.
    """

    train_examples: Examples
    validation_examples: Examples
    test_examples: Examples
    preprocessing: Preprocessing
    class_names: tuple[str, ...]
    metric: str
    batch_size: int
    mixing: Mixing
    seed: int
    fingerprint: str
    skipped: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    worker: int = 0
    num_workers: int = 1
    drop_remainder: bool = False

    @property
    def num_train(self) -> int:
        return self.train_examples.count

    @property
    def num_validation(self) -> int:
        return self.validation_examples.count

    @property
    def num_test(self) -> int:
        return self.test_examples.count

    @property
    def image_size(self) -> int:
        return self.preprocessing.image_size

    @property
    def resize_size(self) -> int:
        return self.preprocessing.resize_size

    @property
    def augmentation(self) -> str:
        return self.preprocessing.augmentation

    @property
    def steps_per_epoch(self) -> int:
        """Training steps that see every example once; the last batch may be smaller, or is left out."""
        full, rest = divmod(self.num_train, self.batch_size)
        return full if self.drop_remainder or not rest else full + 1

    def train(self, *, first_epoch: int, epochs: int, first_step: int = 0) -> tf.data.Dataset:
        """The batches of the epochs first_epoch to epochs - 1, one after the other.

        Args:
            first_epoch, epochs: counted from 0; the last one is left out.
            first_step: batch of the first epoch to begin with; those before it are not decoded.
        """
        seed = self.seed

        def one_epoch(epoch: tf.Tensor) -> tf.data.Dataset:
            # Of this function's graph alone: the order must not depend on the global seed (and tf.data fails on a
            # tensor as seed when that one is 0).
            tf.random.set_seed(1)
            epoch_seed = tf.random.experimental.stateless_fold_in(tf.constant([seed, 0], tf.int64), epoch)
            order_seed, augmentation_seed = tf.unstack(tf.random.split(epoch_seed, 2))
            records = self.train_examples.shuffled(tf.cast(order_seed[0], tf.int64))
            if self.drop_remainder:
                records = records.take(self.steps_per_epoch * self.batch_size)
            skipped_steps = tf.where(tf.equal(epoch, first_epoch), tf.constant(first_step, tf.int64), 0)
            records = records.skip(skipped_steps * self.batch_size)
            if self.num_workers > 1:
                # Before decoding: the k-th batches of all workers together are the k-th batch of a single one.
                records = records.shard(self.num_workers, self.worker)
            batches = self._augmented(records, augmentation_seed).batch(self.batch_size // self.num_workers)
            return batches if self.mixing == "none" else self._mixed(batches, augmentation_seed, skipped_steps)

        return _with_options(tf.data.Dataset.range(first_epoch, epochs).flat_map(one_epoch)).prefetch(2)

    @functools.cached_property
    def validation(self) -> tf.data.Dataset:
        return self._evaluated(self.validation_examples)

    @functools.cached_property
    def test(self) -> tf.data.Dataset:
        return self._evaluated(self.test_examples)

    def train_view(self, view: int, first: int = 0) -> tf.data.Dataset:
        """The training part in order, from its `first` image on: as in evaluation (view 0), or augmented (1, 2, ...).

        The batches are those of evaluation.
        """
        if view == 0:
            return self._evaluated(self.train_examples, first)
        # An epoch number that no training reaches.
        seed = tf.random.experimental.stateless_fold_in(tf.constant([self.seed, 1], tf.int64), view)
        return _with_options(
            self._augmented(self.train_examples.in_order().skip(first), seed).batch(self._evaluation_batch)
        )

    def validation_from(self, first: int) -> tf.data.Dataset:
        """The validation part in order, from its `first` image on."""
        return self._evaluated(self.validation_examples, first)

    def validation_share(self, *, replicas: int) -> tf.data.Dataset:
        """This worker's share of the validation part, in batches of one replica, `replicas` of which it has.

        All workers and replicas get equally many batches of equal size: images are repeated to fill the last ones.
        The batches are (images, labels, weights), with weights (batch,) float32 that let each image count once in a
        mean over all batches: 0 for repeated images, equal for the others.
        """
        return self._share(self.validation_examples, replicas)

    def test_share(self, *, replicas: int) -> tf.data.Dataset:
        """The same of the test part."""
        return self._share(self.test_examples, replicas)

    def test_ids(self, *, replicas: int = 0) -> np.ndarray:
        """Positions of the test images in their part as it is stored, (num_test,) int64, in the order of `test`.

        With `replicas`, so many of each worker, in the order in which their steps see them: at each step one batch of
        every replica, those of the first worker before those of the next.
        """
        ids = np.flatnonzero(self.test_examples.mask)
        if not replicas:
            return ids
        batch, padded = self._share_sizes(self.num_test, replicas)
        # The k-th image is the (k // num_workers)-th of its worker, whose batches go to its replicas in turn.
        order = np.arange(padded).reshape(-1, replicas, batch, self.num_workers).transpose(0, 3, 1, 2).ravel()
        return ids[order[order < self.num_test]]

    def preview(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """The first `count` validation images and labels, the same at every call."""
        images, labels = next(iter(self.validation.unbatch().batch(count)))
        return images.numpy(), labels.numpy()

    def sample(self) -> bytes:
        """The first test image as the data set holds it, encoded."""
        _, encoded, _ = next(self.test_examples.in_order().as_numpy_iterator())
        return encoded

    def broken_images_named(self) -> contextlib.AbstractContextManager[None]:
        """Within it, an image that cannot be decoded is a UserError with the image's name."""
        return broken_images_named([self.train_examples.part, self.test_examples.part])

    @property
    def _evaluation_batch(self) -> int:
        return max(self.batch_size, _SMALLEST_EVALUATION_BATCH)

    def _evaluated(self, examples: Examples, first: int = 0) -> tf.data.Dataset:
        def transform(_: tf.Tensor, encoded: tf.Tensor, label: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            return self.preprocessing.for_evaluation(encoded), label

        images = examples.in_order().skip(first).map(transform, num_parallel_calls=tf.data.AUTOTUNE)
        return _with_options(images.batch(self._evaluation_batch)).prefetch(2)

    def _share_sizes(self, count: int, replicas: int) -> tuple[int, int]:
        """Images in a batch of one replica, and those of all replicas together, repeated ones included."""
        batch_of_replica = -(-self._evaluation_batch // (self.num_workers * replicas))
        batch_of_all = batch_of_replica * self.num_workers * replicas
        return batch_of_replica, -(-count // batch_of_all) * batch_of_all

    def _share(self, examples: Examples, replicas: int) -> tf.data.Dataset:
        batch_of_replica, padded = self._share_sizes(examples.count, replicas)
        records = examples.in_order()
        records = records.concatenate(records.repeat().take(padded - examples.count)).enumerate()

        def transform(
            number: tf.Tensor, record: tuple[tf.Tensor, tf.Tensor, tf.Tensor]
        ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
            _, encoded, label = record
            weight = tf.where(number < examples.count, padded / examples.count, 0.0)
            return self.preprocessing.for_evaluation(encoded), label, tf.cast(weight, tf.float32)

        records = records.shard(self.num_workers, self.worker)
        images = records.map(transform, num_parallel_calls=tf.data.AUTOTUNE)
        return _with_options(images.batch(batch_of_replica, drop_remainder=True)).prefetch(2)

    def _augmented(self, records: tf.data.Dataset, seed: tf.Tensor) -> tf.data.Dataset:
        def transform(index: tf.Tensor, encoded: tf.Tensor, label: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            # The seed belongs to the example, not to the draw: parallel calls can't change the result.
            return self.preprocessing.for_training(
                encoded, tf.random.experimental.stateless_fold_in(seed, index)
            ), label

        return records.map(transform, num_parallel_calls=tf.data.AUTOTUNE)

    def _mixed(self, batches: tf.data.Dataset, seed: tf.Tensor, first_number: tf.Tensor) -> tf.data.Dataset:
        num_examples, num_classes = len(self.train_examples.mask), len(self.class_names)

        def transform(number: tf.Tensor, batch: tuple[tf.Tensor, tf.Tensor]) -> tuple[tf.Tensor, tf.Tensor]:
            # Numbers that no example of this worker or another one has folded in.
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
    """Splits a data set into train, validation and test, and sets up their pipelines.

    The validation part is the same fraction of the paper's training split at every call, whatever the seed.

    Args:
        data: Which images to use and how to read and augment them. A name, such as "digits", stands for
            `DataConfig(dataset=name)`.
        batch_size: Number of images in a training batch; evaluation takes at least 64.
        seed: Seed of the order, the augmentation and the choice of examples.
        worker: Number of this worker, from 0, among those that train together, each on its share of a batch.
        num_workers: Number of workers.
        drop_remainder: Whether to leave out the last training batch of an epoch where it is smaller. Several workers
            always do.

    Raises:
        UserError: An unknown name, class or augmentation; a part is empty; the data set can't be prepared.
    """
    if isinstance(data, str):
        data = DataConfig(dataset=data)
    name, augmentation, classes = data.dataset, data.augmentation, data.classes or None
    info = dataset_info(name)
    if augmentation and augmentation not in AUGMENTATIONS:
        raise unknown_name("augmentation", augmentation, AUGMENTATIONS)
    if not 0 <= worker < num_workers or batch_size % num_workers:
        raise UserError(
            "Workers are numbered from 0, and share every batch equally. Received: "
            f"worker={worker}, num_workers={num_workers}, batch_size={batch_size}."
        )
    images = open_dataset(
        name, data_folder(data.data_dir), split_seed=data.split_seed, skip_bad_images=data.skip_bad_images
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

    size = data.image_size or info.image_size
    return TaskData(
        train_examples=train_examples,
        validation_examples=examples(part=images.train, mask=validation_mask, in_memory=in_memory),
        test_examples=examples(part=images.test, mask=test_mask),  # read once
        preprocessing=Preprocessing(
            image_size=size,
            # The reference's 256 for 224, kept in proportion; small images are not cropped.
            resize_size=max(size, round(size * info.resize_size / info.image_size)),
            augmentation=augmentation or info.augmentation,
            rand_augment=data.rand_augment,
            downscale=data.downscale,
            decoding=Decoding(exif=data.exif, alpha_background=data.alpha_background),
            highest_float=images.highest_float,
        ),
        class_names=tuple(names[label] for label in classes or range(len(names))),
        metric=info.metric,
        batch_size=batch_size,
        mixing=data.mixing,
        seed=seed,
        fingerprint=fingerprint,
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
    # Images are what is worked on in parallel; to divide the work of one among the cores as well only costs.
    options.threading.max_intra_op_parallelism = 1
    return dataset.with_options(options)
