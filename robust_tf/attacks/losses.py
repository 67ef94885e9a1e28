"""What the attacks raise: losses of logits, and their gradients with respect to the images."""

import functools
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from robust_tf.attacks.outputs import CheckedModel, Model, outputs_of
from robust_tf.attacks.outputs import logits_of as logits_of
from robust_tf.attacks.outputs import with_classes as with_classes
from robust_tf.errors import AttackWarning, UserError, unknown_name

# What the largest slope of the loss at an image's logits is scaled to before it goes back through the network, and back
# from after it: in float16 most input gradients would be below the smallest number otherwise.
_LARGEST_SLOPE = 256.0

# From this log-odds on, exp is continued by its tangent: below about -87 float32 would have 0 for it.
_LOWEST_LOG_ODDS = -60.0

NO_GRADIENT_MEANS = (
    "Attacks that follow gradients leave such images nearly as they are, so the robust accuracy is an overestimate. "
    "Attack the model without what stops its gradient (rounding, stop_gradient, NumPy code, another framework), or use "
    "square, which needs none."
)


# Two logits of one: 0 for the first class, and the logit for the second.
ONE_LOGIT = (
    "A classifier gives logits (batch, classes), 2 classes or more. Received: one output for each image. Make two "
    "logits of it, lambda images: tf.pad(model(images), [[0, 0], [1, 0]]), with the sigmoid removed if there is one."
)


