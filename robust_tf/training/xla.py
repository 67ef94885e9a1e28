"""XLA for the training step: whether it compiles, also with deterministic kernels, and lines that say so."""

import time
import warnings
from typing import Any, Literal

import keras
import tensorflow as tf
from tensorflow.python.framework import config as tf_config  # there are no public functions for these
from tensorflow.python.framework import ops

from robust_tf.console import console
from robust_tf.environment import seal_xla_cache
from robust_tf.models.pooling import use_deterministic_pooling
from robust_tf.training.batchnorm import flat_layers

# The numbers of functions that are traced later begin with these. An earlier trace has far lower ones.
_FIRST_NUMBERS = {"training": 10**6, "validation": 2 * 10**6, "test": 3 * 10**6}


def number_functions(kind: Literal["training", "validation", "test"]) -> None:
    """Gives the functions that TensorFlow traces from now on the same numbers in every run.

    TensorFlow puts a number into the name of every function, and XLA's cache finds a program only if all names are the
    same. Without this call a run that continues after an interruption would compile again, because it traces other
    functions before.

    Args:
        kind: The step that will be traced.
    """
    first = _FIRST_NUMBERS[kind]
    number = ops.uid()
    while number < first or number % 10**6:
        number = ops.uid()


def prepare_for_xla(model: keras.Model) -> None:
    """Replaces operations of a model that XLA has no deterministic kernels for, if TensorFlow is limited to those.

    Args:
        model: Model that XLA will compile.
    """
    if tf_config.is_op_determinism_enabled():
        use_deterministic_pooling(model)


def compiles_with_xla(jit_compile: bool | Literal["auto"], model: keras.Model) -> bool:
    """Returns whether XLA compiles the steps of a model.

    Args:
        jit_compile: True, False, or "auto" for XLA on accelerators only. On a CPU XLA's convolutions are slow.
        model: Model whose layers must support XLA.
    """
    if jit_compile == "auto":
        jit_compile = any(device.device_type != "CPU" for device in tf.config.list_physical_devices())
    return jit_compile and all(layer.supports_jit for layer in flat_layers(model))


class CompiledByXla(keras.Model):
    """A model that XLA may compile, also if TensorFlow is limited to deterministic kernels.

    Keras does not compile with XLA in deterministic mode, because an operation might have no deterministic kernel. But
    TensorFlow then passes the demand on to XLA, which either finds a deterministic kernel or reports an error.
    """

    @property
    def jit_compile(self) -> bool:
        """Whether XLA compiles the steps of `fit` and `evaluate`."""
        return getattr(self, "_compiled_by_xla", False)

    @jit_compile.setter
    def jit_compile(self, value: bool) -> None:
        self._compiled_by_xla = bool(value)

    def compile(self, optimizer: Any = "rmsprop", loss: Any = None, loss_weights: Any = None, **kwargs: Any) -> None:
        """Configures the training as `keras.Model.compile` does, with the same arguments.

        `jit_compile="auto"` uses XLA on accelerators only. A model with a layer that does not support XLA is never
        compiled.
        """
        jit_compile = kwargs.pop("jit_compile", "auto")
        compiles = not kwargs.get("run_eagerly") and compiles_with_xla(jit_compile, self)
        if jit_compile is True and not compiles and not kwargs.get("run_eagerly"):
            warnings.warn("A layer does not support XLA, so it does not compile the model.", stacklevel=2)
        if compiles:
            prepare_for_xla(self)
        super().compile(optimizer, loss, loss_weights, jit_compile=compiles, **kwargs)


class CompilingLines(keras.callbacks.Callback):
    """Prints a line before XLA compiles a step of `fit`, and another one after it, and keeps what XLA has compiled."""

    def __init__(self) -> None:
        super().__init__()
        self._compiled: dict[str, Any] = {}
        self._start: float | None = None

    def on_train_batch_begin(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Prints that XLA compiles, if this is the first step."""
        self._begin("training", self.model.train_function)

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Prints how long the first step took."""
        self._end("training")

    def on_test_batch_begin(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Prints that XLA compiles, if this is the first step of the validation."""
        self._begin("validation", self.model.test_function)

    def on_test_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Prints how long the first step of the validation took."""
        self._end("validation")

    def _begin(self, kind: Literal["training", "validation"], function: Any) -> None:
        # `compile` replaces the functions, and then XLA compiles again.
        if not self.model.jit_compile or self._compiled.get(kind) is function:
            return
        self._compiled[kind], self._start = function, time.perf_counter()
        console.print(f"Compiling the {kind} step with XLA, which takes about a minute for a large network.")
        number_functions(kind)

    def _end(self, kind: str) -> None:
        if self._start is None:
            return
        seconds, self._start = time.perf_counter() - self._start, None
        reason = "the program was in the cache" if seal_xla_cache() == 0 else "most of it for compiling"
        console.print(f"The first {kind} step took {seconds:.0f} s, {reason}.")


def execution_line(
    jit_compile: str, *, compiled: bool, deterministic: bool, replicas: int, precision: str, tf32: bool
) -> str:
    """Returns one sentence that says how the training step runs, why, and what that costs.

    Args:
        jit_compile: Value of `--jit_compile`.
        compiled: Whether XLA compiles the step.
        deterministic: Whether TensorFlow is limited to deterministic kernels.
        replicas: Number of replicas.
        precision: Value of `--precision`.
        tf32: Value of `--tf32`.
    """
    gpu = bool(tf.config.list_physical_devices("GPU"))
    accelerated = any(device.device_type != "CPU" for device in tf.config.list_physical_devices())
    if compiled:
        how = "compiled with XLA" if jit_compile == "auto" or accelerated else "compiled with XLA, slow on a CPU"
        how += ", except for the exchange between the replicas" if replicas > 1 else ""
    elif jit_compile == "false":
        how = f"not compiled with XLA (--jit_compile=false){', which is slower on a GPU' if gpu else ''}"
    elif jit_compile == "auto" and not accelerated:
        how = "not compiled with XLA, which is slow on a CPU (--jit_compile=true compiles anyway)"
    else:
        how = "not compiled with XLA, because a layer of the network does not support it"
    kernels = "deterministic kernels, slower on a GPU" if deterministic and gpu else "deterministic kernels"
    parts = [how, kernels if deterministic else "kernels that need not be deterministic"]
    if gpu and precision == "float32":
        parts.append(
            "float32 products in TF32 (--notf32: in float32)" if tf32 else "float32 products in full precision"
        )
    return f"The training step is {'; '.join(parts)}."
