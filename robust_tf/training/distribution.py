"""Training on several devices and machines: TensorFlow's strategies, and communication between the processes of a job.

The batch size is global: every replica trains on its share of each batch. All processes run the same program, but only
the chief writes files. The variables are mirrored: every replica has a copy, and after each step all copies are equal.
"""

import contextlib
import faulthandler
import functools
import io
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn, TypeVar

import numpy as np
import tensorflow as tf

from robust_tf.config.run import DistributionKind
from robust_tf.console import console
from robust_tf.data import TaskData
from robust_tf.errors import UserError
from robust_tf.training.interruption import Interrupted, Watch, signals_end_process
from robust_tf.training.rendezvous import lost_workers, wait_for_workers

Result = TypeVar("Result")

_RESTARTS = "ROBUST_TF_RESTARTS"  # environment variable that holds the number of restarts so far
# Errors that a collective operation raises when another process is gone.
PEER_LOST = (
    tf.errors.UnavailableError,
    tf.errors.AbortedError,
    tf.errors.CancelledError,
    tf.errors.DeadlineExceededError,
    tf.errors.InternalError,
)


class Distribution:
    """A strategy of TensorFlow, as seen by one process of a job.

    Args:
        strategy: TensorFlow's strategy.
        worker: Number of this process, counted from 0. Process 0 is the chief.
        addresses: Address of each process, such as "host0:2222". It may be empty if there is only one.
    """

    def __init__(self, strategy: tf.distribute.Strategy, *, worker: int = 0, addresses: Sequence[str] = ()) -> None:
        self.strategy = strategy
        self.worker, self._addresses = worker, tuple(addresses)

    @property
    def num_workers(self) -> int:
        """Number of processes."""
        return max(len(self._addresses), 1)

    @property
    def num_replicas(self) -> int:
        """Number of replicas in all processes together."""
        return int(self.strategy.num_replicas_in_sync)

    @property
    def is_chief(self) -> bool:
        """Whether this process is the chief, which alone writes files."""
        return self.worker == 0

    @contextlib.contextmanager
    def scope(self) -> Iterator[None]:
        """Returns the context in which models, optimizers and metrics must be created."""
        if self.num_replicas == 1:
            yield
            return
        with self.strategy.scope(), tf.variable_creator_scope(_with_aggregation):
            yield

    @contextlib.contextmanager
    def watched(self) -> Iterator[Watch]:
        """Returns a context in which a signal ends this process even if it waits for a worker that is lost."""

        def stuck(ended: Callable[[], bool]) -> str:
            lost = lost_workers(self._addresses, worker=self.worker, ended=ended)
            return f"There is no answer from {lost}." if lost else ""

        watch = Watch(stuck)
        with watch.running() if self.num_workers > 1 else contextlib.nullcontext():
            yield watch

    def check_batch_size(self, batch_size: int) -> None:
        """Checks that a batch can be divided equally among the replicas.

        Args:
            batch_size: Size of the global batch.

        Raises:
            UserError: The batch size is not a multiple of the number of replicas.
        """
        if batch_size % self.num_replicas:
            raise UserError(
                f"The {self.num_replicas} replicas share each batch equally. Received: batch_size={batch_size}. Use a "
                f"multiple of {self.num_replicas}."
            )

    def train_data(self, task: TaskData, **position: int) -> Any:
        """Returns the training batches, divided among the replicas.

        Args:
            task: Data of the job.
            **position: Position at which to begin, see `TaskData.train`.
        """
        dataset = task.train(**position)
        if self.num_replicas == 1:
            return dataset
        return self._shared(dataset.rebatch(task.batch_size // self.num_replicas))

    def validation_data(self, task: TaskData) -> tuple[Any, int | None]:
        """Returns the validation part, in which every image counts once, and the number of steps that read it.

        The number of steps is None where the data set is simply read to its end. With several replicas, TensorFlow
        finds the end only by running one more step on empty batches, which Keras would count as a step.

        Args:
            task: Data of the job.
        """
        if self.num_replicas == 1:
            return task.validation, None
        local = self.num_replicas // self.num_workers
        share = task.validation_share(replicas=local)
        return self._shared(share), int(share.cardinality()) // local

    def test_data(self, task: TaskData) -> Any:
        """Returns the test part, in which every image counts once.

        Args:
            task: Data of the job.
        """
        if self.num_replicas == 1:
            return task.test
        return self._shared(task.test_share(replicas=self.num_replicas // self.num_workers))

    def test_ids(self, task: TaskData) -> np.ndarray:
        """Returns `task.test_ids` in the order in which all replicas together return their results for `test_data`.

        Args:
            task: Data of the job.
        """
        return task.test_ids(replicas=0 if self.num_replicas == 1 else self.num_replicas // self.num_workers)

    def _shared(self, batches_of_a_replica: tf.data.Dataset) -> Any:
        """Distributes the batches of this process among its replicas, one each in turn."""
        return self.strategy.distribute_datasets_from_function(lambda _: batches_of_a_replica)

    def any(self, here: bool) -> bool:
        """Returns whether a condition holds in any process. Every process has to call this method.

        Args:
            here: Whether the condition holds in this process.
        """
        if self.num_workers == 1:
            return here
        return bool(self._sum(np.array([here], np.int32))[0] > 0)

    def on_chief(self, work: Callable[[], Result]) -> Result | None:
        """Runs a function in the chief only, while the other processes wait. Every process has to call this method.

        Args:
            work: Function that only the chief may run, for example because it writes files.

        Returns:
            The result of the function in the chief, None in the other processes.

        Raises:
            UserError: The function raised a UserError. In the other processes the message refers to the chief.
        """
        with self.chief_first():
            return work() if self.is_chief else None

    @contextlib.contextmanager
    def chief_first(self) -> Iterator[None]:
        """Returns a context whose block runs in the chief first, then in the other processes if the chief succeeds."""
        if not self.is_chief and self.any(False):
            raise UserError("The chief (worker 0) has stopped. See its output for the reason.")
        failed = True
        try:
            yield
            failed = False
        finally:
            if self.is_chief:
                self.any(failed)

    def broadcast(self, arrays: Sequence[np.ndarray] | None) -> list[np.ndarray]:
        """Returns the chief's arrays, in every process.

        Args:
            arrays: The arrays, in the chief. None in the other processes, which need not know the shapes.
        """
        if self.num_workers == 1:
            return list(arrays or [])
        packed = _packed(arrays or []) if self.is_chief else np.zeros(0, np.int32)
        length = int(self._sum(np.array([len(packed)], np.int32))[0])
        # All other processes contribute zeros, so the sum equals the chief's arrays.
        return _unpacked(self._sum(packed if self.is_chief else np.zeros(length, np.int32)))

    def _sum(self, value: np.ndarray) -> np.ndarray:
        """Returns the sum of the int32 arrays of all processes."""
        total: np.ndarray = self._summed(tf.constant(value, tf.int32)).numpy()
        return total

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


_started: dict[DistributionKind, Distribution] = {}


def start_distribution(kind: DistributionKind, *, worker_timeout: float = 0.0) -> Distribution:
    """Returns the distribution of the given kind. A second call in the same process returns the same object.

    Call it before anything else uses TensorFlow's devices.

    Args:
        kind: "none" for one device, "mirrored" for all devices of this machine, "multi_worker" for several machines,
            or "tpu".
        worker_timeout: Seconds to wait for the other workers of "multi_worker". 0 means for ever.

    Raises:
        UserError: There is no TPU, the environment variable TF_CONFIG does not describe the processes, or another
            worker has not started.
    """
    if kind not in _started:
        _started[kind] = _new_distribution(kind, worker_timeout)
    return _started[kind]


def _new_distribution(kind: DistributionKind, worker_timeout: float) -> Distribution:
    if kind == "mirrored":
        devices = tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("CPU")
        return Distribution(tf.distribute.MirroredStrategy([device.name for device in devices]))
    if kind == "multi_worker":
        cluster = _cluster()
        wait_for_workers(cluster.addresses, worker=cluster.task_id, timeout=worker_timeout)
        strategy = _multi_worker_strategy(worker_timeout)
        distribution = Distribution(strategy, worker=cluster.task_id, addresses=cluster.addresses)
        console.quiet = not distribution.is_chief
        return distribution
    if kind == "tpu":
        try:
            resolver = tf.distribute.cluster_resolver.TPUClusterResolver.connect()
        except (ValueError, RuntimeError, tf.errors.OpError) as error:
            raise UserError(
                f"No TPU was found. Received: distribution=tpu ({error}). Set TPU_NAME, or run on a TPU VM."
            ) from error
        return Distribution(tf.distribute.TPUStrategy(resolver))
    return Distribution(tf.distribute.get_strategy())


def _multi_worker_strategy(timeout: float) -> tf.distribute.Strategy:
    """Connects the workers. If one is lost at this very moment, the process ends after `timeout` seconds."""
    # TensorFlow holds Python's lock while it connects. Only a signal's default action and a thread of faulthandler,
    # which is written in C, can end the process then. Usually it takes less than a second.
    if timeout:
        faulthandler.dump_traceback_later(timeout, exit=True)
    try:
        with signals_end_process():
            return tf.distribute.MultiWorkerMirroredStrategy()
    finally:
        if timeout:
            faulthandler.cancel_dump_traceback_later()


def restart_process(error: Exception, *, most: int, signal_number: int | None = None) -> NoReturn:
    """Replaces this process with a new one that runs the same command. Use it when another worker was lost.

    Args:
        error: Error that showed that a worker was lost.
        most: Highest number of restarts.
        signal_number: Signal that this process has received, if any.

    Raises:
        UserError: The process has already been restarted that many times.
        Interrupted: There was a signal, so the process must end.
    """
    if signal_number is not None:
        print(
            "Interrupted. Another worker was lost; the same command continues from the last checkpoint.",
            file=sys.stderr,
        )
        raise Interrupted(signal_number) from error
    restarts = int(os.environ.get(_RESTARTS, "0"))
    if restarts >= most:
        raise UserError(
            f"Another worker was lost, and this one has already been restarted {restarts} times (restarts={most}). "
            f"Received: {error}"
        ) from error
    print(f"Another worker was lost. Restarting (restart {restarts + 1} of at most {most}).", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os.environ[_RESTARTS] = str(restarts + 1)
    os.execv(sys.executable, sys.orig_argv)


class _Cluster:
    """The index of this process and the addresses of all processes, as given by TF_CONFIG."""

    def __init__(self, task_id: int, addresses: Sequence[str]) -> None:
        self.task_id, self.addresses = task_id, tuple(addresses)


def _cluster() -> _Cluster:
    help_text = (
        'distribution=multi_worker needs TF_CONFIG in every process, such as {"cluster": {"worker": ["host0:2222", '
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
            f"{help_text}Every process must be a worker, numbered from 0; worker 0 is the chief. Received: "
            f"TF_CONFIG={os.environ.get('TF_CONFIG', '')!r}."
        )
    return _Cluster(index, spec["worker"])


def _with_aggregation(next_creator: Callable[..., tf.Variable], **kwargs: Any) -> tf.Variable:
    """Creates a variable. Averages the values of the replicas where Keras does not define how to combine them.

    These variables are the moving statistics of BatchNorm, to which each replica assigns a different value.
    """
    if not kwargs.get("trainable", True) and kwargs.get("aggregation") in (None, tf.VariableAggregation.NONE):
        value = kwargs["initial_value"]
        dtype = tf.as_dtype(kwargs.get("dtype") or tf.convert_to_tensor(value() if callable(value) else value).dtype)
        mean, first = tf.VariableAggregation.MEAN, tf.VariableAggregation.ONLY_FIRST_REPLICA
        kwargs["aggregation"] = mean if dtype.is_floating else first
    return next_creator(**kwargs)


def _packed(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """Packs arrays into one int32 array, since int32 is the only integer type that all collective operations accept."""
    buffer = io.BytesIO()
    np.savez(buffer, *arrays)
    content = buffer.getvalue()
    return np.frombuffer(content + bytes(-len(content) % 4), np.int32)


def _unpacked(packed: np.ndarray) -> list[np.ndarray]:
    with np.load(io.BytesIO(packed.tobytes()), allow_pickle=False) as archive:
        return [archive[f"arr_{index}"] for index in range(len(archive.files))]
