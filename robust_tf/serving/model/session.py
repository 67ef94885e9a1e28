"""Loads and runs a SavedModel in a Session, as TensorFlow Serving does.

`tf.saved_model.load` would hide two problems. First, it can restore exports whose variables only Python can find.
TensorFlow Serving fails on such exports, and so does a Session. Second, it passes tensors of the wrong rank on to
kernels that abort the process. Here, names, types and shapes are compared with the signature before anything runs.
"""

import contextlib
import pathlib
import re
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.core.framework import types_pb2
from tensorflow.core.protobuf import meta_graph_pb2

from robust_tf.serving.model.status import ServingError, code_name, invalid
from robust_tf.serving.wire.names import DEFAULT_SIGNATURE, INIT_SIGNATURE

_LONGEST_KERNEL_MESSAGE = 300


class LoadedModel:
    """One version of a model in memory; a `ServedModel`.

    Args:
        path: Folder of the version.
        tags: Tags of the SavedModel's graph.
        session_config: Settings of the Session, such as its number of threads.
        checks_methods: Whether to refuse requests for signatures that are meant for another method.

    Attributes:
        path: Folder of the version.
        signatures: The signatures that the SavedModel declares, by name. They include the entry that initializes it.
        checks_methods: The argument of this name.

    Raises:
        ServingError: The folder holds no SavedModel with these tags, or the SavedModel cannot be restored.
    """

    def __init__(
        self,
        path: pathlib.Path,
        *,
        tags: Sequence[str] = ("serve",),
        session_config: tf.compat.v1.ConfigProto | None = None,
        checks_methods: bool = False,
    ) -> None:
        self.path = path
        self.checks_methods = checks_methods
        self._session = tf.compat.v1.Session(graph=tf.Graph(), config=session_config)
        try:
            with self._session.graph.as_default(), without_deprecation_warning():
                meta_graph = tf.compat.v1.saved_model.loader.load(self._session, list(tags), str(path))
        except tf.errors.OpError as error:
            self._session.close()
            raise from_tensorflow(error) from error
        except (OSError, RuntimeError, ValueError) as error:
            self._session.close()
            raise ServingError("NOT_FOUND", f"Cannot load a SavedModel from {path}: {error}") from error
        self.signatures: dict[str, meta_graph_pb2.SignatureDef] = dict(meta_graph.signature_def)
        self._callables: dict[tuple[str, tuple[str, ...]], Any] = {}
        self._lock = threading.Lock()

    def signature(self, name: str) -> meta_graph_pb2.SignatureDef | None:
        """Returns the signature with this name, or None. "" stands for `serving_default`."""
        name = name or DEFAULT_SIGNATURE
        return None if name == INIT_SIGNATURE else self.signatures.get(name)

    def run(
        self,
        signature_name: str,
        inputs: Mapping[str, np.ndarray],
        outputs: Iterable[str] = (),
        *,
        timeout_ms: int = 0,
    ) -> dict[str, np.ndarray]:
        """Runs one signature.

        Args:
            signature_name: One of `signatures`.
            inputs: An array for each input, by name. Strings are object arrays of bytes.
            outputs: Names of the outputs to compute. All if empty.
            timeout_ms: Longest time of the run in milliseconds. 0 sets no limit.

        Returns:
            An array for each output, by name.

        Raises:
            ServingError: A name, type or shape does not fit the signature, or the model refuses the values.
        """
        inputs, wanted = self.checked(signature_name, inputs, outputs)
        options = tf.compat.v1.RunOptions(timeout_in_ms=timeout_ms) if timeout_ms > 0 else None
        try:
            values = self._callable(signature_name, wanted)(*inputs.values(), options=options)
        except tf.errors.OpError as error:
            raise from_tensorflow(error, self.path) from error
        except UnicodeDecodeError as error:
            # TensorFlow's message quotes bytes of the request that are not text, so Python could not decode it. The
            # status code is lost.
            message = error.object.decode("utf-8", "backslashreplace")
            raise invalid(_kernel_message(message, self.path)) from error
        except (ArithmeticError, TypeError, ValueError) as error:
            raise invalid(f"The values do not fit signature {signature_name!r}: {error}") from error
        except MemoryError as error:
            raise ServingError("RESOURCE_EXHAUSTED", "There is not enough memory for this request") from error
        except RuntimeError as error:  # the session has been closed
            raise ServingError("UNAVAILABLE", f"The model cannot run: {error}") from error
        return dict(zip(wanted, map(_as_array, values), strict=True))

    def checked(
        self, signature_name: str, inputs: Mapping[str, np.ndarray], outputs: Iterable[str]
    ) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
        """Checks a request against its signature.

        Args:
            signature_name: One of `signatures`.
            inputs: An array for each input, by name.
            outputs: Names of the outputs to compute. All if empty.

        Returns:
            The inputs and the names of the outputs to compute, both in the signature's order.

        Raises:
            ServingError: The request does not fit (INVALID_ARGUMENT).
        """
        definition = self.signatures[signature_name]
        inputs = _with_defaults(definition, inputs)
        for name, info in definition.inputs.items():
            _check_input(name, info, inputs[name])
        return inputs, _checked_outputs(definition, outputs)

    def close(self) -> None:
        """Frees the weights. No request may be using them."""
        self._callables.clear()
        self._session.close()

    def _callable(self, signature_name: str, outputs: tuple[str, ...]) -> Any:
        """Returns a prepared call, which runs a signature for these outputs.

        Prepared calls are cached, because preparing a call takes longer than running it.
        """
        key = signature_name, outputs
        with self._lock:
            if key not in self._callables:
                definition = self.signatures[signature_name]
                graph = self._session.graph
                self._callables[key] = self._session.make_callable(
                    [graph.as_graph_element(definition.outputs[name].name) for name in outputs],
                    feed_list=[graph.as_graph_element(info.name) for info in definition.inputs.values()],
                    accept_options=True,
                )
            return self._callables[key]


