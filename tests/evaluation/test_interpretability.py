"""Input gradients and features of known classifiers, and the program that draws them."""

import pathlib

import keras
import numpy as np
import pytest
import tensorflow as tf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from robust_tf import visualize
from robust_tf.attacks import AttackConfig
from robust_tf.errors import UserError
from robust_tf.evaluation.interpretability import (
    edge_alignment,
    features_of,
    gradient_pictures,
    input_gradients,
    invert_features,
    large_perturbations,
)


def linear(weights: np.ndarray) -> keras.Model:
    """Builds a linear classifier with weights (size, size, 3, classes), whose features are the images."""
    images = keras.Input(weights.shape[:3])
    features = keras.layers.Flatten(name="features")(images)
    classifier = keras.Model(images, keras.layers.Dense(weights.shape[-1], use_bias=False, name="logits")(features))
    classifier.get_layer("logits").set_weights([weights.reshape(-1, weights.shape[-1])])
    return classifier


def random(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).random(shape).astype(np.float32)


def test_gradients_of_a_linear_classifier_are_exact():
    """D cross-entropy / d image = sum over classes of (probability - 1[label]) * weights."""
    weights, images, labels = random(0, 4, 4, 3, 3), random(1, 5, 4, 4, 3), np.array([0, 1, 2, 0, 1])
    probabilities = tf.nn.softmax(np.einsum("bhwc,hwck->bk", images, weights)).numpy()
    expected = np.einsum("bk,hwck->bhwc", probabilities - np.eye(3)[labels], weights)
    np.testing.assert_allclose(input_gradients(linear(weights), images, labels), expected, rtol=1e-4, atol=1e-6)


def test_gradient_pictures_are_gray_where_the_gradient_is_zero():
    gradients = np.zeros((2, 8, 8, 3), np.float32)
    gradients[:, 2, 3] = (1.0, -1.0, 3.0)
    gray = np.repeat(random(0, 1, 8, 8, 1), 3, axis=-1)
    colored, summed = gradient_pictures(gradients, np.concatenate([random(1, 1, 8, 8, 3), gray]))
    assert np.all(colored[0] == 0.5) and colored[2, 3, 0] > 0.5 > colored[2, 3, 1]
    assert np.ptp(summed[2, 3]) == 0 and summed[2, 3, 0] > 0.5
    assert np.all(gradient_pictures(np.zeros((1, 8, 8, 3)), gray) == 0.5)


def test_edge_alignment_tells_gradients_on_edges_from_others():
    images = np.zeros((2, 16, 16, 3), np.float32)
    images[:, 4:12, 4:12] = 0.8
    outline = np.zeros_like(images)
    outline[:, 3:13, 3:13] = 1.0
    outline[:, 5:11, 5:11] = 0.0
    outline[0] *= -1  # the sign does not matter
    assert edge_alignment(outline, images) > 0.8
    assert edge_alignment(1.0 - np.abs(outline), images) < -0.8
    assert abs(edge_alignment(random(1, 2, 16, 16, 3), images)) < 0.2
    assert edge_alignment(np.zeros_like(images), images) == 0.0


def test_features_are_the_input_of_the_head():
    assert features_of(linear(random(0, 4, 4, 3, 2))).output_shape == (None, 48)
    images = keras.Input((4, 4, 3))
    hidden = keras.layers.Dense(7)(keras.layers.Flatten()(images))
    assert features_of(keras.Model(images, keras.layers.Dense(2)(hidden))).output_shape == (None, 7)


def test_inverting_an_invertible_representation_returns_the_image():
    images, start = random(0, 2, 4, 4, 3), random(1, 2, 4, 4, 3)
    found, left = invert_features(linear(random(2, 4, 4, 3, 2)), images, start, steps=300, step_size=0.1)
    np.testing.assert_allclose(found, images, atol=0.01)
    assert left.shape == (2,) and np.all(left < 0.01)
    assert found.min() >= 0 and found.max() <= 1


def test_inversion_for_gray_images_stays_gray():
    images = np.repeat(random(0, 2, 4, 4, 1), 3, axis=-1)
    start = np.full_like(images, 0.5)
    weights = random(2, 4, 4, 3, 2)
    found, _ = invert_features(linear(weights), images, start, steps=20)
    assert np.ptp(found, axis=-1).max() < 1e-6 and np.abs(found - start).max() > 0.01


def test_large_perturbations_change_the_prediction_and_stay_in_the_ball():
    classifier, images = linear(random(0, 4, 4, 3, 2)), random(1, 3, 4, 4, 3)
    labels = np.argmax(classifier(images), axis=-1)
    attack = AttackConfig(norm="l2", epsilon=3.0, step_size=0.5, steps=20)
    images_adv = large_perturbations(classifier, images, labels, attack=attack)
    assert np.all(np.argmax(classifier(images_adv), axis=-1) != labels)
    assert np.linalg.norm((images_adv - images).reshape(3, -1), axis=1).max() <= 3.0 + 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "rows"), [("gradients", 3), ("inversion", 3), ("perturbations", 5)])
def test_the_program_draws_the_rows_of_both_classifiers(jobs, data_dir, tmp_path, kind, rows):
    arguments = {
        "classifier": jobs["good"].classifier,
        "compare": jobs["poor"].classifier,
        "data_dir": data_dir,
        "kind": kind,
        "num_images": 4,
        "steps": 5,
        "output": tmp_path / "picture.png",
        "tensorboard": tmp_path / "tensorboard",
    }
    visualize.main(["visualize", *(f"--{name}={value}" for name, value in arguments.items())])
    height, width, _ = tf.io.decode_png((tmp_path / "picture.png").read_bytes()).shape
    assert height / width == pytest.approx(rows / 4 * 1.2, rel=0.2)
    (image,) = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"tensors": 0}).Reload().Tensors(kind)
    assert list(image.tensor_proto.string_val[:2]) == [str(width).encode(), str(height).encode()]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"classifier": ""}, "--classifier is needed"),
        ({"kind": "gradient"}, "Did you mean 'gradients'"),
        ({"num_images": "0"}, "Received: 0"),
        ({"kind": "perturbations", "epsilon": "-1"}, "--epsilon=-1"),
    ],
)
def test_wrong_flags_are_refused_with_their_value(jobs, data_dir, changes, message):
    values = {"classifier": jobs["good"].classifier, "data_dir": data_dir, **changes}
    with pytest.raises(UserError, match=message):
        visualize.main(["visualize", *(f"--{name}={value}" for name, value in values.items())])


def test_classifiers_of_different_classes_are_not_compared(jobs, data_dir, tmp_path):
    other = keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Flatten(), keras.layers.Dense(3)])
    other.save(tmp_path / "other.keras")
    arguments = ["visualize", f"--classifier={jobs['good'].classifier}", f"--data_dir={data_dir}"]
    with pytest.raises(UserError, match="with 3 logits for 5 classes"):
        visualize.main([*arguments, f"--compare={tmp_path / 'other.keras'}"])
    assert not pathlib.Path("gradients.png").exists()