def is_correct(logits: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
    """Whether the prediction is the label, (batch,) bool."""
    # Not `==`, of which TensorFlow knows no shape where the batch size of one side is unknown.
    return tf.equal(tf.argmax(logits, axis=-1, output_type=tf.int32), labels)


def margin_of(logits: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
    """Logit of the label minus the best other logit, (batch,) float32; negative where the prediction is wrong."""
    return _of_class(logits, labels) - tf.reduce_max(_without_class(logits, labels), axis=-1)


def likeliest_targets(logits: tf.Tensor, labels: tf.Tensor, count: int) -> tf.Tensor:
    """The `count` classes with the highest logits that are not the label, the likeliest first, (batch, count) int32."""
    return tf.math.top_k(_without_class(logits, labels), k=count).indices


def _of_class(logits: tf.Tensor, classes: tf.Tensor) -> tf.Tensor:
    return tf.gather(logits, classes, axis=-1, batch_dims=1)


def _without_class(logits: tf.Tensor, classes: tf.Tensor) -> tf.Tensor:
    excluded = tf.one_hot(classes, tf.shape(logits)[-1], on_value=True, off_value=False)
    return tf.where(excluded, -float("inf"), logits)


def _cross_entropy(logits: tf.Tensor, labels: tf.Tensor, targets: tf.Tensor) -> tf.Tensor:
    """TensorFlow's, but where that is 0 because the label's probability was rounded to 1.

    TensorFlow has log(1) there, and 0 for the label's part of the gradient, from a margin of about 17 on: a sure
    classifier would seem robust to every attack that climbs this loss. To first order in the probability of the other
    classes, both are the odds against the label, which don't round to 0 before a margin of about 87; from there on
    the loss goes on falling along a tangent, a little below 0, so that even then one point has a higher loss than
    another.
    """
    del targets
    if logits.shape[-1] == 1:
        raise UserError(ONE_LOGIT)
    loss = tf.nn.sparse_softmax_cross_entropy_with_logits(labels=labels, logits=logits)
    others = tf.reduce_logsumexp(_without_class(logits, labels), axis=-1)
    # Not above 0, where exp could overflow: its gradient would be NaN even where this branch isn't taken.
    log_odds = tf.minimum(others - _of_class(logits, labels), 0.0)
    odds = tf.exp(tf.maximum(log_odds, _LOWEST_LOG_ODDS)) * (1.0 + tf.minimum(log_odds - _LOWEST_LOG_ODDS, 0.0))
    return tf.where(tf.equal(loss, 0.0), odds, loss)


def _margin(logits: tf.Tensor, labels: tf.Tensor, targets: tf.Tensor) -> tf.Tensor:
    del targets
    return -margin_of(logits, labels)


def _dlr(logits: tf.Tensor, labels: tf.Tensor, targets: tf.Tensor) -> tf.Tensor:
    """Difference of logits ratio, equation (6) of 2003.01690: the margin in units of the 1st minus the 3rd logit."""
    del targets
    loss = -margin_of(logits, labels)
    if num_classes(logits) < 3:
        return loss
    highest = tf.math.top_k(logits, k=3).values
    return loss / (highest[:, 0] - highest[:, 2] + 1e-12)


def _targeted_dlr(logits: tf.Tensor, labels: tf.Tensor, targets: tf.Tensor) -> tf.Tensor:
    """Equation (7) of arXiv 2003.01690; the unit is the 1st minus the mean of the 3rd and the 4th logit."""
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
    """Number of classes of logits (batch, classes); the shape must be known when the graph is built."""
    count = None if logits.shape.rank is None else logits.shape[-1]
    if count is None:
        raise UserError(
            "The number of classes must be known when the graph is built: give the logits of your callable a shape "
            f"with set_shape or tf.ensure_shape. Received: {logits.shape}."
        )
    return count


Loss = Callable[[tf.Tensor, tf.Tensor, tf.Tensor], tf.Tensor]

# (logits (batch, classes), labels (batch,), target classes (batch,)) -> (batch,); the attacks raise them. With too few
# classes for its unit the DLR loss is the margin.
LOSSES: dict[str, Loss] = {"ce": _cross_entropy, "margin": _margin, "dlr": _dlr}
TARGETED_LOSSES: dict[str, Loss] = {
    "ce": _targeted_cross_entropy,
    "margin": _targeted_margin,
    "dlr": _targeted_dlr,
}


def find_loss(name: str, *, targeted: bool = False) -> Loss:
    """The loss of that name. Raises UserError for an unknown one."""
    table = TARGETED_LOSSES if targeted else LOSSES
    if not isinstance(name, str) or name not in table:
        raise unknown_name("loss", name, table)
    return table[name]


class Slope(NamedTuple):
    """The loss at some points, its gradient there, and whether the prediction is the label.

    Attributes:
        loss: (batch,) float32.
        gradient: (batch, height, width, channels) float32.
        correct: (batch,) bool.
        logits: (batch, classes) float32.
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
    """The loss of the model's logits and its gradient, each image's own: it doesn't depend on the batch.

    Args:
        model: gives logits (batch, classes), or any outputs that the two functions can read.
        loss_of: logits -> (batch,).
        labels: (batch,) int32, the second argument of `correct_of`.
        correct_of: (logits, labels) -> (batch,) bool.
        coupled: the model mixes the images of a batch, as BatchNorm in training mode does. The gradient is then that
            of the sum of all losses, which one scale must fit.

    Warns:
        AttackWarning: in a graph, for a model whose output doesn't depend on the images in a differentiable way.
    """
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(points)
        # Keras's losses of probabilities look for the softmax behind a tensor and go on from what it was given. The
        # gradient would then not pass through the outputs, where this function meets it: identity hides the softmax.
        outputs = keras.tree.map_structure(tf.identity, outputs_of(model, points))
    with tf.GradientTape(watch_accessed_variables=False) as loss_tape:
        loss_tape.watch(outputs)
        loss = loss_of(outputs)
    # Of the sum, not of the mean: an image's gradient doesn't depend on the batch it came in.
    slopes = loss_tape.gradient(loss, outputs, unconnected_gradients=tf.UnconnectedGradients.ZERO)
    scale = _scale_of(keras.tree.flatten(slopes))
    if coupled:
        scale = tf.fill(tf.shape(scale), tf.reduce_min(scale))
    slopes = keras.tree.map_structure(lambda slope: _of_each_image(scale, slope) * slope, slopes)
    gradient = tape.gradient(outputs, points, output_gradients=slopes)
    if gradient is None:  # the attacks that need one stay where they are
        if not (tf.executing_eagerly() or isinstance(model, CheckedModel)):  # else it was looked at before
            message = f"The model has no gradient with respect to its images. {NO_GRADIENT_MEANS}"
            warnings.warn(message, AttackWarning, stacklevel=2)
        gradient = tf.zeros_like(points)
    return Slope(loss, gradient / _of_each_image(scale, gradient), correct_of(outputs, labels), outputs)


def _scale_of(slopes: list[tf.Tensor]) -> tf.Tensor:
    """The power of two that brings each image's largest value into [128, 256], (batch,) float32.

    Each image has its own: where the network is sure, the loss has a slope of 1e-7 and less, which float16 would lose
    with any scale that suits the other images. A power of two changes no bit in float32 and bfloat16.
    """
    largest = [tf.reduce_max(tf.abs(slope), axis=list(range(1, _rank_of(slope)))) for slope in slopes]
    # The exponent's bits alone are the power of two below; one that is tiny or 0 would make the scale infinite.
    bits = tf.bitcast(functools.reduce(tf.maximum, largest), tf.int32)
    power = tf.bitcast(tf.bitwise.bitwise_and(bits, 0x7F800000), tf.float32)
    return 0.5 * _LARGEST_SLOPE / tf.maximum(power, 2.0**-100)


def _of_each_image(values: tf.Tensor, like: tf.Tensor) -> tf.Tensor:
    """(batch,) with as many further axes of length 1 as `like` has."""
    return tf.reshape(values, [-1] + [1] * (_rank_of(like) - 1))


def _rank_of(tensor: tf.Tensor) -> int:
    # Outputs of which nothing is known, those of a tf.numpy_function, are logits.
    return 2 if tensor.shape.rank is None else tensor.shape.rank


def mean_slope(
    model: Model, points: tf.Tensor, loss_of: Callable[[tf.Tensor], tf.Tensor], labels: tf.Tensor, *, draws: int
) -> Slope:
    """`slope_of`, averaged over `draws` calls of a random model (expectation over transformation, arXiv 1802.00420).

    The prediction and the logits are those of the last call.
    """
    slope = slope_of(model, points, loss_of, labels)
    if draws == 1:
        return slope

    def add(i: tf.Tensor, total: Slope) -> tuple[tf.Tensor, Slope]:
        new = slope_of(model, points, loss_of, labels)
        total_loss, total_gradient = total.loss + new.loss, total.gradient + new.gradient
        return i + 1, Slope(total_loss, total_gradient, new.correct, new.logits)

    _, total = tf.while_loop(lambda i, _: i < draws, add, (1, slope), maximum_iterations=draws - 1)
    return Slope(total.loss / draws, total.gradient / draws, total.correct, total.logits)
