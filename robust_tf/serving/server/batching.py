"""Dynamic batching by TensorFlow's own scheduler: requests that arrive at the same time run as one batch.

`tf.nondifferentiable_batch_function` collects the rows in C++, with the parameters and messages of TensorFlow Serving.
For each batch, it calls the model.
"""

import math
import threading
import time
from collections.abc import Iterable, Mapping

import numpy as np
import tensorflow as tf
from tensorflow.core.protobuf import meta_graph_pb2

from robust_tf.serving.model.session import LoadedModel, from_tensorflow
from robust_tf.serving.model.status import ServingError, invalid
from robust_tf.serving.server.config_files import Batching

_MAX_QUEUES = 64  # each row shape has its own queue, and a model may accept any number of shapes


class BatchedModel:
    """A `ServedModel` that runs requests to another model in batches.

    Args:
        model: Model that runs the batches.
        batching: How batches are formed.

    Attributes:
        path: Folder of the version.
        signatures: The signatures that the SavedModel declares, by name.
        checks_methods: Whether to refuse requests for signatures that are meant for another method.
    """

    def __init__(self, model: LoadedModel, batching: Batching) -> None:
        self.path = model.path
        self.signatures = model.signatures
        self.checks_methods = model.checks_methods
        self._model = model
        self._batching = batching
        self._queues: dict[tuple[str, tuple[tuple[int, ...], ...]], _Queue] = {}
        self._queues_lock = threading.Lock()

    def signature(self, name: str) -> meta_graph_pb2.SignatureDef | None:
        """Returns the signature with this name, or None. "" stands for `serving_default`."""
        return self._model.signature(name)

    def run(
        self,
        signature_name: str,
        inputs: Mapping[str, np.ndarray],
        outputs: Iterable[str] = (),
        *,
        timeout_ms: int = 0,
    ) -> dict[str, np.ndarray]:
        """Runs one signature, in a batch with other requests if possible.

        If a request makes its whole batch fail, the requests of the batch run again one by one. A batch may run until
        the latest deadline among its requests.

        Args:
            signature_name: One of `signatures`.
            inputs: An array for each input, by name. Strings are object arrays of bytes.
            outputs: Names of the outputs to compute. All if empty.
            timeout_ms: Longest time from now to the result, in milliseconds. 0 sets no limit.

        Returns:
            An array for each output, by name.

        Raises:
            ServingError: As for `LoadedModel.run`; also if the queue is full, or if the inputs have no common first
                dimension.
        """
        deadline = time.monotonic() + timeout_ms / 1000 if timeout_ms > 0 else math.inf
        inputs, wanted = self._model.checked(signature_name, inputs, outputs)
        if any(value.ndim == 0 for value in inputs.values()):
            raise invalid("Batching input tensors must have at least one dimension")
        if len({len(value) for value in inputs.values()}) != 1:
            raise invalid("Batching input tensors must have equal 0th-dimension size")
        queue = self._queue(signature_name, inputs)
        rows = next(iter(inputs.values())).shape[0]
        if queue is not None and rows > 0:
            try:
                values = queue.run(*inputs.values(), deadline=deadline)
                return {name: values[name] for name in wanted}
            except tf.errors.OpError as error:
                # An error in the Python function that runs the batch is ignored here, because below each request of the
                # batch runs alone and gets a separate answer.
                if not isinstance(error, tf.errors.UnknownError) and "Traceback" not in (error.message or ""):
                    raise from_tensorflow(error, self.path) from error
        return self._model.run(signature_name, inputs, wanted, timeout_ms=_milliseconds_until(deadline))

    def close(self) -> None:
        """Ends the queues and frees the model. No request may be using it."""
        for queue in self._queues.values():
            queue.close()
        self._model.close()

    def _queue(self, signature_name: str, inputs: Mapping[str, np.ndarray]) -> "_Queue | None":
        """Returns the queue for a signature and the shape of its rows, or None if there are too many queues.

        Rows of different shapes cannot share a batch.
        """
        key = signature_name, tuple(value.shape[1:] for value in inputs.values())
        with self._queues_lock:
            if key not in self._queues and len(self._queues) < _MAX_QUEUES:
                self._queues[key] = _Queue(self._model, signature_name, self._batching)
            return self._queues.get(key)


def _milliseconds_until(deadline: float) -> int:
    """Returns the time until a deadline of `time.monotonic`, or 0 (no limit) for an infinite one.

    Raises:
        ServingError: The deadline has passed.
    """
    if deadline == math.inf:
        return 0
    remaining = deadline - time.monotonic()
    if remaining <= 0:
        raise ServingError("DEADLINE_EXCEEDED", "The batch with this request took too long")
    return math.ceil(remaining * 1000)


class _Queue:
    """The batch operation of one signature, in a separate graph and Session. Closing the Session ends its threads."""

    def __init__(self, model: LoadedModel, signature_name: str, batching: Batching) -> None:
        definition: meta_graph_pb2.SignatureDef = model.signatures[signature_name]
        self._names = list(definition.outputs)

        def run_batch(deadlines: np.ndarray, *arrays: np.ndarray) -> list[np.ndarray]:
            inputs = dict(zip(definition.inputs, arrays, strict=True))
            timeout_ms = _milliseconds_until(float(deadlines.max()))
            answer = model.run(signature_name, inputs, timeout_ms=timeout_ms)
            return [answer[name] for name in self._names]

        @tf.nondifferentiable_batch_function(
            batching.num_batch_threads,
            batching.max_batch_size,
            batching.batch_timeout_micros,
            allowed_batch_sizes=batching.execution_sizes(),
            max_enqueued_batches=batching.max_enqueued_batches,
            autograph=False,
            enable_large_batch_splitting=batching.enable_large_batch_splitting,
        )
        def batch_function(*tensors: tf.Tensor) -> list[tf.Tensor]:
            types = [info.dtype for info in definition.outputs.values()]
            outputs: list[tf.Tensor] = tf.numpy_function(run_batch, tensors, types)
            return outputs

        # A batch occupies a thread of this Session while it waits for the model's Session. If both Sessions shared
        # their threads, waiting batches could leave none for the model.
        config = tf.compat.v1.ConfigProto(
            use_per_session_threads=True, inter_op_parallelism_threads=batching.num_batch_threads + 1
        )
        self._session = tf.compat.v1.Session(graph=tf.Graph(), config=config)
        with self._session.graph.as_default():
            types = [tf.float64, *(info.dtype for info in definition.inputs.values())]
            feeds = [tf.compat.v1.placeholder(dtype) for dtype in types]
            self._call = self._session.make_callable(list(batch_function(*feeds)), feed_list=feeds)

    def run(self, *arrays: np.ndarray, deadline: float) -> dict[str, np.ndarray]:
        """Waits until a batch with these rows has run, and returns their part of each output, by name.

        Args:
            *arrays: The inputs in the signature's order.
            deadline: Time by which the request must end, on the clock of `time.monotonic`.
        """
        deadlines = np.full(len(arrays[0]), deadline)
        return dict(zip(self._names, self._call(deadlines, *arrays), strict=True))

    def close(self) -> None:
        self._session.close()
