"""The pixel cross-entropy counts labeled pixels only, and treats every image by itself."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from robust_tf.errors import UserError
from robust_tf.tasks.segmentation.losses import PixelCrossEntropy


def batch(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    masks = rng.integers(-1, 3, (4, 5, 6))
    masks[3] = -1
    return masks, rng.normal(size=(4, 5, 6, 3)).astype(np.float32)


def by_hand(masks: np.ndarray, logits: np.ndarray, weights: np.ndarray) -> np.ndarray:
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    losses = []
    for mask, values in zip(masks, log_p, strict=True):
        pixels = [-weights[c] * values[i, j, c] for (i, j), c in np.ndenumerate(mask) if c >= 0]
        losses.append(np.mean(pixels) if pixels else 0.0)
    return np.array(losses)


@pytest.mark.parametrize("weights", [None, (0.5, 2.0, 0.0)])
def test_the_loss_is_the_mean_over_the_labeled_pixels_of_each_image(weights):
    masks, logits = batch()
    expected = by_hand(masks, logits, np.ones(3) if weights is None else np.array(weights))
    loss = PixelCrossEntropy(class_weights=weights)
    np.testing.assert_allclose(loss.call(masks.astype(np.float32), logits), expected, rtol=1e-5)
    np.testing.assert_allclose(loss(masks, logits), expected.mean(), rtol=1e-5)
    # Weights of images, as `fit` passes them.
    np.testing.assert_allclose(loss(masks, logits, np.array([1.0, 0, 0, 0])), expected[0] / 4, rtol=1e-5)


def test_ignored_pixels_have_no_gradient_even_if_their_logits_are_not_finite():
    masks, logits = batch()
    logits[masks == -1] = 3e38 * np.array([-1.0, 1.0, -1.0])  # the cross-entropy overflows
    logits = tf.constant(logits)
    with tf.GradientTape() as tape:
        tape.watch(logits)
        losses = PixelCrossEntropy().call(masks, logits)
    gradient = tape.gradient(losses, logits).numpy()
    assert np.isfinite(losses).all() and float(losses[3]) == 0
    assert np.isfinite(gradient).all()
    assert not gradient[masks == -1].any()
    assert gradient[masks >= 0].any(axis=-1).all()


def test_the_loss_survives_its_configuration():
    loss = PixelCrossEntropy(name="mine", class_weights=[1, 2, 3])
    again = keras.losses.deserialize(keras.losses.serialize(loss))
    assert isinstance(again, PixelCrossEntropy)
    assert (again.name, again.class_weights) == ("mine", (1.0, 2.0, 3.0))


def test_wrong_arguments_are_refused():
    masks, logits = batch()
    with pytest.raises(UserError, match=r"at least 0. Received: class_weights=\(1.0, -1.0\)"):
        PixelCrossEntropy(class_weights=(1, -1))
    with pytest.raises(UserError, match="each of the 3 classes. Received: 2 factors"):
        PixelCrossEntropy(class_weights=(1, 1)).call(masks, logits)
    with pytest.raises(UserError, match=r"masks of shape \(4, 5, 3\), logits of shape \(4, 5, 6, 3\)"):
        PixelCrossEntropy().call(masks[:, :, :3], logits)
    with pytest.raises(UserError, match=r"masks of shape \(4, 5, 6, 1\)"):
        PixelCrossEntropy().call(masks[..., None], logits)
