"""The attacks stay in the ball, follow their losses, and find the worst result of several."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from robust_tf.attacks import AttackConfig
from robust_tf.attacks.losses import slope_of
from robust_tf.errors import UserError
from robust_tf.models import build_classifier
from robust_tf.tasks.segmentation import attack as attacks
from robust_tf.tasks.segmentation.attack import (
    SEGMENTATION_LOSSES,
    attack_segmenter,
    pixel_accuracy_of_each_image,
)
from robust_tf.tasks.segmentation.head import build_segmenter
from robust_tf.tasks.segmentation.losses import PixelCrossEntropy
from robust_tf.tasks.segmentation.mean_iou import MeanIoU, PixelAccuracy
from robust_tf.training import AdversarialTrainer
from tests.task_types.mask_scenes import scenes

LINF = AttackConfig(norm="linf", epsilon=0.05, step_size=0.02, steps=4)


def small_model() -> keras.Model:
    """An untrained network of images (12, 12, 3) with 3 classes."""
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((12, 12, 3)),
            layers.Conv2D(8, 3, padding="same", activation="relu"),
            layers.BatchNormalization(),
            layers.Conv2D(3, 3, padding="same"),
        ]
    )


def small_data(model: keras.Model) -> tuple[tf.Tensor, tf.Tensor]:
    """Images, and masks that agree with the model at two thirds of the pixels and ignore some."""
    rng = np.random.default_rng(0)
    images = tf.constant(rng.random((4, 12, 12, 3)), tf.float32)
    masks = tf.argmax(model(images), axis=-1, output_type=tf.int32).numpy()
    masks = np.where(rng.random(masks.shape) < 0.33, (masks + 1) % 3, masks)
    masks[:, :2] = -1
    masks[3] = -1
    return images, tf.constant(masks)


def accuracy(model, images, masks) -> np.ndarray:
    return pixel_accuracy_of_each_image(model(images), masks).numpy()


@pytest.mark.parametrize(("norm", "random_start"), [("linf", False), ("l2", True)])
def test_the_result_is_in_the_ball_and_never_better_than_no_attack(norm, random_start):
    model = small_model()
    images, masks = small_data(model)
    epsilon = {"linf": 0.05, "l2": 1.0}[norm]
    attack = AttackConfig(norm=norm, epsilon=epsilon, step_size=epsilon / 3, steps=4, random_start=random_start)
    statistics = [weight.numpy() for weight in model.non_trainable_weights]
    images_adv = attack_segmenter(model, images, masks, attack=attack, seed=1)
    perturbation = (images_adv - images).numpy().reshape(4, -1)
    size = abs(perturbation).max(1) if norm == "linf" else np.linalg.norm(perturbation, axis=1)
    assert (size <= epsilon + 1e-6).all() and (size[:3] > 0.5 * epsilon).all()
    assert images_adv.dtype == tf.float32
    assert float(tf.reduce_min(images_adv)) >= 0 and float(tf.reduce_max(images_adv)) <= 1
    assert (accuracy(model, images_adv, masks)[:3] < accuracy(model, images, masks)[:3]).all()
    np.testing.assert_array_equal(images_adv[3], images[3])  # nothing is labeled there
    for before, weight in zip(statistics, model.non_trainable_weights, strict=True):
        np.testing.assert_array_equal(before, weight)


@pytest.mark.slow
def test_a_graph_gives_the_same_result_and_images_do_not_depend_on_their_batch():
    model = small_model()
    images, masks = small_data(model)
    attack = AttackConfig(norm="linf", epsilon=0.05, step_size=0.02, steps=3, random_start=True)
    seeds = tf.constant([[5, 0], [5, 1], [5, 2], [5, 3]])
    eager = attack_segmenter(model, images, masks, attack=attack, losses=["masked_ce"], seed=seeds)

    open_batch = [([None, 12, 12, 3], tf.float32), ([None, 12, 12], tf.int32), ([None, 2], tf.int32)]

    @tf.function(input_signature=[tf.TensorSpec(*spec) for spec in open_batch])
    def graph(images, masks, seeds):
        return attack_segmenter(model, images, masks, attack=attack, losses=["masked_ce"], seed=seeds)

    np.testing.assert_allclose(graph(images, masks, seeds), eager, atol=1e-6)
    np.testing.assert_allclose(graph(images[1:2], masks[1:2], seeds[1:2]), eager[1:2], atol=1e-6)
    other = attack_segmenter(model, images, masks, attack=attack, losses=["masked_ce"], seed=7)
    assert np.abs(other - eager).max() > 1e-3


def test_the_result_is_the_worst_over_the_losses():
    model = small_model()
    images, masks = small_data(model)
    alone = [
        accuracy(model, attack_segmenter(model, images, masks, attack=LINF, losses=[name]), masks)
        for name in SEGMENTATION_LOSSES
    ]
    together = accuracy(model, attack_segmenter(model, images, masks, attack=LINF), masks)
    np.testing.assert_array_equal(together, np.min(alone, axis=0))
    assert len({tuple(values) for values in alone}) > 1  # the losses do not all lead to the same images


@pytest.mark.slow
def test_a_loss_that_is_named_twice_is_restarted():
    model = small_model()
    images, masks = small_data(model)
    attack = AttackConfig(norm="linf", epsilon=0.05, step_size=0.03, steps=1, random_start=True)
    once, twice = (
        accuracy(model, attack_segmenter(model, images, masks, attack=attack, losses=losses, seed=3), masks)
        for losses in (["ce"], ["ce"] * 4)
    )
    assert (twice <= once).all() and (twice < once).any()


def one_knob(images: tf.Tensor) -> tf.Tensor:
    """Both pixels depend on the brightness alone. Only where it is below 0.45 can both be made wrong.

    The true class of both is 0. The first pixel is wrong everywhere, the more so the brighter the image.
    """
    brightness = tf.reduce_mean(images, axis=(1, 2, 3))
    first = tf.stack([-20 * brightness, 20 * brightness], axis=-1)
    second = tf.stack([20 * (brightness - 0.45), -20 * (brightness - 0.45)], axis=-1)
    return tf.stack([first, second], axis=1)[:, None]


def test_the_plain_cross_entropy_wastes_its_steps_on_a_pixel_that_is_wrong_already():
    images, masks = tf.fill([1, 1, 2, 1], 0.5), tf.zeros([1, 1, 2], tf.int32)
    attack = AttackConfig(norm="linf", epsilon=0.1, step_size=0.04, steps=3)
    found = {
        name: accuracy(one_knob, attack_segmenter(one_knob, images, masks, attack=attack, losses=[name]), masks)[0]
        for name in SEGMENTATION_LOSSES
    }
    assert found == {"ce": 0.5, "masked_ce": 0.0, "js": 0.0}


def test_the_divergence_is_the_one_of_jensen_and_shannon():
    rng = np.random.default_rng(0)
    logits, masks = 3 * rng.normal(size=(2, 3, 4, 5)), rng.integers(0, 5, (2, 3, 4))
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    q = np.eye(5)[masks]
    middle = (p + q) / 2
    parts = [np.where(one > 0, one * np.log(np.maximum(one, 1e-300) / middle), 0).sum(-1) for one in (p, q)]
    expected = (sum(parts) / 2).mean((1, 2))
    found = attacks._jensen_shannon(tf.constant(logits, tf.float32), tf.constant(masks))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_the_plain_loss_is_the_loss_of_training_and_the_masked_one_its_part_that_is_right():
    model = small_model()
    images, masks = small_data(model)
    logits = 4 * model(images)
    np.testing.assert_allclose(attacks._plain(logits, masks), PixelCrossEntropy().call(masks, logits), rtol=1e-5)
    right = tf.argmax(logits, -1, output_type=tf.int32) == masks
    share = tf.reduce_sum(tf.cast(right, tf.float32), (1, 2)) / np.maximum((masks.numpy() >= 0).sum((1, 2)), 1)
    expected = PixelCrossEntropy().call(tf.where(right, masks, -1), logits) * share
    np.testing.assert_allclose(attacks._masked(logits, masks), expected, rtol=1e-5)


@pytest.mark.parametrize("name", SEGMENTATION_LOSSES)
def test_iterates_are_ranked_by_their_wrong_pixels_and_climbed_by_their_loss(name):
    model = small_model()
    images, masks = small_data(model)
    loss = attacks._LOSSES[name]
    logits = tf.constant(5 * model(images).numpy())
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(logits)
        ranked, plain = attacks._ranked_loss(logits, masks, loss), loss(logits, masks)
    wrong = ((tf.argmax(logits, -1, output_type=tf.int32) != masks) & (masks >= 0)).numpy().sum((1, 2))
    assert (np.abs(ranked - wrong - 0.25) <= 0.25).all()
    np.testing.assert_allclose(tape.gradient(ranked, logits), tape.gradient(plain, logits), atol=1e-9)


@pytest.mark.slow
def test_an_image_that_is_wrong_everywhere_stays_in_the_ball_and_finite():
    model = small_model()
    images, masks = small_data(model)
    masks = (tf.argmax(model(images), -1, output_type=tf.int32) + 1) % 3
    for start, best in ((False, True), (True, False)):
        attack = AttackConfig(norm="l2", epsilon=1.0, step_size=0.5, steps=3, random_start=start, use_best=best)
        for losses in (["masked_ce"], SEGMENTATION_LOSSES):
            images_adv = attack_segmenter(model, images, masks, attack=attack, losses=losses).numpy()
            assert np.isfinite(images_adv).all()
            assert (np.linalg.norm((images_adv - images.numpy()).reshape(4, -1), axis=1) <= 1.0 + 1e-6).all()
            assert not accuracy(model, images_adv, masks).any()
    slope = slope_of(
        model, images, lambda logits: attacks._masked(logits, masks), masks, correct_of=lambda *_: tf.ones([4], tf.bool)
    )
    assert not np.any(slope.loss) and not np.any(slope.gradient)


def test_without_an_attack_and_for_the_last_iterate():
    model = small_model()
    images, masks = small_data(model)
    none = AttackConfig(norm="linf", epsilon=0.0, step_size=0.0, steps=5)
    np.testing.assert_array_equal(attack_segmenter(model, images, masks, attack=none), images)
    best, last = (
        accuracy(
            model,
            attack_segmenter(
                model,
                images,
                masks,
                attack=AttackConfig(norm="linf", epsilon=0.05, step_size=0.1, steps=7, use_best=use_best),
            ),
            masks,
        )
        for use_best in (True, False)
    )
    assert (best <= last).all()


def test_wrong_arguments_are_refused():
    model = small_model()
    images, masks = small_data(model)
    with pytest.raises(UserError, match="Unknown loss of an attack on segmentation. Received: 'mce'"):
        attack_segmenter(model, images, masks, attack=LINF, losses=["mce"])  # type: ignore[list-item]
    with pytest.raises(UserError, match=r"at least one of ce, masked_ce, js. Received: \[\]"):
        attack_segmenter(model, images, masks, attack=LINF, losses=[])
    with pytest.raises(UserError, match="Received: 'ce'"):
        attack_segmenter(model, images, masks, attack=LINF, losses="ce")
    with pytest.raises(UserError, match=r"images of shape \(4, 12, 12, 3\), masks of shape \(4, 6, 12\)"):
        attack_segmenter(model, images, masks[:, ::2], attack=LINF)
    with pytest.raises(UserError, match="Received: masks of type float32"):
        attack_segmenter(model, images, tf.cast(masks, tf.float32), attack=LINF)
    with pytest.raises(UserError, match="Received: values from -1 to 7"):
        attack_segmenter(model, images, tf.where(masks == 2, 7, masks), attack=LINF)
    with pytest.raises(UserError, match=r"Received: logits of shape \(1, 10, 12, 3\)"):
        attack_segmenter(lambda images: model(images)[:, 2:], images, masks, attack=LINF)
    with pytest.raises(UserError, match="Received: values from 0"):
        attack_segmenter(model, 255 * images, masks, attack=LINF)


@pytest.fixture(scope="module")
def trained() -> tuple[keras.Model, np.ndarray, np.ndarray]:
    """A small segmenter that knows its 16 scenes, at 32 pixels a side."""
    keras.utils.set_random_seed(0)
    images, masks = scenes(16, size=32)
    classifier = build_classifier("resnet8", 10, image_size=32, mean=(0.5,) * 3, std=(0.25,) * 3)
    segmenter = build_segmenter(classifier, 4, seed=0)
    segmenter.compile(keras.optimizers.Adam(2e-3), PixelCrossEntropy())
    segmenter.fit(images, masks, batch_size=8, epochs=40, verbose=0)
    assert pixel_accuracy_of_each_image(segmenter(images), masks).numpy().mean() > 0.97
    return segmenter, images, masks


@pytest.mark.slow
def test_on_a_trained_model_the_masked_loss_is_at_least_as_strong(trained):
    model, images, masks = trained
    # The colors of the scenes differ by more than usual radii.
    attack = AttackConfig(norm="linf", epsilon=0.2, step_size=0.05, steps=10)
    found = {
        name: accuracy(model, attack_segmenter(model, images, masks, attack=attack, losses=[name]), masks).mean()
        for name in SEGMENTATION_LOSSES
    }
    assert found["masked_ce"] <= found["ce"] + 0.01
    worst = accuracy(model, attack_segmenter(model, images, masks, attack=attack), masks).mean()
    assert worst <= min(found.values())


@pytest.mark.slow
def test_adversarial_training_takes_a_segmenter_as_it_is(trained):
    model, images, masks = trained
    trainer = AdversarialTrainer(model, AttackConfig(norm="linf", epsilon=0.2, step_size=0.1, steps=3))
    trainer.compile(keras.optimizers.Adam(1e-3), PixelCrossEntropy(), metrics=[MeanIoU(4), PixelAccuracy()])
    # In batches of one image, the figures are those of each image.
    for index in range(3):
        logs = trainer.evaluate(
            images[index : index + 1], masks[index : index + 1], batch_size=1, verbose=0, return_dict=True
        )
        assert logs["loss"] >= logs["clean_loss"] > 0
    before = trainer.evaluate(images, masks, batch_size=8, verbose=0, return_dict=True)
    history = trainer.fit(images, masks, batch_size=8, epochs=10, verbose=0).history
    assert sorted(history) == ["clean_loss", "loss", "mean_iou", "pixel_accuracy"]
    after = trainer.evaluate(images, masks, batch_size=8, verbose=0, return_dict=True)
    assert after["loss"] < before["loss"] and after["pixel_accuracy"] > before["pixel_accuracy"]
    assert 0 < after["mean_iou"] < 1
