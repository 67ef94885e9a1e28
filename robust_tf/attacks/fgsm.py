"""The fast gradient sign method (Goodfellow et al. 2015, arXiv 1412.6572)."""

import tensorflow as tf

from robust_tf.attacks.checks import check_threat_model, checked_batch
from robust_tf.attacks.losses import LOSSES, Model, slope_of
from robust_tf.attacks.seeds import Seed
from robust_tf.attacks.threat_models import NORMS, PGD_NORMS
from robust_tf.config.attack import Norm


def fgsm(
    model: Model,
    images: tf.Tensor,
    labels: tf.Tensor,
    *,
    norm: Norm,
    epsilon: float | tf.Tensor,
    seed: Seed | None = None,
) -> tf.Tensor:
    """Returns adversarial examples from one gradient step of length epsilon: the fast gradient sign method.

    For linf the result is images + epsilon * sign(gradient of the cross-entropy), clipped to [0, 1]. For l2 the step
    goes along the normalized gradient. The attack is fast and weak: use it as a baseline for stronger ones.

    Args:
        model: Callable from images to logits (batch, classes). A Keras model runs in inference mode. Normalization
            belongs inside the model.
        images: Float images (batch, height, width, channels) in [0, 1].
        labels: Integer labels, (batch,) or (batch, 1).
        norm: Norm of the ball, "linf" or "l2".
        epsilon: Radius of the ball, in [0, 1] pixel units; a number or a scalar tensor.
        seed: Ignored, since nothing here is random. All attacks take a seed, so that they can be called alike.

    Returns:
        images_adv (batch, height, width, channels) float32, in the ball and in [0, 1].

    Raises:
        UserError: An argument is out of range, or the model returns something other than logits, such as probabilities.
            In an eager call also: the images are not in [0, 1], or a label is not a class of the model.
        InvalidArgumentError: In a `tf.function`, the images are not in [0, 1].

    Warns:
        AttackWarning: In an eager call, the loss has no gradient at some of the images, or the images seem to be in
            another unit.

    Source: Goodfellow et al. 2015, arXiv 1412.6572, section 4.

    Example:
        A model classifies one image as dark and one as bright, and both change their class within epsilon:

        >>> import tensorflow as tf
        >>> from robust_tf.attacks import fgsm
        >>> def dark_or_bright(images):
        ...     brightness = tf.reduce_mean(images, axis=(1, 2, 3)) - 0.5
        ...     return tf.stack([-brightness, brightness], axis=1)
        >>> images = tf.stack([tf.fill([8, 8, 3], 0.45), tf.fill([8, 8, 3], 0.55)])
        >>> labels = tf.constant([0, 1])
        >>> images_adv = fgsm(dark_or_bright, images, labels, norm="linf", epsilon=0.1)
        >>> tf.argmax(dark_or_bright(images_adv), axis=1).numpy().tolist()
        [1, 0]
    """
    del seed
    check_threat_model(norm, epsilon, PGD_NORMS)
    model, images, labels = checked_batch(model, images, labels, loss=LOSSES["ce"])
    slope = slope_of(model, images, lambda logits: LOSSES["ce"](logits, labels, labels), labels)
    geometry = NORMS[norm]
    return tf.stop_gradient(geometry.project(images + geometry.step(slope.gradient, epsilon), images, epsilon))
