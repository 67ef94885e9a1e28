"""The geometry of the norms, compared with slow, independent solutions."""

import typing

import numpy as np
import pytest
import tensorflow as tf
from small_models import best_score

from robust_tf.attacks.square import SQUARE_NORMS
from robust_tf.attacks.threat_models import NORMS, PGD_NORMS
from robust_tf.config.names import AttackNorm

EPSILONS = {"linf": 0.1, "l2": 0.6, "l1": 1.5}


def images_and_points(seed=0, spread=0.5):
    rng = np.random.default_rng(seed)
    images = rng.random((6, 4, 5, 2)).astype(np.float32)
    return images, images + spread * rng.standard_normal(images.shape).astype(np.float32)


def test_every_norm_has_a_name_and_a_radius_in_these_tests():
    assert set(NORMS) == set(typing.get_args(AttackNorm)) == set(EPSILONS)
    assert set(PGD_NORMS) <= set(NORMS) and set(SQUARE_NORMS) <= set(NORMS)


@pytest.mark.parametrize("norm", NORMS)
def test_points_inside_the_ball_stay_where_they_are(norm):
    images, _ = images_and_points()
    inside = np.clip(images + 0.01, 0, 1)
    np.testing.assert_allclose(NORMS[norm].project(inside, images, EPSILONS[norm]), inside, atol=1e-7)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("spread", [1e-6, 0.5, 100.0])
def test_points_outside_are_moved_into_the_ball_and_the_pixel_range(norm, spread):
    images, points = images_and_points(spread=spread)
    projected = NORMS[norm].project(points, images, EPSILONS[norm]).numpy()
    lengths = NORMS[norm].length(tf.constant(projected.astype(np.float64) - images))
    assert np.max(lengths) <= EPSILONS[norm] + 1e-6
    assert projected.min() >= 0 and projected.max() <= 1


@pytest.mark.parametrize(
    ("norm", "epsilon"), [("linf", 8 / 255), ("l2", 1.0), ("l2", 3.0), ("l1", 12.0), ("l1", 100.0)]
)
@pytest.mark.parametrize("value", [0.5, 0.9])
def test_rounding_does_not_add_up_over_a_large_image(norm, epsilon, value):
    """Equal pixels are all rounded in the same direction."""
    images = np.full((2, 224, 224, 3), value, np.float32)
    rng = np.random.default_rng(0)
    for move in (0.02 * rng.standard_normal(images.shape), np.sign(rng.standard_normal(images.shape)) * 0.1):
        projected = NORMS[norm].project(images + move.astype(np.float32), images, epsilon).numpy()
        lengths = NORMS[norm].length(tf.constant(projected.astype(np.float64) - images)).numpy()
        assert np.max(lengths) <= epsilon + 1e-6
        assert np.min(lengths) >= 0.99 * epsilon


def test_l2_steps_have_their_length_along_tiny_gradients_too():
    """Along larger gradients they equal the reference's, whose squares vanish in float32 along tiny ones."""
    gradient = np.random.default_rng(0).standard_normal((5, 4, 5, 2)).astype(np.float32)
    sizes = [1.0, 1e-5, 1e-9, 1e-30, 0.0]
    gradient *= np.array(sizes, np.float32)[:, None, None, None]
    step = NORMS["l2"].step(tf.constant(gradient), 0.5)
    large = tf.constant(gradient[:2])
    reference = 0.5 * large / (tf.sqrt(tf.reduce_sum(large**2, axis=(1, 2, 3), keepdims=True)) + 1e-10)
    np.testing.assert_array_equal(step[:2], reference)
    lengths = NORMS["l2"].length(step)[:, 0, 0, 0].numpy()
    np.testing.assert_allclose(lengths[:4], 0.5, rtol=1e-4)
    assert lengths[4] == 0.0
    exact = gradient[3].astype(np.float64)
    np.testing.assert_allclose(step[3], 0.5 * exact / np.linalg.norm(exact), rtol=1e-4)


