"""The chosen examples of one part as `tf.data` datasets, in order or shuffled, with an optional cache."""

import contextlib
import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterator

import numpy as np
import tensorflow as tf

from robust_tf.data.records import Part
from robust_tf.errors import UserError, warn_user
from robust_tf.files import replaced_atomically

# Largest size of all encoded images in a shuffle buffer together, in bytes.
_SHUFFLE_BYTES = 512 * 1024**2
# Largest share of the free memory that cached images may take.
_CACHE_SHARE = 0.25
_FREE_MEMORY_UNKNOWN = 8 * 1024**3
_WRITING_SEED = 20_200_716


@dataclasses.dataclass(frozen=True, kw_only=True)
class Examples:
    """Some examples of a part, as datasets of (index, encoded image, label): int64, string and int32 scalars.

    The label is a string for boxes and masks.

    Attributes:
        part: Part that the examples are chosen from.
        mask: Examples that are chosen, (part.num_examples,) bool.
        new_labels: New label of each label of the part, int32. None keeps the labels.
        example_bytes: Mean size of an encoded image.
        in_memory: Whether the encoded images stay in memory after they are read for the first time.
        file: Copy of the examples on disk, which `written` makes and `shuffled` reads. None for no copy.
    """

    part: Part
    mask: np.ndarray
    new_labels: np.ndarray | None = None
    example_bytes: float = 0.0
    in_memory: bool = False
    file: pathlib.Path | None = None

    @property
    def count(self) -> int:
        """Number of chosen examples."""
        return int(self.mask.sum())

    def labels(self) -> np.ndarray:
        """Returns the labels in the order of the part, (count,) int32."""
        labels = self.part.labels()[self.mask]
        return np.asarray(labels if self.new_labels is None else self.new_labels[labels], np.int32)

    def in_order(self) -> tf.data.Dataset:
        """Returns all examples in the order of the part."""
        return self._in_order

    def shuffled(self, seed: tf.Tensor) -> tf.data.Dataset:
        """Returns all examples in random order.

        Args:
            seed: Seed for the order, an int64 scalar. It may be a tensor of a graph.
        """
        if self.in_memory:
            return self._shuffled_within(self._in_order, seed, self.count)  # the buffer only refers to the images
        # Shuffling within a window is enough, because TFDS and `written` have already shuffled all examples once.
        window = int(_SHUFFLE_BYTES / max(self.example_bytes, 1.0))
        if self.file is not None:
            return self._shuffled_within(self._from_file(self.file), seed, window)
        if self._single_files is None:
            return self._shuffled_within(self._in_order, seed, window)
        order = tf.random.experimental.stateless_shuffle(np.flatnonzero(self.mask), tf.stack([seed, 0]))
        return self._single_files(tf.data.Dataset.from_tensor_slices(order))

    def written(self) -> "Examples":
        """Returns these examples after writing their copy on disk, unless it exists or `file` is None.

        If the copy cannot be written, prints a warning, leaves nothing behind and returns the examples without a file.
        """
        if self.file is None or self.file.exists():
            return self
        try:
            self._write(self.file)
        except UserError as error:
            warn_user(f"{error} The images are read from the data set instead.")
            return dataclasses.replace(self, file=None)
        return self

    def _write(self, path: pathlib.Path) -> None:
        records = dataclasses.replace(self, file=None).shuffled(tf.constant(_WRITING_SEED, tf.int64))
        with replaced_atomically(path) as temporary:
            writer = tf.io.TFRecordWriter(str(temporary))
            for record in records.map(_to_bytes, num_parallel_calls=tf.data.AUTOTUNE).as_numpy_iterator():
                with _os_errors():
                    writer.write(record)
            with _os_errors():
                writer.close()

    def _from_file(self, file: pathlib.Path) -> tf.data.Dataset:
        is_text = self._in_order.element_spec[2].dtype == tf.string
        read = _text_from_bytes if is_text else _from_bytes
        records = tf.data.TFRecordDataset(str(file)).map(read, num_parallel_calls=tf.data.AUTOTUNE)
        return records.apply(tf.data.experimental.assert_cardinality(self.count))

    @functools.cached_property
    def _in_order(self) -> tf.data.Dataset:
        with tf.init_scope():  # outside of the graph of the function that happens to use it first
            if self._single_files is not None:
                records = self._single_files(tf.data.Dataset.from_tensor_slices(np.flatnonzero(self.mask)))
            elif (stored := self._shared_records) is not None:
                chosen = np.flatnonzero(self.mask)
                arrays = chosen, *(array[chosen] for array in stored)
                records = tf.data.Dataset.from_tensor_slices(arrays).map(self._relabeled)
            else:
                records = self.part.records()
                if not self.mask.all():
                    kept = tf.constant(self.mask)
                    records = records.filter(lambda index, _, __: tf.gather(kept, index))
                records = records.map(self._relabeled)
            records = records.apply(tf.data.experimental.assert_cardinality(self.count))
            return records.cache() if self.in_memory else records

    @property
    def _single_files(self) -> Callable[[tf.data.Dataset], tf.data.Dataset] | None:
        """A function that reads the examples of a dataset of indices. None if the part must be read in order."""
        read = getattr(self.part, "record", None)
        if read is None:
            return None
        return lambda indices: indices.map(
            lambda index: self._relabeled(*read(index)), num_parallel_calls=tf.data.AUTOTUNE
        )

    @property
    def _shared_records(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Encoded images and labels of the whole part, if the jobs of this process share them."""
        read = getattr(self.part, "shared_records", None)
        return None if read is None else read()

    def _relabeled(self, index: tf.Tensor, encoded: tf.Tensor, label: tf.Tensor) -> tuple[tf.Tensor, ...]:
        if self.new_labels is not None:
            label = tf.gather(tf.constant(self.new_labels), label)
        # Boxes and masks are strings, see `robust_tf.data.boxes` and `robust_tf.data.masks`.
        return index, encoded, label if label.dtype == tf.string else tf.cast(label, tf.int32)

    def _shuffled_within(self, records: tf.data.Dataset, seed: tf.Tensor, window: int) -> tf.data.Dataset:
        return records.shuffle(max(1, min(self.count, window)), seed=seed, reshuffle_each_iteration=False)


def fits_in_memory(num_bytes: int) -> bool:
    """Returns whether encoded images of this size take at most a quarter of the free memory."""
    return num_bytes <= _CACHE_SHARE * _free_memory()


def _free_memory() -> int:
    try:
        lines = pathlib.Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):  # not on Linux
        return _FREE_MEMORY_UNKNOWN


@contextlib.contextmanager
def _os_errors() -> Iterator[None]:
    """Turns the error of TensorFlow for a file that cannot be written into the OSError that Python would raise."""
    try:
        yield
    except tf.errors.OpError as error:
        raise OSError(error.message) from error


def _to_bytes(index: tf.Tensor, encoded: tf.Tensor, label: tf.Tensor) -> tf.Tensor:
    if label.dtype == tf.string:
        length = tf.strings.as_string(tf.strings.length(label))
        return tf.strings.join([tf.strings.as_string(index), length, label + encoded], separator="\n")
    numbers = [tf.strings.as_string(index), tf.strings.as_string(label)]
    return tf.strings.join([*numbers, encoded], separator="\n")


def _from_bytes(record: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    index, label, encoded = _split(record)
    return tf.strings.to_number(index, tf.int64), encoded, tf.strings.to_number(label, tf.int32)


def _text_from_bytes(record: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    index, length, rest = _split(record)
    length = tf.strings.to_number(length, tf.int32)
    encoded = tf.strings.substr(rest, length, tf.strings.length(rest) - length)
    return tf.strings.to_number(index, tf.int64), encoded, tf.strings.substr(rest, 0, length)


def _split(record: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Splits at the first two line breaks only, because the bytes of the image may contain more of them."""
    head = tf.strings.split(tf.strings.substr(record, 0, 48), "\n", maxsplit=2)
    start = tf.strings.length(head[0]) + tf.strings.length(head[1]) + 2
    return head[0], head[1], tf.strings.substr(record, start, tf.strings.length(record) - start)
