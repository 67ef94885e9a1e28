"""Dynamic batching with TensorFlow's own scheduler: requests that arrive together run together.

`tf.nondifferentiable_batch_function` collects rows in C++, by the same parameters and with the same messages as
TensorFlow Serving; what it calls for each batch is the Session of `LoadedModel`.
"""

import math
import threading
import time
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.core.protobuf import meta_graph_pb2

from robust_tf.serving.model.session import LoadedModel, from_tensorflow
from robust_tf.serving.model.status import ServingError, invalid
from robust_tf.serving.server.config_files import Batching

_MAX_QUEUES = 64  # models of free shape could ask for any number


class BatchedModel(LoadedModel):
    """A `LoadedModel` whose `run` may share one call of the model with other requests."""

    def __init__(self, *args: Any, batching: Batching, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._batching = batching
        self._queues: dict[tuple, _Queue] = {}
        self._queues_lock = threading.Lock()

    def run(
        self,
        signature_name: str,
        inputs: Mapping[str, np.ndarray],
        outputs: Iterable[str] = (),
        *,
        timeout_ms: int = 0,
    ) -> dict[str, np.ndarray]:
        """As `LoadedModel.run`; when a request spoils a batch, its requests run again one by one.

        A batch runs for as long as the most patient of its requests would wait.
        """
        deadline = time.monotonic() + timeout_ms / 1000 if timeout_ms > 0 else math.inf
        inputs, wanted = self.checked(signature_name, inputs, outputs)
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
                # An error of the Python function around the batch: alone, each request gets its own answer.
                if not isinstance(error, tf.errors.UnknownError) and "Traceback" not in (error.message or ""):
                    raise from_tensorflow(error, self.path) from error
        return super().run(signature_name, inputs, wanted, timeout_ms=_milliseconds_until(deadline))

    def close(self) -> None:
        """As `LoadedModel.close`."""
        for queue in self._queues.values():
            queue.close()
        super().close()

    def _queue(self, signature_name: str, inputs: Mapping[str, np.ndarray]) -> "_Queue | None":
        """The queue for this signature and shape of a row (other shapes can't share a batch), while there is room."""
        key = signature_name, *(value.shape[1:] for value in inputs.values())
        with self._queues_lock:
            if key not in self._queues and len(self._queues) < _MAX_QUEUES:
                self._queues[key] = _Queue(self, signature_name, self._batching)
            return self._queues.get(key)


def _milliseconds_until(deadline: float) -> int:
    """0, which waits for ever, for an infinite one.

    Raises:
        ServingError: it has passed.
    """
    if deadline == math.inf:
        return 0
    remaining = deadline - time.monotonic()
    if remaining <= 0:
        raise ServingError("DEADLINE_EXCEEDED", "The batch with this request took too long")
    return math.ceil(remaining * 1000)


class _Queue:
    """The batch operation in a graph and a Session of its own, whose end takes its threads along."""

    def __init__(self, model: LoadedModel, signature_name: str, batching: Batching) -> None:
        definition: meta_graph_pb2.SignatureDef = model.signatures[signature_name]
        self._names = list(definition.outputs)

        def run_batch(deadlines: np.ndarray, *arrays: np.ndarray) -> list[np.ndarray]:
            inputs = dict(zip(definition.inputs, arrays, strict=True))
            timeout_ms = _milliseconds_until(float(deadlines.max()))
            answer = LoadedModel.run(model, signature_name, inputs, timeout_ms=timeout_ms)
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
            return tf.numpy_function(run_batch, tensors, [info.dtype for info in definition.outputs.values()])

        # Threads of its own: a batch waits inside one of them for the model's Session, which needs the common ones.
        config = tf.compat.v1.ConfigProto(
            use_per_session_threads=True, inter_op_parallelism_threads=batching.num_batch_threads + 1
        )
        self._session = tf.compat.v1.Session(graph=tf.Graph(), config=config)
        with self._session.graph.as_default():
            types = [tf.float64, *(info.dtype for info in definition.inputs.values())]
            feeds = [tf.compat.v1.placeholder(dtype) for dtype in types]
            self._call = self._session.make_callable(list(batch_function(*feeds)), feed_list=feeds)

    def run(self, *arrays: np.ndarray, deadline: float) -> dict[str, np.ndarray]:
        """Waits for a batch that holds these rows, and gives their part of the answer by output name.

        The deadline is one of `time.monotonic`.
        """
        deadlines = np.full(len(arrays[0]), deadline)
        return dict(zip(self._names, self._call(deadlines, *arrays), strict=True))

    def close(self) -> None:
        self._session.close()
