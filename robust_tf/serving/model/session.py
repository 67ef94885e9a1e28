"""A SavedModel, loaded and run in a Session as TF Serving does it.

`tf.saved_model.load` restores some exports that TF Serving cannot serve (variables that only Python finds again), and
it lets a tensor of a wrong rank through to kernels that abort the process. A Session shows the first when it runs,
and here names, types and shapes are compared with the signature before anything runs.
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

DEFAULT_SIGNATURE = "serving_default"
_INIT_OP = "__saved_model_init_op"
_LONGEST_KERNEL_MESSAGE = 300


class LoadedModel:
    """One version of a model in memory.

    Attributes:
        signatures: what the SavedModel declares, by signature name, the entry of the initialisation op included.

    Raises:
        ServingError: the folder holds no SavedModel with these tags, or it cannot be restored.
    """

    def __init__(
        self,
        path: pathlib.Path,
        *,
        tags: Sequence[str] = ("serve",),
        session_config: tf.compat.v1.ConfigProto | None = None,
    ) -> None:
        self.path = path
        self._session = tf.compat.v1.Session(graph=tf.Graph(), config=session_config)
        try:
            with self._session.graph.as_default(), _without_deprecation_warning():
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
        """The signature of that name ("" stands for `serving_default`), or None."""
        name = name or DEFAULT_SIGNATURE
        return None if name == _INIT_OP else self.signatures.get(name)

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
            signature_name: one of `signatures`.
            inputs: an array for each input's name; strings as object arrays of bytes.
            outputs: names of the outputs to compute; all when empty.
            timeout_ms: 0 waits for ever.

        Raises:
            ServingError: a name, type or shape doesn't fit the signature, or the model refuses the values.
        """
        inputs, wanted = self.checked(signature_name, inputs, outputs)
        options = tf.compat.v1.RunOptions(timeout_in_ms=timeout_ms) if timeout_ms > 0 else None
        try:
            values = self._callable(signature_name, wanted)(*inputs.values(), options=options)
        except tf.errors.OpError as error:
            raise from_tensorflow(error, self.path) from error
        except UnicodeDecodeError as error:
            # TensorFlow's own message, which quotes bytes of the request that are no text; the code is lost.
            message = error.object.decode("utf-8", "backslashreplace")
            raise invalid(_kernel_message(message, self.path)) from error
        except (ArithmeticError, TypeError, ValueError) as error:
            raise invalid(f"The values do not fit signature {signature_name!r}: {error}") from error
        except MemoryError as error:
            raise ServingError("RESOURCE_EXHAUSTED", "There is not enough memory for this request") from error
        except RuntimeError as error:  # of a session that has been closed
            raise ServingError("UNAVAILABLE", f"The model cannot run: {error}") from error
        return dict(zip(wanted, map(_as_array, values), strict=True))

    def checked(
        self, signature_name: str, inputs: Mapping[str, np.ndarray], outputs: Iterable[str]
    ) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
        """The inputs in the signature's order and the names of the wanted outputs, when they fit the signature.

        Raises:
            ServingError: INVALID_ARGUMENT when they don't.
        """
        definition = self.signatures[signature_name]
        inputs = _with_defaults(definition, inputs)
        for name, info in definition.inputs.items():
            _check_input(name, info, inputs[name])
        return inputs, _checked_outputs(definition, outputs)

    def close(self) -> None:
        """Frees the weights. Nothing may be running."""
        self._callables.clear()
        self._session.close()

    def _callable(self, signature_name: str, outputs: tuple[str, ...]) -> Any:
        """The prepared call for one signature and one choice of outputs: preparing takes longer than running."""
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
def _without_deprecation_warning() -> Iterator[None]:
    """TensorFlow advises the loader that cannot show what TensorFlow Serving would say."""
    logger = tf.get_logger()
    level = logger.level
    logger.setLevel("ERROR")
    try:
        yield
    finally:
        logger.setLevel(level)


def from_tensorflow(error: tf.errors.OpError, path: pathlib.Path | None = None) -> ServingError:
    """The same error with the kernel's own message only, without TensorFlow's account of where it stands.

    Args:
        error: the error.
        path: folder of the version, which clients read as "model/version".
    """
    return ServingError(code_name(error.error_code), _kernel_message(error.message or type(error).__name__, path))


def without_path(message: str, path: pathlib.Path) -> str:
    """The message with "model/version" in place of the version's folder: where it lies is no client's business."""
    return message.replace(str(path), f"{path.parent.name}/{path.name}")


def _kernel_message(message: str, path: pathlib.Path | None) -> str:
    message = message.removeprefix("Graph execution error:").strip()
    if "\nNode: " in message:
        message = message.rsplit("\nNode: ", 1)[1].partition("\n")[2]
    message = re.sub(r"^\d+ root error\(s\) found\.\s*\(0\) \w+: ", "", message)
    message = re.split(r"\n\t \[\[|\n\s*Original stack trace for ", message)[0]
    message = re.sub(r"^(\{\{\w+ [^}]*\}\}\s*)+", "", message).strip()
    if len(message) > _LONGEST_KERNEL_MESSAGE:  # it may quote the whole request
        message = message[:_LONGEST_KERNEL_MESSAGE] + "...TRUNCATED"
    return message if path is None else without_path(message, path)


def _as_array(value: Any) -> np.ndarray:
    """A Session gives a scalar string as bytes, and numpy by itself would cut zeros off its end."""
    return np.array(value, dtype=object) if isinstance(value, bytes) else np.asarray(value)


def type_name(number: int) -> str:
    """A tensor type's name as TensorFlow's own messages write it: "float", "int64", "string"."""
    return types_pb2.DataType.Name(number).removeprefix("DT_").lower()


def shape_of(info: meta_graph_pb2.TensorInfo) -> list[int | None] | None:
    """Declared shape, None for a free dimension, or None altogether when the rank is free."""
    if info.tensor_shape.unknown_rank:
        return None
    return [None if dim.size < 0 else dim.size for dim in info.tensor_shape.dim]


def _names(names: Iterable[str]) -> str:
    return "{" + ",".join(sorted(names)) + "}"


def _with_defaults(definition: meta_graph_pb2.SignatureDef, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The inputs in the signature's order, with the signature's own defaults for what the request leaves out."""
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
    # In the signature's order: what is the same question keeps one prepared call.
    return tuple(name for name in definition.outputs if name in wanted or not wanted)
