"""The losses that attacks raise, and their gradients with respect to the images."""

import functools
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import keras
import tensorflow as tf

from robust_tf.attacks.loops import step_of_loop
from robust_tf.attacks.outputs import CheckedModel, Model, outputs_of
from robust_tf.attacks.outputs import logits_of as logits_of
from robust_tf.attacks.outputs import with_classes as with_classes
from robust_tf.errors import AttackWarning, UserError, unknown_name

# The gradient of the loss with respect to each image's logits is scaled so that its largest value is between half of
# this number and this number. It then goes back through the network, and the result is scaled back. Without this, most
# input gradients would underflow in float16.
_LARGEST_SLOPE = 256.0

# Below this log-odds, exp is continued by its tangent, because float32 rounds it to 0 below about -87.
_LOWEST_LOG_ODDS = -60.0

NO_GRADIENT_MEANS = (
    "Attacks that follow gradients hardly change such images, so the robust accuracy is an overestimate. "
    "Remove from the model what stops its gradient (rounding, stop_gradient, NumPy code, another framework), or use "
    "square, which needs no gradient."
)


# The suggested function gives the first class a logit of 0 and the second class the model's logit.
ONE_LOGIT = (
    "A classifier must return logits (batch, classes) for 2 classes or more. Received: one output for each image. Turn "
    "it into two logits with lambda images: tf.pad(model(images), [[0, 0], [1, 0]]), without a sigmoid at the end."
)


