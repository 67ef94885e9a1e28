"""Properties of every attack: optimal on linear models, within the ball and the pixel range, seeds, batches."""

import functools
import math

import keras
import numpy as np
import pytest
import tensorflow as tf
from small_models import (
    assert_in_ball,
    best_score,
    linear_model,
    small_batch,
    small_network,
    two_classes,
    without_gradients,
)

from robust_tf.attacks import NORMS, apgd, fab, fgsm, pgd, square
from robust_tf.attacks.losses import LOSSES, TARGETED_LOSSES, likeliest_targets
from robust_tf.errors import UserError

# Some tests attack models without gradients, and the gradient of DLR is zero at some images.
NO_GRADIENT = pytest.mark.filterwarnings("ignore:The gradient is zero:robust_tf.errors.AttackWarning")
# A new norm needs a radius here, and cases below with the attacks that take it.
EPSILONS = {"linf": 0.08, "l2": 0.7, "l1": 4.0}
SHORT = {
    "pgd": functools.partial(pgd, steps=10),
    "pgd restarts": functools.partial(pgd, steps=5, restarts=3, random_start=True, loss="margin"),
    "pgd early stop": functools.partial(pgd, steps=10, restarts=2, early_stop=True),
    "fgsm": fgsm,
    "apgd ce": functools.partial(apgd, steps=20),
    "apgd dlr restarts": functools.partial(apgd, steps=10, restarts=2, loss="dlr"),
    "apgd targeted": functools.partial(apgd, steps=10, loss="dlr", targets=9, early_stop=True),
    "fab targeted": functools.partial(fab, steps=15, early_stop=True),
    "fab": functools.partial(fab, steps=15, targets=0, restarts=2),
    "square": functools.partial(square, queries=100),
    "square to the end": functools.partial(square, queries=50, restarts=2, early_stop=False),
}
CASES = [
    *((name, "l2") for name in SHORT),
    *((name, "linf") for name in ("pgd early stop", "apgd ce", "fab targeted", "square")),
    *((name, "l1") for name in ("apgd targeted", "fab targeted", "square")),
]


def cross_entropy(model, images, labels):
    return tf.nn.sparse_softmax_cross_entropy_with_logits(labels=labels, logits=model(images)).numpy()


def compiled(name, norm, model):
    attack = SHORT[name]
    return tf.function(
        lambda x, y, seed: attack(model, x, y, norm=norm, epsilon=EPSILONS[norm], seed=seed),
        input_signature=[
            tf.TensorSpec([None, 8, 8, 1]),
            tf.TensorSpec([None], tf.int32),
            tf.TensorSpec([None, 2], tf.int32),
        ],
        autograph=False,
    )


@pytest.mark.parametrize(("name", "norm"), CASES)
def test_an_attack_stays_in_the_ball_and_depends_only_on_seed_and_image(name, norm):
    """All these properties are checked in one test, so that each attack is compiled only once."""
    model = small_network()
    images, labels = small_batch(model)
    run = compiled(name, norm, model)
    seeds = np.array([[5, number] for number in range(24)], np.int32)
    images_adv = run(images, labels, seeds).numpy()
    assert_in_ball(images_adv, images, norm, EPSILONS[norm])
    robust = model(images_adv).numpy().argmax(axis=1) == labels
    assert robust.mean() < 0.9  # the attack fells some images
    # The same images, seeds and labels in other batches, including an empty one and one of a single image.
    np.testing.assert_array_equal(run(images, labels, seeds), images_adv)
    parts = [run(images[part], labels[part], seeds[part]).numpy() for part in np.split(np.arange(24), [0, 1, 8])]
    alone = np.concatenate(parts)
    np.testing.assert_array_equal(model(alone).numpy().argmax(axis=1) == labels, robust)
    np.testing.assert_allclose(alone, images_adv, atol=1e-3)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("start", [0.5, None])  # the pixel range matters only for None
def test_apgd_finds_the_optimum_of_a_linear_model(norm, start):
    model, weights = two_classes()
    images = np.full((3, 4, 4, 1), 0.5) if start else np.random.default_rng(0).random((3, 4, 4, 1))
    images = images.astype(np.float32)
    epsilon = {"linf": 0.2, "l2": 0.6, "l1": 1.3}[norm]
    images_adv = apgd(model, images, np.ones(3, int), norm=norm, epsilon=epsilon, loss="margin").numpy()
    assert_in_ball(images_adv, images, norm, epsilon)
    expected = [best_score(weights, image, norm, epsilon) for image in images]
    # Where the pixel range cuts the ball, the published l2 projection (scale, then clip) does not find the nearest
    # point, and the sparse steps of l1 stop too early. Both end slightly above the optimum.
    tolerance = 1e-3 if start or norm == "linf" else {"l2": 0.03, "l1": 0.15}[norm]
    np.testing.assert_allclose((images_adv * weights).sum(axis=(1, 2, 3)), expected, atol=tolerance)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_fgsm_is_optimal_on_a_linear_model(norm):
    model, weights = two_classes()
    images = np.full((2, 4, 4, 1), 0.5, np.float32)
    images_adv = fgsm(model, images, np.ones(2, int), norm=norm, epsilon=0.1).numpy()
    steepest = np.sign(weights) if norm == "linf" else weights / np.linalg.norm(weights)
    np.testing.assert_allclose(images_adv, images - 0.1 * steepest[None], atol=1e-6)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("targets", [0, 9])
