"""The loss that a trainer was compiled with, for each image separately: the function that the attack maximizes."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import keras
import numpy as np
import tensorflow as tf

from robust_tf.attacks.losses import LOSSES
from robust_tf.errors import UserError
from robust_tf.training.metrics import CrossEntropy
from robust_tf.training.runtime_checks import checked

Scores = Literal["logits", "probabilities"]
# If given as functions or by name, these losses expect probabilities unless `from_logits` is set.
_CROSSENTROPIES = (
    keras.losses.binary_crossentropy,
    keras.losses.binary_focal_crossentropy,
    keras.losses.categorical_crossentropy,
    keras.losses.categorical_focal_crossentropy,
    keras.losses.sparse_categorical_crossentropy,
)
_SPARSE = (keras.losses.SparseCategoricalCrossentropy, keras.losses.sparse_categorical_crossentropy)
# For these names Keras chooses the cross-entropy that fits the shapes of the labels and outputs.
_BY_SHAPE = ("crossentropy", "ce")


class CompiledLoss:
    """The compiled loss before it is averaged over the batch.

    Works for every loss that Keras accepts in `compile`: names, functions, `keras.losses.Loss` objects, and lists or
    dicts of them for models with several outputs. A loss must return one value for each image, or an array of values
    for each image, which is averaged.

    Args:
        loss: Loss as given to `compile`.
        loss_weights: Weights of the losses as given to `compile`.
        outputs: Outputs of the model for some batch: a tensor, or a list, tuple or dict of tensors.
        output_names: The model's names for its outputs, if it has any, for use in a dict of losses.

    Raises:
        UserError: There is no loss; a loss expects probabilities and the model returns logits, or the other way
            around; or the losses do not match the outputs.
    """

    def __init__(self, loss: Any, loss_weights: Any, *, outputs: Any, output_names: Sequence[str] = ()) -> None:
        if loss is None:
            raise UserError(
                "The attack maximizes the compiled loss, so `compile` needs a loss. Received: loss=None. For logits "
                "and integer labels use keras.losses.SparseCategoricalCrossentropy(from_logits=True)."
            )
        self._names = _names_of(outputs, output_names)
        losses = self._by_name("loss", loss, shared=True)
        self._losses = {name: _resolved(value) for name, value in losses.items() if value is not None}
        weights = {} if loss_weights is None else self._by_name("loss_weights", loss_weights, shared=True)
        self._weights = {name: 1.0 if weights.get(name) is None else float(weights[name]) for name in self._losses}
        self._scores: dict[str, Scores | None] = {}
        self._num_classes = {name: output.shape[-1] for name, output in self._by_name("outputs", outputs).items()}
        for name, output in self._by_name("outputs", outputs).items():
            if name in self._losses:
                self._scores[name] = _checked_scores(self._losses[name], output, name)

    def __call__(self, labels: Any, outputs: Any, sample_weight: Any = None) -> tf.Tensor:
        """Returns the loss of each image, (batch,) float32.

        Args:
            labels: Labels in the form that `fit` takes.
            outputs: Outputs of the model.
            sample_weight: Factors for the losses of the images: None, an array (batch,), or for several outputs a
                structure of such arrays.
        """
        outputs = self._by_name("outputs", outputs)
        labels = self._by_name("labels", labels)
        weights = {} if sample_weight is None else self._by_name("sample_weight", sample_weight, shared=True)
        total = None
        for name, loss in self._losses.items():
            values = _of_each_image(loss, labels[name], outputs[name])
            if weights.get(name) is not None:
                values *= tf.reshape(tf.cast(weights[name], tf.float32), [-1])
            if self._weights[name] != 1.0:
                values *= self._weights[name]
            total = values if total is None else total + values
        return total

    @property
    def counts_hits(self) -> bool:
        """Whether predictions can be right or wrong: there is exactly one output, and it holds class scores."""
        return len(self._losses) == 1 and next(iter(self._scores.values())) is not None

    @property
    def integer_labels(self) -> bool | None:
        """Whether the labels are integer classes, or None if the loss does not determine it."""
        kinds = {_takes_integers(loss) for loss in self._losses.values()}
        return kinds.pop() if len(kinds) == 1 else None

    def with_labels_checked(self, images: tf.Tensor, labels: Any) -> tf.Tensor:
        """Returns the images unchanged, but checks that integer labels are valid classes before the images are used.

        Args:
            images: Images of a batch.
            labels: Labels of the batch.
        """
        for name, values in self._by_name("labels", labels).items():
            loss = self._losses.get(name)
            if not _takes_integers(loss) or getattr(loss, "ignore_class", None) is not None:
                continue
            count = self._num_classes[name]
            low, high = (tf.cast(reduce(values), tf.int32) for reduce in (tf.reduce_min, tf.reduce_max))
            message = (
                f"Labels must be in 0..{count - 1}: {name!r} has {count} classes. Received: labels from {{}} to {{}}."
            )
            within = tf.equal(tf.size(values), 0) | ((low >= 0) & (high < count))
            images = checked(images, within, message, low, high)
        return images

    def hits(self, labels: Any, outputs: Any) -> tf.Tensor:
        """Returns whether each image is classified correctly, (batch,) bool. All are False if `counts_hits` is False.

        The prediction is the class of the highest score. The true class is the label or, for soft labels, the class
        with the largest share. A single score stands for the classes 0 and 1.

        Args:
            labels: Labels in the form that `fit` takes.
            outputs: Outputs of the model.
        """
        ((name, scores),) = list(self._scores.items())[:1]
        output = self._by_name("outputs", outputs)[name]
        if not self.counts_hits:
            return tf.zeros(tf.shape(output)[:1], tf.bool)
        label = tf.convert_to_tensor(self._by_name("labels", labels)[name])
        if output.shape[-1] == 1:
            positive = tf.reshape(output, [-1]) > (0.5 if scores == "probabilities" else 0.0)
            return tf.equal(positive, tf.reshape(tf.cast(label, tf.float32), [-1]) > 0.5)
        predicted = tf.argmax(output, axis=-1, output_type=tf.int32)
        if label.shape.rank == 2 and label.shape[-1] != 1:
            return tf.equal(predicted, tf.argmax(label, axis=-1, output_type=tf.int32))
        return tf.equal(predicted, tf.reshape(tf.cast(label, tf.int32), [-1]))

    def class_logits(self, outputs: Any) -> tf.Tensor:
        """Returns logits (batch, num_classes), float32. A single score becomes the logits of the classes 0 and 1.

        Args:
            outputs: Outputs of the model.

        Raises:
            UserError: There are several outputs, or the output does not hold class scores.
        """
        if not self.counts_hits:
            raise UserError(
                "This objective compares class probabilities, so it needs a single output of class scores and a "
                f"cross-entropy loss. Received: losses for the outputs {sorted(self._losses)}. Use Recipe() instead."
            )
        ((name, scores),) = self._scores.items()
        output = tf.cast(self._by_name("outputs", outputs)[name], tf.float32)
        if output.shape[-1] == 1:
            if scores == "probabilities":
                output = tf.math.log(tf.maximum(output, 1e-30)) - tf.math.log(tf.maximum(1.0 - output, 1e-30))
            return tf.concat([tf.zeros_like(output), output], axis=-1)
        return tf.math.log(tf.maximum(output, 1e-30)) if scores == "probabilities" else output

    def _by_name(self, what: str, values: Any, *, shared: bool = False) -> dict[str, Any]:
        """Returns the values as a dict by output name. With `shared`, a single value applies to all outputs."""
        if isinstance(values, Mapping):
            unknown = sorted(set(values) - set(self._names))
            if not unknown:
                return dict(values)
            raise UserError(
                f"The keys of `{what}` must be outputs of the model, {list(self._names)}. Received: {unknown}."
            )
        if isinstance(values, (list, tuple)):
            if len(values) == len(self._names):
                return dict(zip(self._names, values, strict=True))
            raise UserError(
                f"`{what}` needs one entry for each output, {list(self._names)}. Received: {len(values)} entries."
            )
        if shared or len(self._names) == 1:
            return dict.fromkeys(self._names, values)
        raise UserError(
            f"The model has the outputs {list(self._names)}, so `{what}` must be a list or a dict with an entry for "
            f"each output. Received: one {type(values).__name__}."
        )


def _names_of(outputs: Any, output_names: Sequence[str]) -> tuple[str, ...]:
    if isinstance(outputs, Mapping):
        return tuple(outputs)
    if isinstance(outputs, (list, tuple)):
        named = len(output_names) == len(outputs)
        return tuple(output_names) if named else tuple(f"output_{index}" for index in range(len(outputs)))
    return tuple(output_names) if len(output_names) == 1 else ("output",)


def _resolved(loss: Any) -> Any:
    """Returns a `keras.losses.Loss`, a function, or one of `_BY_SHAPE`."""
    if isinstance(loss, str) and loss.lower() in _BY_SHAPE:
        return loss.lower()
    return keras.losses.get(loss)


def _of_each_image(loss: Any, labels: Any, outputs: tf.Tensor) -> tf.Tensor:
    """Returns the values of one loss, (batch,) float32."""
    labels = tf.convert_to_tensor(labels)
    if _takes_integers(loss):
        labels = _class_numbers(labels, outputs)
    if _is_softmax_crossentropy(loss) and outputs.shape.rank == 2 and (labels.shape.rank == 1 or labels.shape[-1] == 1):
        labels = tf.reshape(tf.cast(labels, tf.int32), [-1])
        return LOSSES["ce"](tf.cast(outputs, tf.float32), labels, labels)
    if not _takes_integers(loss) and labels.shape.rank == outputs.shape.rank - 1 and outputs.shape[-1] == 1:
        labels = labels[..., None]  # Keras, too, accepts labels (batch,) for outputs (batch, 1)
    if isinstance(loss, keras.losses.Loss):
        # `call` returns the losses before they are averaged.
        values = loss.call(tf.cast(labels, loss.dtype), tf.cast(outputs, loss.dtype))
    else:
        function = _by_shape(labels, outputs) if loss in _BY_SHAPE else loss
        values = function(tf.cast(labels, outputs.dtype), outputs)
    values = tf.cast(values, tf.float32)
    if values.shape.rank == 0:
        raise UserError(
            "The attack needs the loss of each image, so a compiled loss must return an array (batch,), which Keras "
            f"averages. Received: a loss {_name_of(loss)} that returns one number for the whole batch."
        )
    return tf.reduce_mean(values, axis=list(range(1, values.shape.rank))) if values.shape.rank > 1 else values


def _class_numbers(labels: tf.Tensor, outputs: tf.Tensor) -> tf.Tensor:
    """Returns integer labels as int32, without a last axis of length 1: one for each image, or each output position."""
    if labels.shape.rank == outputs.shape.rank and labels.shape[-1] == 1:  # (batch, 1), as in Keras's own data sets
        labels = labels[..., 0]
    if labels.shape.rank not in (None, outputs.shape.rank - 1):
        raise UserError(
            f"The compiled loss takes integer labels, (batch,). Received: labels of shape {labels.shape}. For one-hot "
            "labels compile keras.losses.CategoricalCrossentropy."
        )
    return tf.cast(labels, tf.int32)


def _by_shape(labels: tf.Tensor, outputs: tf.Tensor) -> Callable[[tf.Tensor, tf.Tensor], tf.Tensor]:
    function: Callable[[tf.Tensor, tf.Tensor], tf.Tensor] = keras.losses.categorical_crossentropy
    if outputs.shape[-1] == 1:
        function = keras.losses.binary_crossentropy
    elif labels.shape.rank < outputs.shape.rank or labels.shape[-1] == 1:
        function = keras.losses.sparse_categorical_crossentropy
    return function


def _function_of(loss: Any) -> Any:
    return loss.func if isinstance(loss, functools.partial) else loss


def _takes_integers(loss: Any) -> bool | None:
    """Returns whether a loss takes integer labels, or None for a custom loss, which may take anything."""
    function = _function_of(loss)
    if function in _SPARSE or isinstance(loss, keras.losses.SparseCategoricalCrossentropy):
        return True
    if loss in _BY_SHAPE:
        return None
    home = type(loss) if isinstance(loss, keras.losses.Loss) else function
    return False if getattr(home, "__module__", "").startswith("keras.") else None


def _is_binary(loss: Any) -> bool:
    """Returns whether a loss treats each score as the score of an independent label."""
    kinds = (keras.losses.BinaryCrossentropy, keras.losses.BinaryFocalCrossentropy)
    return isinstance(loss, kinds) or _function_of(loss) in _CROSSENTROPIES[:2]


def _is_softmax_crossentropy(loss: Any) -> bool:
    """Returns whether a loss is the plain softmax cross-entropy, so that LOSSES["ce"] can compute it instead."""
    if type(loss) is CrossEntropy:
        return loss.class_weights is None
    plain = type(loss) is keras.losses.SparseCategoricalCrossentropy and loss.dtype == "float32"
    return plain and loss.from_logits and getattr(loss, "ignore_class", None) is None


def _expected_scores(loss: Any) -> Scores | None:
    """Returns whether a loss expects logits or probabilities, or None if that is unknown."""
    if isinstance(loss, str):
        return "probabilities"
    from_logits = getattr(loss, "from_logits", None)
    if _function_of(loss) in _CROSSENTROPIES:
        from_logits = isinstance(loss, functools.partial) and loss.keywords.get("from_logits", False)
    return None if from_logits is None else "logits" if from_logits else "probabilities"


def _checked_scores(loss: Any, output: Any, name: str) -> Scores | None:
    """Returns whether an output holds logits or probabilities, or None if it has no mutually exclusive classes.

    Raises:
        UserError: The scores are not what the loss expects.
    """
    expected = _expected_scores(loss)
    values = np.asarray(output, np.float32)
    # A single score may lie in [0, 1] by chance. In half precision probabilities sum to 1 within a hundredth.
    found = bool(values.min() >= 0 and values.max() <= 1)
    of_each_label = _is_binary(loss) and values.shape[-1] > 1
    if values.shape[-1] > 1 and not of_each_label:
        found = found and bool(np.all(np.abs(values.sum(axis=-1) - 1) < 0.02))
    if expected is None:
        is_custom = _takes_integers(loss) is None
        if is_custom and values.ndim == 2 and values.shape[-1] > 1:
            return "probabilities" if found else "logits"
        return None
    if expected == "probabilities" and not found:
        raise UserError(
            f"The compiled loss {_name_of(loss)} expects probabilities, but the classifier returns logits. "
            f"Received: values from {values.min():.3g} to {values.max():.3g} in {name!r}. "
            "Compile the loss with from_logits=True."
        )
    if expected == "logits" and found and values.shape[-1] > 1 and not of_each_label:
        raise UserError(
            f"The compiled loss {_name_of(loss)} expects logits (from_logits=True), but the classifier returns "
            f"probabilities. Received: rows of {name!r} that sum to 1. Remove the softmax from the classifier, since "
            "the programs of robust_tf expect logits, or compile the loss with from_logits=False."
        )
    return None if of_each_label or values.ndim != 2 else expected


def _name_of(loss: Any) -> str:
    return loss if isinstance(loss, str) else getattr(_function_of(loss), "__name__", type(loss).__name__)