def test_l1_projection_is_the_nearest_point():
    """Seen from the projection, no point of a convex set may lie in the direction of the point that was projected."""
    images, points = images_and_points()
    projected = NORMS["l1"].project(points, images, 1.5).numpy().astype(np.float64)
    np.testing.assert_allclose(np.abs(projected - images).sum(axis=(1, 2, 3)), 1.5, atol=1e-4)
    rng = np.random.default_rng(3)
    for _ in range(30):
        other = images + rng.standard_normal(images.shape).astype(np.float32)
        other = NORMS["l1"].project(other, images, rng.uniform(0, 1.5)).numpy()
        angle = ((points - projected) * (other - projected)).sum(axis=(1, 2, 3))
        assert angle.max() < 1e-4


@pytest.mark.parametrize("norm", NORMS)
def test_the_random_start_of_an_image_does_not_depend_on_its_batch(norm):
    images, _ = images_and_points()
    seeds = np.array([[7, number] for number in range(6)], np.int32)
    together = NORMS[norm].random_start(images, EPSILONS[norm], tf.constant(seeds)).numpy()
    backwards = NORMS[norm].random_start(images[::-1], EPSILONS[norm], tf.constant(seeds[::-1])).numpy()[::-1]
    np.testing.assert_array_equal(together, backwards)
    noise = together - images
    assert np.abs(noise[0] - noise[1]).max() > 0.01  # different seeds give different starts


@pytest.mark.parametrize("norm", NORMS)
def test_the_move_to_a_hyperplane_reaches_it_by_the_shortest_way(norm):
    rng = np.random.default_rng(0)
    points = rng.random((40, 3, 3, 2)).astype(np.float32)
    normal = rng.standard_normal(points.shape).astype(np.float32)
    normal[:, 0, 0] = 0.0
    value = (rng.uniform(-1, 1, 40) * 2.5).astype(np.float32)
    move = NORMS[norm].to_hyperplane(points, normal, tf.constant(value[:, None, None, None])).numpy()
    reached = value + (normal * move).sum(axis=(1, 2, 3))
    np.testing.assert_allclose(reached, 0, atol=1e-5)
    assert (points + move).min() >= -1e-6 and (points + move).max() <= 1 + 1e-6
    lengths = NORMS[norm].length(tf.constant(move)).numpy().ravel()
    for i in range(40):  # within a slightly smaller ball the hyperplane is out of reach
        sign = 1 if value[i] > 0 else -1
        score = (sign * normal[i] * points[i]).sum()
        shorter = best_score(sign * normal[i], points[i], norm, 0.999 * lengths[i])
        assert abs(value[i]) + shorter - score > 0


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("scale", [1e-18, 1.0, 1e12])
def test_the_scale_of_a_hyperplane_does_not_matter(norm, scale):
    images, _ = images_and_points()
    normal = np.random.default_rng(1).standard_normal(images.shape).astype(np.float32)
    value = np.full((6, 1, 1, 1), 0.7, np.float32)
    expected = NORMS[norm].to_hyperplane(images, normal, tf.constant(value))
    scaled = NORMS[norm].to_hyperplane(images, scale * normal, tf.constant(np.float32(scale) * value))
    np.testing.assert_allclose(scaled, expected, atol=1e-5)


@pytest.mark.parametrize("norm", NORMS)
def test_a_hyperplane_out_of_reach_is_approached_up_to_the_corner(norm):
    normal = np.random.default_rng(1).standard_normal((1, 3, 3, 1)).astype(np.float32)
    points = np.full((1, 3, 3, 1), 0.3, np.float32)
    move = NORMS[norm].to_hyperplane(points, normal, tf.constant([[[[1000.0]]]]))
    np.testing.assert_allclose(points + move, normal < 0, atol=1e-6)
    flat = NORMS[norm].to_hyperplane(points, np.zeros_like(points), tf.constant([[[[1.0]]]]))
    np.testing.assert_array_equal(flat, np.zeros_like(points))


@pytest.mark.parametrize("norm", NORMS)
def test_the_dual_norm_is_the_best_gain_of_a_unit_step(norm):
    gradient = np.random.default_rng(0).standard_normal((1, 3, 3, 1)).astype(np.float32)
    image = np.full((3, 3, 1), 0.5)
    gain = (gradient[0] * image).sum() - best_score(gradient[0], image, norm, 0.1)
    np.testing.assert_allclose(0.1 * NORMS[norm].dual_length(gradient)[0, 0, 0, 0], gain, rtol=1e-5)