def test_fab_finds_the_nearest_image_across_a_linear_boundary(norm, targets):
    rng = np.random.default_rng(0)
    weights = rng.standard_normal((3, 4, 4, 1)).astype(np.float32)
    model = linear_model(weights)
    images = rng.random((8, 4, 4, 1)).astype(np.float32)
    labels = model(images).numpy().argmax(axis=1)
    images_adv = fab(model, images, labels, norm=norm, epsilon=math.inf, targets=targets).numpy()
    assert np.all(model(images_adv).numpy().argmax(axis=1) != labels)
    found = NORMS[norm].length(tf.constant(images_adv - images)).numpy().ravel()
    for image, label, length in zip(images, labels, found, strict=True):
        # Slightly inside the distance found, the label still wins against every class. Without targets each step goes
        # to the boundary that would be nearest without the pixel range, which is not always the nearest one.
        share = 0.99 if targets else 0.85
        others = [k for k in range(3) if k != label]
        assert all(best_score(weights[label] - weights[k], image, norm, share * length) > 0 for k in others)
    # A radius below the distance found leaves the image unchanged, and a radius above it makes no difference.
    radius = float(np.sort(found)[4])
    within = fab(model, images, labels, norm=norm, epsilon=radius * 1.0001, targets=targets).numpy()
    expected = np.where((found <= radius * 1.0001)[:, None, None, None], images_adv, images)
    np.testing.assert_allclose(within, expected, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_square_comes_near_the_optimum_of_a_smooth_linear_model(norm):
    """Neighboring pixels have similar weights, which suits the patches."""
    weights = np.zeros((10, 10, 1), np.float32)
    weights[:5], weights[5:] = 1.0, -1.0
    model = linear_model(np.stack([np.zeros_like(weights), weights]), [0.0, 100.0])
    images = np.full((4, 10, 10, 1), 0.5, np.float32)
    epsilon = {"linf": 0.1, "l2": 0.7, "l1": 5.0}[norm]
    attack = tf.function(lambda x, y: square(model, x, y, norm=norm, epsilon=epsilon, queries=1000))
    images_adv = attack(images, np.ones(4, np.int32)).numpy()
    assert_in_ball(images_adv, images, norm, epsilon)
    best = best_score(weights, images[0], norm, epsilon)
    reached = (images_adv * weights).sum(axis=(1, 2, 3))
    # The pyramids of the l2 patches do not add up to a flat field.
    assert np.all(reached / best > {"linf": 0.9, "l2": 0.6, "l1": 0.8}[norm])


@pytest.mark.parametrize("attack", ["apgd ce", "pgd restarts", "square"])
def test_more_work_never_helps_the_model(attack):
    """The mean margin falls with the number of steps, and no image ends above its clean margin."""
    model = small_network()
    images, labels = small_batch(model)

    def margin(images_adv):
        return -LOSSES["margin"](model(images_adv), labels, labels).numpy()

    means = [margin(images).mean()]
    for work in (1, 8, 64):
        images_adv = {
            "apgd ce": lambda n: apgd(model, images, labels, norm="l2", epsilon=0.4, steps=n, loss="margin"),
            "pgd restarts": lambda n: pgd(
                model, images, labels, norm="l2", epsilon=0.4, steps=n, loss="margin", restarts=2, seed=0
            ),
            "square": lambda n: square(model, images, labels, norm="l2", epsilon=0.4, queries=n, early_stop=False),
        }[attack](work)
        assert np.all(margin(images_adv) <= margin(images) + 1e-5)
        means.append(margin(images_adv).mean())
    assert means == sorted(means, reverse=True)
    assert means[-1] < means[0] - 0.5


def test_restarts_keep_the_worst_result_of_each_image():
    model = small_network()
    images, labels = small_batch(model)
    attack = {"norm": "linf", "epsilon": 0.05, "steps": 2, "random_start": True, "seed": 4}
    one = cross_entropy(model, pgd(model, images, labels, **attack), labels)
    five_images = pgd(model, images, labels, restarts=5, **attack)
    five = cross_entropy(model, five_images, labels)
    wrong = model(five_images).numpy().argmax(axis=1) != labels
    assert np.all(wrong | (five >= one - 1e-6))
    assert np.mean(five > one) > 0.5


@NO_GRADIENT
@pytest.mark.parametrize("loss", ["ce", "margin", "dlr"])
def test_pgd_raises_each_loss_and_lowers_it_when_targeted(loss):
    model = small_network()
    images, labels = small_batch(model)
    attack = {"norm": "l2", "epsilon": 0.5, "steps": 10, "loss": loss}
    loss_of = LOSSES[loss]
    before = loss_of(model(images), labels, labels).numpy()
    after = loss_of(model(pgd(model, images, labels, **attack)), labels, labels).numpy()
    assert np.all(after >= before) and np.mean(after > before) == 1
    targets = (labels + 1) % 5
    aimed = pgd(model, images, targets, targeted=True, **attack)
    assert np.all(loss_of(model(aimed), targets, targets) <= loss_of(model(images), targets, targets))


def test_early_stop_gives_the_same_verdicts():
    model = small_network()
    images, labels = small_batch(model)

    def robust(early_stop, **attack):
        images_adv = pgd(model, images, labels, epsilon=0.25, early_stop=early_stop, norm="l2", **attack)
        return model(images_adv).numpy().argmax(axis=1) == labels

    without = robust(False, steps=20)
    assert 0.1 < without.mean() < 0.9
    # Without an early stop a run may come back to a correct prediction, so an early stop never fells fewer images.
    assert np.all(robust(True, steps=20) <= without)
    assert np.mean(robust(True, steps=20) != without) < 0.1


@NO_GRADIENT
def test_square_works_on_a_model_without_gradients():
    smooth = small_network()
    model = without_gradients(smooth)
    images, labels = small_batch(model)
    threat_model = {"norm": "linf", "epsilon": 0.1}

    def robust(images_adv):
        return np.mean(model(images_adv).numpy().argmax(axis=1) == labels)

    assert robust(apgd(model, images, labels, steps=10, **threat_model)) > 0.6  # only its random start helps
    assert robust(square(model, images, labels, queries=300, **threat_model)) < 0.2


@NO_GRADIENT
@pytest.mark.parametrize("attack", [apgd, fab, square, fgsm, functools.partial(pgd, steps=2)])
def test_a_black_box_is_attacked(attack):
    """Python code that a graph calls has no gradient, and its output has no static shape."""
    network = small_network()
    images, labels = small_batch(network)

    def black_box(x: tf.Tensor) -> tf.Tensor:
        return tf.numpy_function(lambda values: network(tf.constant(values)).numpy(), [x], tf.float32)

    work = {"queries": 20} if attack is square else {"steps": 2} if attack in (apgd, fab) else {}
    images_adv = attack(black_box, images, labels, norm="linf", epsilon=0.1, **work).numpy()
    assert_in_ball(images_adv, images, "linf", 0.1)
    if attack is square:
        assert np.mean(network(images_adv).numpy().argmax(axis=1) == labels) < 0.9


@pytest.mark.parametrize("seed", [7, np.int64(7), [[7, number] for number in range(4)]])
def test_a_seed_is_any_integer_or_a_pair_for_each_image(seed):
    model = small_network()
    images, labels = small_batch(model, 4)
    attack = {"norm": "l2", "epsilon": 0.3, "steps": 1, "random_start": True}
    expected = pgd(model, images, labels, seed=7, **attack)
    np.testing.assert_array_equal(pgd(model, images, labels, seed=seed, **attack), expected)
    assert np.any(pgd(model, images, labels, seed=8, **attack) != expected)


@pytest.mark.slow
def test_averaged_gradients_help_against_a_random_model():
    smooth = small_network()
    images, labels = small_batch(smooth)

    def noisy(x: tf.Tensor) -> tf.Tensor:
        return smooth(x + tf.random.normal(tf.shape(x), stddev=0.5))

    def margin(draws):
        tf.random.set_seed(0)
        attack = {"norm": "l2", "epsilon": 0.6, "steps": 10, "gradient_draws": draws}
        images_adv = tf.function(lambda: apgd(noisy, images, labels, **attack))()
        return -LOSSES["margin"](smooth(images_adv), labels, labels).numpy().mean()

    assert margin(30) < margin(1) - 0.05


def test_losses_of_known_logits():
    logits = tf.constant([[4.0, 1.0, 2.0, -1.0], [0.0, 3.0, 1.0, 2.0]])
    labels, targets = tf.constant([0, 0]), tf.constant([2, 3])
    np.testing.assert_allclose(LOSSES["margin"](logits, labels, targets), [-2.0, 3.0])
    np.testing.assert_allclose(LOSSES["dlr"](logits, labels, targets), [-2.0 / 3, 3.0 / 2])
    np.testing.assert_allclose(TARGETED_LOSSES["margin"](logits, labels, targets), [-2.0, 2.0])
    np.testing.assert_allclose(TARGETED_LOSSES["dlr"](logits, labels, targets), [-2.0 / 4, 2.0 / 2.5])
    np.testing.assert_array_equal(likeliest_targets(logits, labels, 2), [[2, 1], [1, 3]])


@pytest.mark.parametrize("classes", [2, 3])
def test_models_with_few_classes_are_attacked(classes):
    model = small_network(classes)
    images, labels = small_batch(model)
    attack = {"norm": "l2", "epsilon": 0.5, "steps": 5, "loss": "dlr"}
    for targets in (0, 9):
        images_adv = apgd(model, images, labels, targets=targets, **attack)
        assert np.mean(model(images_adv).numpy().argmax(axis=1) == labels) < 0.6


def test_attacks_leave_the_statistics_of_batchnorm_unchanged():
    classifier = keras.Sequential(
        [keras.Input((8, 8, 1)), keras.layers.BatchNormalization(), keras.layers.Flatten(), keras.layers.Dense(4)]
    )
    before = [variable.numpy() for variable in classifier.variables]
    images = np.random.default_rng(0).random((4, 8, 8, 1)).astype(np.float32)
    labels = classifier.predict(images, verbose=0).argmax(axis=1)
    apgd(classifier, images, labels, norm="l2", epsilon=0.1, steps=2)
    square(classifier, images, labels, norm="l2", epsilon=0.1, queries=2)
    for variable, value in zip(classifier.variables, before, strict=True):
        np.testing.assert_array_equal(variable, value)


@pytest.mark.parametrize("attack", [apgd, fab, square, fgsm, functools.partial(pgd, steps=3)])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": np.array([0, 7])}, r"0\.\.4.*Received: 7 for image 1"),
        ({"labels": np.array([0, -1])}, "Received: -1 for image 1"),
        ({"labels": np.array([0.0, 1.0])}, "float64"),
        ({"labels": np.array([0])}, r"labels of shape \(1,\)"),
        ({"images": np.full((2, 8, 8, 1), 255.0)}, "values from 255 to 255. Divide 0-255"),
        ({"images": np.linspace(-1, 1, 128).reshape(2, 8, 8, 1)}, "values from -1 to 1"),
        ({"images": np.zeros((8, 8, 1))}, r"shape \(8, 8, 1\)"),
        ({"norm": "l3"}, "'l3'"),
        ({"epsilon": -1.0}, "epsilon=-1"),
        ({"epsilon": math.nan}, "epsilon=nan"),
        ({"norm": "linf", "epsilon": 8.0}, "epsilon=8. Did you mean 8/255"),
        ({"model": lambda x: tf.fill([tf.shape(x)[0], 3], math.nan)}, "NaN for 2 of 2 images"),
        (
            {"model": lambda x: tf.where(tf.range(tf.shape(x)[0])[:, None] == 1, math.nan, tf.ones([1, 3]))},
            "NaN for 1 of 2 images; the first is image 1",
        ),
        ({"model": lambda x: tf.reshape(x, (-1, 64))[:, :1], "labels": np.zeros(2, int)}, "2 classes or more"),
    ],
)
def test_wrong_inputs_are_refused_by_value(attack, change, message):
    arguments = {
        "model": small_network(),
        "images": np.zeros((2, 8, 8, 1), np.float32),
        "labels": np.array([0, 1]),
        "norm": "l2",
        "epsilon": 0.5,
        **change,
    }
    model, images, labels = (arguments.pop(name) for name in ("model", "images", "labels"))
    with pytest.raises(UserError, match=message):
        attack(model, images, labels, **arguments)


@pytest.mark.parametrize(
    ("attack", "options", "message"),
    [
        (apgd, {"steps": 0}, "steps=0"),
        (apgd, {"loss": "hinge"}, "'hinge'"),
        (square, {"queries": 0}, "queries=0"),
        (fab, {"restarts": 2, "epsilon": math.inf}, "epsilon=inf"),
        (square, {"seed": [1, 2]}, r"pair for each image. Received: an array of shape \(2,\)"),
        (pgd, {"steps": 3, "norm": "l1"}, "'l1'"),
        (pgd, {"steps": 3, "restarts": 0}, "restarts=0"),
        (pgd, {"steps": 3, "epsilon": math.inf}, "epsilon=inf"),
    ],
)
def test_wrong_options_are_refused_by_value(attack, options, message):
    arguments = {"norm": "l2", "epsilon": 0.5, **options}
    with pytest.raises(UserError, match=message):
        attack(small_network(), np.zeros((2, 8, 8, 1), np.float32), np.array([0, 1]), **arguments)