def is_correct(logits: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
    """Returns whether each prediction is the label, (batch,) bool."""
    # Not `==`, whose result has no static shape if the batch size of one side is unknown.
    return tf.equal(tf.argmax(logits, axis=-1, output_type=tf.int32), labels)


def margin_of(logits: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
    """Returns the label's logit minus the best other logit, (batch,) float32; negative if the prediction is wrong."""
    return _of_class(logits, labels) - tf.reduce_max(_without_class(logits, labels), axis=-1)


def likeliest_targets(logits: tf.Tensor, labels: tf.Tensor, count: int) -> tf.Tensor:
    """Returns the `count` classes with the highest logits except the label, likeliest first, (batch, count) int32."""
    return tf.math.top_k(_without_class(logits, labels), k=count).indices


def _of_class(logits: tf.Tensor, classes: tf.Tensor) -> tf.Tensor:
    return tf.gather(logits, classes, axis=-1, batch_dims=1)


def _without_class(logits: tf.Tensor, classes: tf.Tensor) -> tf.Tensor:
    excluded = tf.one_hot(classes, tf.shape(logits)[-1], on_value=True, off_value=False)
    return tf.where(excluded, -float("inf"), logits)


def _cross_entropy(logits: tf.Tensor, labels: tf.Tensor, targets: tf.Tensor) -> tf.Tensor:
    """Returns TensorFlow's cross-entropy, corrected where the label's probability was rounded to 1.

    Above a margin of about 17, TensorFlow's loss is log(1) = 0, and the label's part of the gradient is 0 too. A very
    confident classifier would then seem robust to every attack that climbs this loss. To first order in the probability
    of the other classes, the loss equals the odds against the label, which do not round to 0 below a margin of about
    87. Beyond that the loss continues along a tangent, slightly below 0, so that even there points differ in their
    loss.
    """
    del targets
    if logits.shape[-1] == 1:
        raise UserError(ONE_LOGIT)
    loss = tf.nn.sparse_softmax_cross_entropy_with_logits(labels=labels, logits=logits)
    others = tf.reduce_logsumexp(_without_class(logits, labels), axis=-1)
    # Limited to 0, because above it exp could overflow, and the gradient would be NaN even if this branch is not taken.
    log_odds = tf.minimum(others - _of_class(logits, labels), 0.0)
    odds = tf.exp(tf.maximum(log_odds, _LOWEST_LOG_ODDS)) * (1.0 + tf.minimum(log_odds - _LOWEST_LOG_ODDS, 0.0))
    return tf.where(tf.equal(loss, 0.0), odds, loss)


def _margin(logits: tf.Tensor, labels: tf.Tensor, targets: tf.Tensor) -> tf.Tensor:
    del targets
    return -margin_of(logits, labels)


def _dlr(logits: tf.Tensor, labels: tf.Tensor, targets: tf.Tensor) -> tf.Tensor:
    """Returns the difference of logits ratio, equation (6) of arXiv 2003.01690.

    It is the margin divided by the difference between the highest and the third highest logit.
    """
    del targets
    loss = -margin_of(logits, labels)
    if num_classes(logits) < 3:
        return loss
    highest = tf.math.top_k(logits, k=3).values
    return loss / (highest[:, 0] - highest[:, 2] + 1e-12)


def _targeted_dlr(logits: tf.Tensor, labels: tf.Tensor, targets: tf.Tensor) -> tf.Tensor:
    """Returns the targeted difference of logits ratio, equation (7) of arXiv 2003.01690.

    The divisor is the highest logit minus the mean of the third and the fourth highest.
    """
    loss = _of_class(logits, targets) - _of_class(logits, labels)
    if num_classes(logits) < 4:
        return loss
    highest = tf.math.top_k(logits, k=4).values
    return loss / (highest[:, 0] - (highest[:, 2] + highest[:, 3]) / 2 + 1e-12)


def _targeted_margin(logits: tf.Tensor, labels: tf.Tensor, targets: tf.Tensor) -> tf.Tensor:
    return _of_class(logits, targets) - _of_class(logits, labels)


def _targeted_cross_entropy(logits: tf.Tensor, labels: tf.Tensor, targets: tf.Tensor) -> tf.Tensor:
    del labels
    return -tf.nn.sparse_softmax_cross_entropy_with_logits(labels=targets, logits=logits)


def num_classes(logits: tf.Tensor) -> int:
    """Returns the number of classes of logits (batch, classes), which must be known when the graph is built."""
    count = None if logits.shape.rank is None else logits.shape[-1]
    if count is None:
        raise UserError(
            "The number of classes must be known when the graph is built. Give the logits of your callable a shape "
            f"with set_shape or tf.ensure_shape. Received: {logits.shape}."
        )
    return cast(int, count)


Loss = Callable[[tf.Tensor, tf.Tensor, tf.Tensor], tf.Tensor]

# Functions of logits (batch, classes), labels (batch,) and target classes (batch,) that return (batch,) losses, which
# the attacks raise. If there are too few classes for its divisor, the DLR loss is the margin.
LOSSES: dict[str, Loss] = {"ce": _cross_entropy, "margin": _margin, "dlr": _dlr}
TARGETED_LOSSES: dict[str, Loss] = {
    "ce": _targeted_cross_entropy,
    "margin": _targeted_margin,
    "dlr": _targeted_dlr,
}


def find_loss(name: str, *, targeted: bool = False) -> Loss:
    """Returns the loss of this name.

    Args:
        name: Name in `LOSSES`.
        targeted: Whether to return the loss that leads towards a target class, from `TARGETED_LOSSES`.

    Raises:
        UserError: The name is unknown.
    """
    table = TARGETED_LOSSES if targeted else LOSSES
    if not isinstance(name, str) or name not in table:
        raise unknown_name("loss", name, table)
    return table[name]


class Slope(NamedTuple):
    """The loss at some points, its gradient there, and whether the prediction is correct.

    Attributes:
        loss: Loss of each image, (batch,) float32.
        gradient: Gradient with respect to the images, (batch, height, width, channels) float32.
        correct: Whether the prediction is the label, (batch,) bool.
        logits: Logits, (batch, classes) float32.
    """

    loss: tf.Tensor
    gradient: tf.Tensor
    correct: tf.Tensor
    logits: tf.Tensor


def slope_of(
    model: Model,
    points: tf.Tensor,
    loss_of: Callable[[Any], tf.Tensor],
    labels: tf.Tensor,
    *,
    correct_of: Callable[[Any, tf.Tensor], tf.Tensor] = is_correct,
    coupled: bool = False,
) -> Slope:
    """Returns the loss and its gradient at each image. They do not depend on the other images of the batch.

    Args:
        model: Callable from images to logits (batch, classes), or to any outputs that the two functions can read.
        points: Images (batch, height, width, channels) float32 at which to take the gradient.
        loss_of: Function of the logits that returns the loss of each image, (batch,).
        labels: Labels (batch,) int32, the second argument of `correct_of`.
        correct_of: Function of (logits, labels) that returns whether each prediction is correct, (batch,) bool.
        coupled: Whether the model mixes the images of a batch, as BatchNorm in training mode does. The gradient is then
            the gradient of the sum of all losses, and all images share one scale.

    Warns:
        AttackWarning: In a graph, if the output does not depend on the images in a differentiable way.
    """
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(points)
        # Keras's losses of probabilities look for the softmax that produced a tensor and use its logits instead. The
        # gradient would then bypass the outputs, where this function scales it. The identity hides the softmax.
        outputs = keras.tree.map_structure(tf.identity, outputs_of(model, points))
    with tf.GradientTape(watch_accessed_variables=False) as loss_tape:
        loss_tape.watch(outputs)
        loss = loss_of(outputs)
    # The gradient of the sum, not of the mean, so that an image's gradient does not depend on its batch.
    slopes = loss_tape.gradient(loss, outputs, unconnected_gradients=tf.UnconnectedGradients.ZERO)
    scale = _scale_of(keras.tree.flatten(slopes))
    if coupled:
        scale = tf.fill(tf.shape(scale), tf.reduce_min(scale))
    slopes = keras.tree.map_structure(lambda slope: _of_each_image(scale, slope) * slope, slopes)
    gradient = tape.gradient(outputs, points, output_gradients=slopes)
    if gradient is None:  # with a gradient of zero, attacks stay where they are
        if not (tf.executing_eagerly() or isinstance(model, CheckedModel)):  # otherwise it was checked before
            message = f"The model has no gradient with respect to its images. {NO_GRADIENT_MEANS}"
            warnings.warn(message, AttackWarning, stacklevel=2)
        gradient = tf.zeros_like(points)
    return Slope(loss, gradient / _of_each_image(scale, gradient), correct_of(outputs, labels), outputs)


def _scale_of(slopes: list[tf.Tensor]) -> tf.Tensor:
    """Returns the power of two that brings each image's largest value into [128, 256], (batch,) float32.

    Every image has its own scale: where the network is very confident, the slope of the loss is 1e-7 or less, and
    float16 would lose it under any scale that suits the other images. A power of two is exact in float32 and bfloat16.
    """
    largest = [tf.reduce_max(tf.abs(slope), axis=list(range(1, _rank_of(slope)))) for slope in slopes]
    # The bits of the exponent alone are the next lower power of two. The maximum keeps the scale finite.
    bits = tf.bitcast(functools.reduce(tf.maximum, largest), tf.int32)
    power = tf.bitcast(tf.bitwise.bitwise_and(bits, 0x7F800000), tf.float32)
    return 0.5 * _LARGEST_SLOPE / tf.maximum(power, 2.0**-100)


def _of_each_image(values: tf.Tensor, like: tf.Tensor) -> tf.Tensor:
    """Reshapes values (batch,) to the rank of `like`, with further axes of length 1."""
    return tf.reshape(values, [-1] + [1] * (_rank_of(like) - 1))


def _rank_of(tensor: tf.Tensor) -> int:
    # Outputs of unknown rank, such as the output of a tf.numpy_function, are logits.
    return 2 if tensor.shape.rank is None else tensor.shape.rank


def mean_slope(
    model: Model, points: tf.Tensor, loss_of: Callable[[tf.Tensor], tf.Tensor], labels: tf.Tensor, *, draws: int
) -> Slope:
    """Returns `slope_of` averaged over several calls of a random model.

    Args:
        model: Callable from images to logits (batch, classes), different at each call.
        points: Images (batch, height, width, channels) float32 at which to take the gradient.
        loss_of: Function of the logits that returns the loss of each image, (batch,).
        labels: Labels (batch,) int32.
        draws: Number of calls.

    Returns:
        The mean loss and gradient, with the prediction and the logits of the last call.

    Source: Expectation over transformation, Athalye et al. 2018, arXiv 1802.00420.
    """
    slope = slope_of(model, points, loss_of, labels)
    if draws == 1:
        return slope

    @step_of_loop
    def add(i: tf.Tensor, total: Slope) -> tuple[tf.Tensor, Slope]:
        new = slope_of(model, points, loss_of, labels)
        total_loss, total_gradient = total.loss + new.loss, total.gradient + new.gradient
        return i + 1, Slope(total_loss, total_gradient, new.correct, new.logits)

    _, total = tf.while_loop(lambda i, _: i < draws, add, (1, slope), maximum_iterations=draws - 1)
    return Slope(total.loss / draws, total.gradient / draws, total.correct, total.logits)
