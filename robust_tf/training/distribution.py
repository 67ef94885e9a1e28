"""Several devices and machines: TensorFlow's strategies, and what the processes of one job have to do together.

A batch is global: every replica trains on its share of it. All processes run the same program; the chief alone writes.
The variables are mirrored: each replica has them all, and all have the same values after each step.
"""

import contextlib
import functools
import io
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import tensorflow as tf

from robust_tf.config.run import DistributionKind
from robust_tf.console import console
from robust_tf.data import TaskData
from robust_tf.errors import UserError

Result = TypeVar("Result")

_RESTARTS = "ROBUST_TF_RESTARTS"  # how often this process has begun again, for the process that it becomes
# What a collective operation fails with when a process at the other end is gone.
PEER_LOST = (
    tf.errors.UnavailableError,
    tf.errors.AbortedError,
    tf.errors.CancelledError,
    tf.errors.DeadlineExceededError,
    tf.errors.InternalError,
)


class Distribution:
    """One strategy of TensorFlow, for a process of a job.

    Args:
        strategy: that of TensorFlow.
        worker, num_workers: this is process 0, 1, ... of so many; 0 is the chief.
    """

    def __init__(self, strategy: tf.distribute.Strategy, *, worker: int = 0, num_workers: int = 1) -> None:
        self.strategy = strategy
        self.worker, self.num_workers = worker, num_workers

    @property
    def num_replicas(self) -> int:
        return self.strategy.num_replicas_in_sync

    @property
    def is_chief(self) -> bool:
        return self.worker == 0

    @contextlib.contextmanager
    def scope(self) -> Iterator[None]:
        """Models, optimizers and metrics must be made within it."""
        if self.num_replicas == 1:
            yield
            return
        with self.strategy.scope(), tf.variable_creator_scope(_with_aggregation):
            yield

    def check_batch_size(self, batch_size: int) -> None:
        """Raises UserError for a batch that can't be shared equally."""
        if batch_size % self.num_replicas:
            raise UserError(
                f"Every one of the {self.num_replicas} replicas needs the same share of a batch. Received: "
                f"--batch_size={batch_size}. Take a multiple of {self.num_replicas}."
            )

    def train_data(self, task: TaskData, **position: int) -> Any:
        """`task.train(**position)`, shared among the replicas."""
        dataset = task.train(**position)
        if self.num_replicas == 1:
            return dataset
        return self._shared(dataset.rebatch(task.batch_size // self.num_replicas))

    def validation_data(self, task: TaskData) -> tuple[Any, int | None]:
        """The validation part, where every image counts once, and in how many steps to read it; None is to its end.

        With several replicas, TensorFlow finds the end by one more step on empty batches, which Keras would count.
        """
        if self.num_replicas == 1:
            return task.validation, None
        local = self.num_replicas // self.num_workers
        share = task.validation_share(replicas=local)
        return self._shared(share), int(share.cardinality()) // local

    def test_data(self, task: TaskData) -> Any:
        """The test part, likewise."""
        if self.num_replicas == 1:
            return task.test
        return self._shared(task.test_share(replicas=self.num_replicas // self.num_workers))

    def test_ids(self, task: TaskData) -> np.ndarray:
        """`task.test_ids` in the order in which the replicas' outcomes of `test_data` come, all workers together."""
        return task.test_ids(replicas=0 if self.num_replicas == 1 else self.num_replicas // self.num_workers)

    def _shared(self, batches_of_a_replica: tf.data.Dataset) -> Any:
        """The batches of this process, handed to its replicas in turn."""
        return self.strategy.distribute_datasets_from_function(lambda _: batches_of_a_replica)

    def any(self, here: bool) -> bool:
        """Whether it is so in any process. All of them have to ask."""
        if self.num_workers == 1:
            return here
        return bool(self._sum(np.array([here], np.int32))[0] > 0)

    def on_chief(self, work: Callable[[], Result]) -> Result | None:
        """Does work that only the chief may do, such as writing files, while the others wait; None in those.

        Raises:
            UserError: as the work does; in the other processes one that points to the chief.
        """
        with self.chief_first():
            return work() if self.is_chief else None

    @contextlib.contextmanager
    def chief_first(self) -> Iterator[None]:
        """The block runs in the chief and then, unless it has failed there, in the others."""
        if not self.is_chief and self.any(False):
            raise UserError("The chief (worker 0) has stopped: its output says why.")
        failed = True
        try:
            yield
            failed = False
        finally:
            if self.is_chief:
                self.any(failed)

    def broadcast(self, arrays: Sequence[np.ndarray] | None) -> list[np.ndarray]:
        """The arrays of the chief, in every process. The others give None, and need not know the shapes."""
        if self.num_workers == 1:
            return list(arrays or [])
        packed = _packed(arrays or []) if self.is_chief else np.zeros(0, np.int32)
        length = int(self._sum(np.array([len(packed)], np.int32))[0])
        # The sum of numbers of which only the chief's are not zero.
        return _unpacked(self._sum(packed if self.is_chief else np.zeros(length, np.int32)))

    def _sum(self, value: np.ndarray) -> np.ndarray:
        """The sum of int32 arrays over the processes, each of which gives its own."""
        return self._summed(tf.constant(value, tf.int32)).numpy()

    @functools.cached_property
    def _summed(self) -> Any:
        local_replicas = self.num_replicas // self.num_workers

        def of_one_replica(value: tf.Tensor) -> tf.Tensor:
            replica = tf.distribute.get_replica_context().replica_id_in_sync_group
            return value * tf.cast(tf.equal(replica % local_replicas, 0), value.dtype)

        @tf.function(reduce_retracing=True, autograph=False)
        def summed(value: tf.Tensor) -> tf.Tensor:
            return self.strategy.reduce("SUM", self.strategy.run(of_one_replica, args=(value,)), axis=None)

        return summed


@functools.cache
def start_distribution(kind: DistributionKind) -> Distribution:
    """The distribution of that kind; in a process that has one already, the same.

    It has to come before everything else that uses TensorFlow's devices.

    Raises:
        UserError: the machine, or the variable TF_CONFIG, is not made for it.
    """
    if kind == "mirrored":
        devices = tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("CPU")
        return Distribution(tf.distribute.MirroredStrategy([device.name for device in devices]))
    if kind == "multi_worker":
        cluster = _cluster()
        strategy = tf.distribute.MultiWorkerMirroredStrategy()
        distribution = Distribution(strategy, worker=cluster.task_id, num_workers=cluster.num_workers)
        console.quiet = not distribution.is_chief
        return distribution
    if kind == "tpu":
        try:
            resolver = tf.distribute.cluster_resolver.TPUClusterResolver.connect()
        except (ValueError, RuntimeError, tf.errors.OpError) as error:
            raise UserError(f"--distribution=tpu finds no TPU: {error} Set TPU_NAME, or run on a TPU VM.") from error
        return Distribution(tf.distribute.TPUStrategy(resolver))
    return Distribution(tf.distribute.get_strategy())


def begin_again(error: Exception, *, most: int) -> None:
    """Replaces this process by a new one that runs the same command, after another worker was lost.

    Args:
        error: what the loss was noticed by.
        most: how often a process may do that.

    Raises:
        UserError: it has done so that often already.
    """
    restarts = int(os.environ.get(_RESTARTS, "0"))
    if restarts >= most:
        raise UserError(
            f"Another worker was lost, and this one has begun again {restarts} times already (--restarts={most}). "
            f"Received: {error}"
        ) from error
    print(f"Another worker was lost. Beginning again ({restarts + 1} of at most {most} times).", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os.environ[_RESTARTS] = str(restarts + 1)
    os.execv(sys.executable, sys.orig_argv)


class _Cluster:
    """What TF_CONFIG says of the processes of a job and of this one."""

    def __init__(self, task_id: int, num_workers: int) -> None:
        self.task_id, self.num_workers = task_id, num_workers


def _cluster() -> _Cluster:
    help_text = (
        '--distribution=multi_worker needs TF_CONFIG in every process, such as {"cluster": {"worker": ["host0:2222", '
        '"host1:2222"]}, "task": {"type": "worker", "index": 0}}. '
    )
    try:
        resolver = tf.distribute.cluster_resolver.TFConfigClusterResolver()
        spec = resolver.cluster_spec().as_dict()
        index, kind = int(resolver.task_id), resolver.task_type
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{help_text}Received: TF_CONFIG={os.environ.get('TF_CONFIG', '')!r} ({error}).") from error
    if set(spec) != {"worker"} or kind != "worker" or not 0 <= index < len(spec["worker"]):
        raise UserError(
            f"{help_text}Every process is a worker, numbered from 0; worker 0 is the chief. Received: "
            f"TF_CONFIG={os.environ.get('TF_CONFIG', '')!r}."
        )
    return _Cluster(index, len(spec["worker"]))


def _with_aggregation(next_creator: Callable[..., tf.Variable], **kwargs: Any) -> tf.Variable:
    """Where Keras leaves open what a variable becomes that each replica assigns its own value to: their mean.

    These are the moving statistics of BatchNorm.
    """
    if not kwargs.get("trainable", True) and kwargs.get("aggregation") in (None, tf.VariableAggregation.NONE):
        value = kwargs["initial_value"]
        dtype = tf.as_dtype(kwargs.get("dtype") or tf.convert_to_tensor(value() if callable(value) else value).dtype)
        mean, first = tf.VariableAggregation.MEAN, tf.VariableAggregation.ONLY_FIRST_REPLICA
        kwargs["aggregation"] = mean if dtype.is_floating else first
    return next_creator(**kwargs)


def _packed(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """As int32, the one integer type that every collective operation knows."""
    buffer = io.BytesIO()
    np.savez(buffer, *arrays)
    content = buffer.getvalue()
    return np.frombuffer(content + bytes(-len(content) % 4), np.int32)


def _unpacked(packed: np.ndarray) -> list[np.ndarray]:
    with np.load(io.BytesIO(packed.tobytes()), allow_pickle=False) as archive:
        return [archive[f"arr_{index}"] for index in range(len(archive.files))]
