"""Conversion between the weights of a classifier and the state of a PyTorch checkpoint.

The reference saves a network inside its attacker and inside DataParallel, so each weight has two keys:
module.model.conv1.weight and module.attacker.model.conv1.weight. Some networks have one more "model." in front, and
other training code uses other prefixes. This module ignores them and uses the core key, conv1.weight.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping

import keras
import ml_dtypes
import numpy as np

from robust_tf.errors import UserError, unknown_name
from robust_tf.models.architectures import ARCHITECTURES, Architecture
from robust_tf.models.large_weights import tensor_over, untouched_zeros
from robust_tf.models.reference_checkpoint import without_wrappers
from robust_tf.models.torch_file import let_go

State = Mapping[str, np.ndarray]

_MAX_CHANNELS = 16


@dataclasses.dataclass(frozen=True)
class _Slot:
    """A variable of the classifier, with the conversion between its layout in Keras and in PyTorch.

    Attributes:
        variable: Variable of the classifier.
        groups: Number of groups of a kernel, or None for a vector, which has the same layout in both.
    """

    variable: keras.Variable
    groups: int | None = None

    def from_reference(self, array: np.ndarray) -> np.ndarray:
        """Converts (outputs, inputs / groups, *area) into Keras's layout, (*area, inputs, outputs / groups).

        The inputs of a grouped kernel are in the order of `layers.shuffle_channels`.
        """
        if self.groups is None:
            return array
        outputs, members, *area = array.shape
        array = array.reshape(self.groups, outputs // self.groups, members, *area)
        array = array.transpose(*range(3, 3 + len(area)), 2, 0, 1)
        return array.reshape(*area, self.groups * members, outputs // self.groups)

    def fill(self, array: np.ndarray) -> None:
        """Assigns an array of the reference to the variable. Makes only one copy, because kernels may take 400 MB."""
        values = self.from_reference(array)  # still a view, and of the stored type
        # Assigning the array itself would make two more copies, and after a partial update TensorFlow would copy the
        # variable at every read.
        copy = untouched_zeros(values.shape)
        copy[...] = values
        self.variable.assign(tensor_over(copy))

    def to_reference(self) -> np.ndarray:
        """Returns the value of the variable in the reference's layout, the inverse of `from_reference`."""
        array: np.ndarray = keras.ops.convert_to_numpy(self.variable)
        if self.groups is None:
            return array
        *area, inputs, outputs = array.shape
        array = array.reshape(*area, inputs // self.groups, self.groups, outputs)
        array = array.transpose(len(area) + 1, len(area) + 2, len(area), *range(len(area)))
        return np.ascontiguousarray(array.reshape(self.reference_shape))

    @property
    def reference_shape(self) -> tuple[int, ...]:
        """Shape of the counterpart in the reference."""
        shape = tuple(self.variable.shape)
        if self.groups is None:
            return shape
        *area, inputs, outputs = shape
        return (self.groups * outputs, inputs // self.groups, *area)


def load_reference_state(classifier: keras.Model, state: State) -> None:
    """Assigns the weights of a PyTorch checkpoint to a classifier. Everything is checked before anything changes.

    Args:
        classifier: Classifier from `build_classifier`, which is changed in place.
        state: Arrays by the keys of the checkpoint, with or without prefixes. Half precision is converted. The
            attacker's copy of the model and the batch counters of BatchNorm are ignored.

    Raises:
        UserError: Keys are missing or unknown, or the shapes, the architecture or the normalization differ.

    Example:
        >>> from robust_tf.models import build_classifier
        >>> constants = {"image_size": 32, "mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}
        >>> state = to_reference_state(build_classifier("resnet8", 10, **constants))
        >>> load_reference_state(build_classifier("resnet8", 10, **constants), state)
    """
    slots = _slots(classifier)
    core = _core_state(state)
    _check_keys(classifier, slots, core)
    _check_normalization(classifier, state)
    for key, slot in slots.items():
        slot.fill(core[key])
        let_go(core[key])


def to_reference_state(classifier: keras.Model) -> dict[str, np.ndarray]:
    """Returns the weights of a classifier as a plain PyTorch state_dict, including hidden layers of the head.

    Args:
        classifier: Classifier whose name is an architecture in `ARCHITECTURES`.

    Returns:
        Float32 arrays in PyTorch's layouts by core key, and an int64 zero for the num_batches_tracked of each
        BatchNorm. The normalization is not included, because PyTorch users apply it in their data pipelines.

    Raises:
        UserError: The architecture is unknown, or the classifier has a layer that the reference does not have.

    Example:
        >>> from robust_tf.models import build_classifier
        >>> model = build_classifier("resnet8", 10, image_size=32, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
        >>> to_reference_state(model)["conv1.weight"].shape
        (16, 3, 3, 3)
    """
    state = {}
    for key, slot in _slots(classifier).items():
        state[key] = slot.to_reference()
        if key.endswith(".running_var"):
            state[key.replace("running_var", "num_batches_tracked")] = np.zeros((), np.int64)
    return state


def reference_architecture(state: State) -> str | None:
    """Returns the architecture with the same head and the same number of parameters as a checkpoint, or None.

    Args:
        state: Arrays by the keys of the checkpoint.

    Example:
        >>> from robust_tf.models import build_classifier
        >>> model = build_classifier("resnet8", 10, image_size=32, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
        >>> reference_architecture(to_reference_state(model))
        'resnet8'
    """
    core = _core_state(state)
    for name, entry in ARCHITECTURES.items():
        head = entry.reference_module("logits")
        kernel = core.get(f"{head}.weight")
        if kernel is None or kernel.shape[1:] != (entry.feature_dim,):
            continue
        parameters = sum(
            array.size
            for key, array in core.items()
            if key.endswith((".weight", ".bias")) and not key.startswith(f"{head}.")
        )
        if parameters == entry.parameters:
            return name
    return None


def reference_num_classes(state: State, architecture: str) -> int:
    """Returns the number of classes of a checkpoint.

    Args:
        state: Arrays by the keys of the checkpoint.
        architecture: Architecture of the checkpoint, a name in `ARCHITECTURES`.

    Raises:
        UserError: The checkpoint has no head of this architecture.

    Example:
        >>> reference_num_classes({"linear.weight": np.zeros((10, 64), np.float32)}, "resnet8")
        10
    """
    entry = _entry(architecture)
    key = f"{entry.reference_module('logits')}.weight"
    kernel = _core_state(state).get(key)
    if kernel is None or kernel.ndim != 2:
        raise UserError(
            f"The checkpoint holds no head {key!r}. Received: architecture={architecture}, keys {_first(state)}."
            + _advice(state, architecture)
        )
    # With a wrong number of columns, a small file could demand a classifier many times as large as itself.
    if kernel.shape[1] != entry.feature_dim or kernel.size == 0 or not _is_floating_point(kernel.dtype):
        raise UserError(
            f"The head {key!r} must have floating-point numbers in rows of {entry.feature_dim}. Received: "
            f"{kernel.dtype} of shape {kernel.shape}, architecture={architecture}." + _advice(state, architecture)
        )
    return int(kernel.shape[0])


def reference_normalization(state: State) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Returns the mean and standard deviation of the channels that a checkpoint stores for the normalization.

    Args:
        state: Arrays by the keys of the checkpoint.

    Returns:
        A tuple (mean, std) with three numbers each, in [0, 1] pixel units, for `build_classifier`. None for a plain
        state_dict, which does not store them.

    Example:
        >>> constants = {"normalizer.new_mean": np.full(3, 0.5), "normalizer.new_std": np.full(3, 0.25)}
        >>> reference_normalization(constants)
        ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    """
    arrays = _normalization_arrays(state)
    if arrays is None:
        return None
    mean, std = arrays
    return _decimals(mean), _decimals(std)


def _decimals(array: np.ndarray) -> tuple[float, ...]:
    """Returns the shortest decimal numbers that represent the values: 0.485 instead of 0.48500001430511475."""
    return tuple(float(str(value)) for value in array.ravel())


def _normalization_arrays(state: State) -> tuple[np.ndarray, np.ndarray] | None:
    found = {key.rpartition(".")[2]: array for key, array in state.items()}
    if "new_mean" not in found or "new_std" not in found:
        return None
    for name in ("new_mean", "new_std"):
        if not 1 <= found[name].size <= _MAX_CHANNELS or not _is_floating_point(found[name].dtype):
            raise UserError(
                f"{name} of a checkpoint must hold one number for each channel. Received: {found[name].dtype} of shape "
                f"{_cut(str(found[name].shape))}."
            )
    return found["new_mean"], found["new_std"]


def _core_state(state: State) -> dict[str, np.ndarray]:
    """Returns the weights of the network in a state, by core key."""
    core: dict[str, np.ndarray] = {}
    for key, array in state.items():
        name = without_wrappers(key)
        if name.startswith(("attacker.", "normalizer.")) or name.endswith((".num_batches_tracked", "n_averaged")):
            continue
        # torchvision's DenseNet files are older than PyTorch's ban on dots in module names, and say norm.1 for norm1.
        name = re.sub(r"(denselayer\d+\.(?:norm|conv))\.([12])\.", r"\1\2.", name)
        if name in core:
            raise UserError(
                f"A checkpoint must hold each weight once. Received: {_cut(key)} for {_cut(name)}, which is also "
                "stored under another key. Keep only one copy of the weights in the file."
            )
        core[name] = array
    return core


def _entry(architecture: str) -> Architecture:
    if architecture not in ARCHITECTURES:
        raise unknown_name("architecture", architecture, ARCHITECTURES)
    return ARCHITECTURES[architecture]


def _slots(classifier: keras.Model) -> dict[str, _Slot]:
    """Returns the variables of a classifier by the core keys of their counterparts."""
    entry = _entry(classifier.name)
    head = entry.reference_module("logits")
    hidden = [layer.name for layer in classifier.layers if layer.name.startswith("head_hidden")]
    modules = {name: f"{head}.{2 * index}" for index, name in enumerate(hidden)}  # each is followed by a ReLU
    if hidden:
        modules["logits"] = f"{head}.{2 * len(hidden)}"

    slots = {}
    for layer in classifier.layers:
        if not layer.weights:
            continue
        try:
            module = modules.get(layer.name) or entry.reference_module(layer.name)
        except (LookupError, ValueError):
            raise UserError(
                f"Every layer must have a counterpart in the reference's {classifier.name}. Received: {layer.name!r}, "
                "which has none."
            ) from None
        if isinstance(layer, keras.layers.BatchNormalization):
            slots[f"{module}.weight"] = _Slot(layer.gamma)
            slots[f"{module}.bias"] = _Slot(layer.beta)
            slots[f"{module}.running_mean"] = _Slot(layer.moving_mean)
            slots[f"{module}.running_var"] = _Slot(layer.moving_variance)
            continue
        groups = 1
        if isinstance(layer, keras.layers.DepthwiseConv2D):
            # `Layers.conv` implements groups of m channels with m outputs for each channel.
            groups = layer.kernel.shape[2] // layer.depth_multiplier
        slots[f"{module}.weight"] = _Slot(layer.kernel, groups)
        if layer.bias is not None:
            slots[f"{module}.bias"] = _Slot(layer.bias)
    return slots


def _check_keys(classifier: keras.Model, slots: Mapping[str, _Slot], core: State) -> None:
    shared = slots.keys() & core.keys()
    problems = {
        "missing": slots.keys() - core.keys(),
        "left over": core.keys() - slots.keys(),
        "of another shape": {
            f"{key} {core[key].shape}, not {slots[key].reference_shape}"
            for key in shared
            if core[key].shape != slots[key].reference_shape
        },
        "not of floating-point numbers": {
            f"{key} ({core[key].dtype})" for key in shared if not _is_floating_point(core[key].dtype)
        },
    }
    if any(problems.values()):
        num_classes = classifier.output_shape[-1]
        listed = "; ".join(f"{len(keys)} {kind}: {_first(keys)}" for kind, keys in problems.items() if keys)
        raise UserError(
            f"The checkpoint does not fit {classifier.name} with {num_classes} classes. Received: keys {listed}."
            + _advice(core, classifier.name, num_classes)
        )


def _is_floating_point(dtype: np.dtype) -> bool:
    return dtype.kind == "f" or dtype == ml_dtypes.bfloat16  # NumPy's kind of bfloat16 is raw bytes


def _first(keys: Iterable[str], count: int = 3) -> str:
    names = sorted(keys)
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(map(_cut, names[:count])) + more


def _cut(text: str, length: int = 60) -> str:
    """Returns at most `length` printable characters of a text from a file."""
    text = text if text.isprintable() else repr(text)[1:-1]
    return text if len(text) <= length else f"{text[: length - 3]}..."


def _advice(state: State, architecture: str, num_classes: int | None = None) -> str:
    """Returns a sentence that names what a checkpoint fits, for the message that it does not fit an architecture."""
    fitting = reference_architecture(state)
    if fitting is None:
        return " No other architecture fits it either."
    its_classes = reference_num_classes(state, fitting)
    if (fitting, its_classes) == (architecture, num_classes):
        return " It was damaged or edited: the number of parameters is right."
    return f" It fits architecture={fitting} with num_classes={its_classes}."


def _check_normalization(classifier: keras.Model, state: State) -> None:
    arrays = _normalization_arrays(state)
    if arrays is None:
        return
    layer = classifier.get_layer("normalization")
    ours = (np.ravel(layer.mean), np.sqrt(np.ravel(layer.variance)))
    for name, array, own in zip(("mean", "std"), arrays, ours, strict=True):
        half = array.dtype in (np.float16, ml_dtypes.bfloat16)
        precision = 2 * float(ml_dtypes.finfo(array.dtype if half else np.float32).eps)
        if array.size != own.size or not np.allclose(array.ravel(), own, rtol=precision, atol=0):
            raise UserError(
                f"The checkpoint and the classifier must normalize images in the same way. Received: "
                f"{name}={_decimals(array)} in the checkpoint, {_decimals(own)} in the classifier. Build the "
                "classifier with the mean and std from `reference_normalization`."
            )