@contextlib.contextmanager
def without_deprecation_warning() -> Iterator[None]:
    """Silences TensorFlow's advice to use another loader, which would accept what TensorFlow Serving refuses."""
    logger = tf.get_logger()
    level = logger.level
    logger.setLevel("ERROR")
    try:
        yield
    finally:
        logger.setLevel(level)


def from_tensorflow(error: tf.errors.OpError, path: pathlib.Path | None = None) -> ServingError:
    """Converts an error of TensorFlow to a `ServingError` that holds only the kernel's message.

    Args:
        error: Error of TensorFlow. The parts of its message about nodes and stacks are left out.
        path: Folder of the version. "model/version" replaces it in the message.
    """
    return ServingError(code_name(error.error_code), _kernel_message(error.message or type(error).__name__, path))


def without_path(message: str, path: pathlib.Path) -> str:
    """Replaces the folder of the version in a message with "model/version", since clients should not see the path."""
    return message.replace(str(path), f"{path.parent.name}/{path.name}")


def _kernel_message(message: str, path: pathlib.Path | None) -> str:
    message = message.removeprefix("Graph execution error:").strip()
    # A tf.function puts the lines of Python first, a Session puts them last.
    message = re.sub(r"^Detected at node .*\n(?:(?:  .*)?\n)*", "", message)
    if "\nNode: " in message:
        message = message.rsplit("\nNode: ", 1)[1].partition("\n")[2]
    message = re.sub(r"^\d+ root error\(s\) found\.\s*\(0\) \w+: ", "", message)
    message = re.split(r"\n\t \[\[|\n\s*Original stack trace for ", message)[0]
    message = re.sub(r"^(\{\{\w+ [^}]*\}\}\s*)+", "", message).strip()
    if len(message) > _LONGEST_KERNEL_MESSAGE:  # it may quote the whole request
        message = message[:_LONGEST_KERNEL_MESSAGE] + "...TRUNCATED"
    return message if path is None else without_path(message, path)


def _as_array(value: Any) -> np.ndarray:
    """Returns an output as an array. A scalar string is bytes, from which NumPy would strip trailing zeros."""
    return np.array(value, dtype=object) if isinstance(value, bytes) else np.asarray(value)


def type_name(number: int) -> str:
    """Returns the name of a tensor type as TensorFlow's messages write it, e.g. "float", "int64" or "string".

    Args:
        number: Number of the type in the enumeration `DataType`.

    Example:
        >>> type_name(1)
        'float'
    """
    return str(types_pb2.DataType.Name(number)).removeprefix("DT_").lower()


def shape_of(info: meta_graph_pb2.TensorInfo) -> list[int | None] | None:
    """Returns the declared shape of a tensor, with None for each dimension that may vary; None if the rank may vary."""
    if info.tensor_shape.unknown_rank:
        return None
    return [None if dim.size < 0 else dim.size for dim in info.tensor_shape.dim]


def _names(names: Iterable[str]) -> str:
    return "{" + ",".join(sorted(names)) + "}"


def _with_defaults(definition: meta_graph_pb2.SignatureDef, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the inputs in the signature's order, with defaults for those that the request leaves out."""
    missing = [name for name in definition.inputs if name not in inputs and name not in definition.defaults]
    extra = [name for name in inputs if name not in definition.inputs]
    if len(inputs) == len(definition.inputs) and missing:
        raise invalid(
            f"Signature input alias: {missing[0]}(feed name: {definition.inputs[missing[0]].name}) not found in "
            f"request and no default value provided. Inputs expected to be in the set {_names(definition.inputs)}."
        )
    if missing or extra:
        raise invalid(
            f"input size does not match signature: {len(inputs)}!={len(definition.inputs)} "
            f"len({_names(inputs)}) != len({_names(definition.inputs)}). Sent extra: {_names(extra)}. "
            f"Missing but required: {_names(missing)}."
        )
    return {
        name: inputs[name] if name in inputs else tf.make_ndarray(definition.defaults[name])
        for name in definition.inputs
    }


def _check_input(name: str, info: meta_graph_pb2.TensorInfo, value: np.ndarray) -> None:
    received = tf.as_dtype(value.dtype).as_datatype_enum
    if received != info.dtype:
        raise invalid(
            f"Expects arg[0] to be {type_name(info.dtype)} but {type_name(received)} is provided for input {name!r}."
        )
    expected = shape_of(info)
    fits = expected is None or (
        len(expected) == value.ndim
        and all(size in (None, actual) for size, actual in zip(expected, value.shape, strict=True))
    )
    if not fits:
        declared = "[" + ",".join("?" if size is None else str(size) for size in expected or []) + "]"
        raise invalid(
            f"Shape of input {name!r} is not compatible with the signature: expected {declared}, received "
            f"{list(value.shape)}. The first dimension is the batch."
        )


def _checked_outputs(definition: meta_graph_pb2.SignatureDef, outputs: Iterable[str]) -> tuple[str, ...]:
    wanted = tuple(outputs)
    for position, name in enumerate(wanted):
        if name not in definition.outputs:
            raise invalid(
                f"output tensor alias not found in signature: {name} Outputs expected to be in the set "
                f"{_names(definition.outputs)}."
            )
        if name in wanted[:position]:
            raise invalid(f"duplicate output tensor alias: {name}")
    # In the signature's order, so that requests for the same outputs share one prepared call.
    return tuple(name for name in definition.outputs if name in wanted or not wanted)
