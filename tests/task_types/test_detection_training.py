"""Training of a detector: it learns its own images, its file loads without this package, and it can be attacked."""

import pathlib
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

from robust_tf.models import build_classifier
from robust_tf.tasks.detection import (
    BoxEncoder,
    BoxLoss,
    FocalLoss,
    anchors_for,
    average_precision,
    build_detector,
    decode_detections,
)
from robust_tf.training import AdversarialTrainer, AttackConfig
from robust_tf.transfer import with_dtype_policy
from tests.task_types.box_scenes import CLASSES, scenes

ATTACK = AttackConfig(norm="l2", epsilon=0.5, step_size=0.2, steps=2)


def build(image_size: int = 32, **options) -> keras.Model:
    classifier = build_classifier("resnet8", 3, image_size=image_size, mean=(0.5,) * 3, std=(0.25,) * 3)
    return build_detector(classifier, 3, seed=0, **({"channels": 32, "tower_depth": 2} | options))


def encoded(detector: keras.Model, truths: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    encode = BoxEncoder(anchors_for(detector))
    labels = [encode(truth["boxes"], truth["classes"], truth["crowd"]) for truth in truths]
    return {name: np.stack([label[name] for label in labels]) for name in labels[0]}


def detections_in(detector: keras.Model, images: np.ndarray) -> list[dict[str, np.ndarray]]:
    outputs = detector.predict(images, batch_size=8, verbose=0)
    found = decode_detections(outputs, anchors_for(detector), image_size=images.shape[1])
    return [{name: found[name][i].numpy() for name in ("boxes", "scores", "classes")} for i in range(len(images))]


def losses() -> dict[str, keras.losses.Loss]:
    return {"boxes": BoxLoss(), "classes": FocalLoss()}


@pytest.mark.slow
def test_a_detector_learns_its_own_images():
    images, truths = scenes(24, size=64)
    detector = build(64)
    schedule = keras.optimizers.schedules.CosineDecay(3e-3, 65 * 3)
    detector.compile(optimizer=keras.optimizers.Adam(schedule), loss=losses(), jit_compile=False)
    before = average_precision(truths, detections_in(detector, images), CLASSES)["ap"]
    detector.fit(images, encoded(detector, truths), batch_size=8, epochs=65, verbose=0)
    after = average_precision(truths, detections_in(detector, images), CLASSES)["ap"]
    assert before < 0.1 and after > 0.9, (before, after)


@pytest.mark.slow
def test_a_saved_detector_loads_without_this_package(tmp_path: pathlib.Path):
    """In safe mode and in a separate process. The anchors are found again from the file alone."""
    detector = build(50)  # an odd number of positions at several levels
    images = np.random.default_rng(0).random((2, 50, 50, 3)).astype(np.float32)
    np.save(tmp_path / "images.npy", images)
    detector.save(tmp_path / "detector.keras")
    program = (
        "import sys, keras, numpy as np\n"
        "detector = keras.saving.load_model('detector.keras', safe_mode=True)\n"
        "np.savez('outputs.npz', **detector(np.load('images.npy')))\n"
        "detector.export('exported', verbose=False)\n"
        "assert 'robust_tf' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True)
    outputs = detector(images)
    archive = tf.saved_model.load(tmp_path / "exported")
    restored, exported = np.load(tmp_path / "outputs.npz"), archive.serve(images)
    for name in ("boxes", "classes"):
        np.testing.assert_allclose(restored[name], outputs[name], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(exported[name], outputs[name], rtol=1e-4, atol=1e-4)
    loaded = keras.saving.load_model(tmp_path / "detector.keras")
    np.testing.assert_array_equal(anchors_for(loaded), anchors_for(detector))
    assert loaded.name == "resnet8"


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
def test_adversarial_training(policy):
    """The attack raises the loss of each image, and one step of `fit` changes the weights."""
    images, truths = scenes(4, size=32)
    classifier = build_classifier("resnet8", 3, image_size=32, mean=(0.5,) * 3, std=(0.25,) * 3)
    detector = build_detector(with_dtype_policy(classifier, policy), 3, seed=0, channels=16, tower_depth=1)
    labels = encoded(detector, truths)
    trainer = AdversarialTrainer(detector, ATTACK)
    trainer.compile(optimizer="adam", loss=losses(), jit_compile=False)

    batch = trainer._batch_of((tf.constant(images), labels), tf.constant([0, 0], tf.int64))
    images_adv = trainer._attacked(batch, ATTACK).images_adv
    distance = np.linalg.norm((images_adv - images).numpy().reshape(4, -1), axis=1)
    before, after = (trainer.compiled_loss(labels, detector(x)).numpy() for x in (images, images_adv))
    assert before.shape == (4,) and (after > before).all()
    assert (distance > 0.1).all() and (distance < 0.5001).all()

    weights = [weight.numpy() for weight in detector.trainable_weights]
    history = trainer.fit(images, labels, epochs=1, verbose=0).history
    assert set(history) == {"loss", "boxes_loss", "classes_loss", "clean_loss"}
    assert history["clean_loss"][0] == pytest.approx(before.mean(), rel=1e-3 if policy == "float32" else 0.05)
    assert history["boxes_loss"][0] + history["classes_loss"][0] == pytest.approx(history["loss"][0], rel=1e-3)
    changed = [not np.array_equal(a, b) for a, b in zip(weights, detector.trainable_weights, strict=True)]
    assert np.mean(changed) > 0.9
    robust = trainer.evaluate(images, labels, verbose=0, return_dict=True)
    assert robust["loss"] > robust["clean_loss"]


def test_the_compiled_loss_is_the_sum_of_both_losses():
    images, truths = scenes(4, size=32)
    detector = build()
    labels = encoded(detector, truths)
    trainer = AdversarialTrainer(detector, ATTACK)
    trainer.compile(optimizer="adam", loss=losses(), loss_weights={"boxes": 2.0, "classes": 1.0})
    outputs = detector(images)
    expected = 2 * BoxLoss().call(labels["boxes"], outputs["boxes"])
    expected += FocalLoss().call(labels["classes"].astype(np.float32), outputs["classes"])
    np.testing.assert_allclose(trainer.compiled_loss(labels, outputs), expected, rtol=1e-5)


def test_one_class():
    """For outputs (batch, A, 1) the trainer adds an axis to the labels (batch, A)."""
    images, truths = scenes(4, size=32)
    classifier = build_classifier("resnet8", 3, image_size=32, mean=(0.5,) * 3, std=(0.25,) * 3)
    detector = build_detector(classifier, 1, seed=0, channels=8, tower_depth=0)
    for truth in truths:
        truth["classes"] = np.zeros_like(truth["classes"])
    labels = encoded(detector, truths)
    trainer = AdversarialTrainer(detector, ATTACK)
    trainer.compile(optimizer="sgd", loss=losses(), jit_compile=False)
    expected = np.mean(trainer.compiled_loss(labels, detector(images)))
    clean = keras.Model(detector.inputs[0], detector.output)
    clean.compile(loss=losses())
    assert clean.evaluate(images, labels, verbose=0, return_dict=True)["loss"] == pytest.approx(expected, rel=1e-4)
