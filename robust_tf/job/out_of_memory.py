"""Advice instead of a traceback when training does not fit into memory."""

import contextlib
from collections.abc import Iterator

import keras
import tensorflow as tf

from robust_tf.config.job import JobConfig
from robust_tf.config.optimization import OptimizationConfig
from robust_tf.config.run import DistributionKind
from robust_tf.errors import UserError
from robust_tf.job.planning.table import estimated_bytes


@contextlib.contextmanager
def out_of_memory_explained(job: JobConfig, classifier: keras.Model) -> Iterator[None]:
    """Returns a context that turns an out-of-memory error, on an accelerator or on the host, into a UserError.

    The message estimates the memory that the job needs, and suggests flags that reduce it. Nothing is written, so the
    last checkpoint is kept. Linux may instead kill the process (exit code 137), which cannot be caught.

    Args:
        job: Job that is run.
        classifier: Classifier that is trained, with the right layers frozen.
    """
    optimization = job.optimization
    try:
        yield
    except (tf.errors.ResourceExhaustedError, MemoryError) as error:
        estimate = estimated_bytes(job, classifier)
        ways = [
            f"a smaller --batch_size than {optimization.batch_size}",
            *_batch_in_parts(optimization, job.run.distribution),
            *(["--precision=mixed_bfloat16 or mixed_float16"] if optimization.precision == "float32" else []),
            f"a smaller --image_size than {classifier.input_shape[1]}",
        ]
        # The first line of TensorFlow's message names the tensor; a page of allocator statistics follows.
        reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
        raise UserError(
            f"Out of memory in training. Received: --batch_size={optimization.batch_size}, for which this job is "
            f"estimated to need about {estimate / 1024**3:.1f} GB ({reason}). The last checkpoint is kept. Ways out: "
            f"{', '.join(ways)}; in a new --workdir."
        ) from error


def _batch_in_parts(optimization: OptimizationConfig, distribution: DistributionKind) -> list[str]:
    """Returns the flags that give the same updates with half the batch size, if the job allows them."""
    if distribution != "none" or optimization.batch_size % 2:
        return []
    batch_size, steps = optimization.batch_size // 2, 2 * optimization.accumulate_steps
    return [f"--batch_size={batch_size} --accumulate_steps={steps} (the same batch, in parts)"]
