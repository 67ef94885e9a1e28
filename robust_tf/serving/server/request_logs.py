"""Request logging: a sample of the requests to a model and their replies, as TFRecord files of PredictionLog messages.

Each file can be used as the warm-up requests of a version. A thread writes the files, so that no request waits for the
disk, and none fails because of it.
"""

import contextlib
import dataclasses
import logging
import os
import pathlib
import queue
import threading
import time
from collections.abc import Callable

import tensorflow as tf
from google.protobuf.message import Error as ProtoError
from tensorflow_serving.apis import prediction_log_pb2

from robust_tf.serving.model.warmup import MAX_RECORDS
from robust_tf.serving.server.metrics import Metrics

_LOG = logging.getLogger(__name__)
_MAX_WAITING_BYTES = 64 * 2**20  # size of the requests that wait to be written; more are left out
_SECONDS_AFTER_FAILURE = 30.0  # before a file is opened again, for example because the disk was full


@dataclasses.dataclass(frozen=True)
class LogEntry:
    """A request to log.

    Attributes:
        filename_prefix: Beginning of the paths of the files to write it to.
        model_name: Name of the model, for the metrics.
        size: Size of the request in bytes.
        make: Function that returns the record. It runs in the thread that writes.
    """

    filename_prefix: str
    model_name: str
    size: int
    make: Callable[[], prediction_log_pb2.PredictionLog]


class RequestLogs:
    """The request logs of one server.

    Args:
        metrics: Metrics that count the requests which are written or left out.
    """

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._lock = threading.Lock()
        self._queue: queue.SimpleQueue[LogEntry | None] = queue.SimpleQueue()
        self._waiting_bytes = 0
        self._thread: threading.Thread | None = None
        self._closed = False
        self._files: dict[str, _LogFiles] = {}
        self._closed_until: dict[str, float] = {}
        self._reported: set[tuple[str, str]] = set()

    def put(self, entry: LogEntry) -> None:
        """Hands a request over to the thread that writes, or leaves it out if too many requests wait already."""
        with self._lock:
            full = self._waiting_bytes > 0 and self._waiting_bytes + entry.size > _MAX_WAITING_BYTES
            if not full and not self._closed:
                self._waiting_bytes += entry.size
                self._queue.put(entry)
                if self._thread is None:
                    self._thread = threading.Thread(target=self._write_all, name="request-log", daemon=True)
                    self._thread.start()
        if full:
            self._leave_out(entry, "RESOURCE_EXHAUSTED", "they come faster than they can be written")

    def close(self) -> None:
        """Writes the requests that still wait, for at most ten seconds, and closes the files."""
        with self._lock:
            self._closed, thread = True, self._thread
        if thread is not None:
            self._queue.put(None)
            thread.join(10)

    def _write_all(self) -> None:
        while (entry := self._queue.get()) is not None:
            if time.monotonic() < self._closed_until.get(entry.filename_prefix, 0.0):
                self._metrics.count_log(entry.model_name, "UNAVAILABLE")
            else:
                self._write(entry)
            with self._lock:
                self._waiting_bytes -= entry.size
        for files in self._files.values():
            files.close()

    def _write(self, entry: LogEntry) -> None:
        files = self._files.setdefault(entry.filename_prefix, _LogFiles(entry.filename_prefix))
        try:
            files.write(entry.make().SerializeToString())
        except (OSError, tf.errors.OpError, ProtoError, TypeError, ValueError) as error:
            self._closed_until[entry.filename_prefix] = time.monotonic() + _SECONDS_AFTER_FAILURE
            self._leave_out(entry, "UNAVAILABLE", str(error))
        else:
            self._metrics.count_log(entry.model_name, "OK")
            self._reported = {report for report in self._reported if report[0] != entry.filename_prefix}

    def _leave_out(self, entry: LogEntry, status: str, reason: str) -> None:
        """Counts a request that is not logged. The first in a row is a warning, too."""
        self._metrics.count_log(entry.model_name, status)
        if (entry.filename_prefix, status) not in self._reported:
            self._reported.add((entry.filename_prefix, status))
            _LOG.warning(
                "Requests to model %s are answered, but cannot be logged to %s-*.tfrecord: %s",
                entry.model_name,
                entry.filename_prefix,
                reason,
            )


class _LogFiles:
    """The files with one prefix, one after the other. None has more records than a warm-up file may have."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self._opened = 0
        self._writer: tf.io.TFRecordWriter | None = None

    def write(self, record: bytes) -> None:
        """Writes a record through to the operating system.

        Raises:
            OSError: The record cannot be written. The file then ends with the record before.
            tf.errors.OpError: The same.
        """
        if self._writer is not None and self._records == MAX_RECORDS:
            self.close()
        if self._writer is None:
            self._open()
        try:
            self._writer.write(record)  # type: ignore[union-attr]  # `_open` has set it
            self._writer.flush()  # type: ignore[union-attr]
            self._size = self._path.stat().st_size
        except (OSError, tf.errors.OpError):
            self.close()
            with contextlib.suppress(OSError):
                os.truncate(self._path, self._size)
            raise
        self._records += 1

    def close(self) -> None:
        """Closes the open file, if there is one."""
        if self._writer is not None:
            with contextlib.suppress(tf.errors.OpError):  # nothing is left to be written, unless writing has failed
                self._writer.close()
            self._writer = None

    def _open(self) -> None:
        self._opened += 1
        started = time.strftime("%Y%m%dT%H%M%S")
        self._path = pathlib.Path(f"{self._prefix}-{started}-{os.getpid()}-{self._opened:04d}.tfrecord")
        self._size = self._records = 0
        self._writer = tf.io.TFRecordWriter(str(self._path))
