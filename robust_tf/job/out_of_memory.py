"""A training run that does not fit into memory ends with advice instead of a traceback."""

import contextlib
from collections.abc import Iterator

import keras
import tensorflow as tf

from robust_tf.config.job import JobConfig
from robust_tf.errors import UserError
from robust_tf.job.planning.table import estimated_bytes
from robust_tf.transfer.stages import parameter_counts


@contextlib.contextmanager
def out_of_memory_explained(config: JobConfig, classifier: keras.Model) -> Iterator[None]:
    """Within it, running out of memory (of an accelerator, or of the machine) is a UserError.

    It says what the job needs by estimate, and the flags that need less. Nothing is written, so the last checkpoint
    stays. Where Linux ends the process itself (code 137), there is nothing to translate.

    Args:
        config: of the job.
        classifier: that is trained, the right layers frozen.
    """
    try:
        yield
    except (tf.errors.ResourceExhaustedError, MemoryError) as error:
        trainable, total = parameter_counts(classifier)
        estimate = estimated_bytes(config, classifier, trainable, total)
        ways = [
            f"a smaller --batch_size than {config.batch_size}",
            *_batch_in_parts(config),
            *(["--precision=mixed_bfloat16 or mixed_float16"] if config.precision == "float32" else []),
            f"a smaller --image_size than {classifier.input_shape[1]}",
        ]
        # The first line of TensorFlow's message names the tensor; a page of allocator statistics follows.
        reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
        raise UserError(
            f"Out of memory in training. Received: --batch_size={config.batch_size}, for which this job needs about "
            f"{estimate / 1024**3:.1f} GB by estimate ({reason}). The last checkpoint is kept. Ways out: "
            f"{', '.join(ways)}; in a new --workdir."
        ) from error


def _batch_in_parts(config: JobConfig) -> list[str]:
    """Flags with which the weights move as before, on batches half as large; none where they are not allowed."""
    if config.distribution != "none" or config.batch_size % 2:
        return []
    batch_size, steps = config.batch_size // 2, 2 * config.accumulate_steps
    return [f"--batch_size={batch_size} --accumulate_steps={steps} (the same batch, in parts)"]
