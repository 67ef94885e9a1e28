"""A plain classifier computes exactly the same function, and the original model is not changed."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from robust_tf.errors import UserError
from robust_tf.models import (
    ARCHITECTURES,
    build_classifier,
    load_classifier,
    outputs_of,
    pixel_warning,
    plain_classifier,
)
from tests.model_forms import Subclassed, called, functional, image_input, lora, nested

layers = keras.layers
IMAGES = np.random.default_rng(1).random((5, 8, 8, 3)).astype(np.float32)


def test_classifiers_of_this_package_are_returned_unchanged():
    classifier = build_classifier("resnet8", 3, image_size=8, mean=(0.5,) * 3, std=(0.2,) * 3)
    assert "resnet8" in ARCHITECTURES and plain_classifier(classifier) is classifier


def test_the_original_model_is_not_changed():
    model = nested()
    config, before = model.get_config(), model(IMAGES).numpy()
    classifier = plain_classifier(model)
    for weight in classifier.weights:
        weight.assign(tf.zeros_like(weight))
    assert model.get_config() == config
    np.testing.assert_array_equal(model(IMAGES), before)
    assert classifier is plain_classifier(classifier)


def test_nested_layers_are_flattened_with_unique_names():
    names = [layer.name for layer in plain_classifier(nested()).layers]
    assert len(set(names)) == len(names)
    assert {"same", "same_1"} < set(names) and not {"base", "head", "convolutions"} & set(names)


@pytest.mark.parametrize("training", [False, True])
def test_a_nested_batchnorm_keeps_its_mode(training):
    """Keras's guide to fine-tuning calls `base(images, training=False)`."""
    base = keras.Sequential([image_input(), layers.Flatten(), layers.BatchNormalization()])
    images = image_input()
    model = keras.Model(images, layers.Dense(2)(base(images, training=False)))
    classifier = plain_classifier(model)
    np.testing.assert_allclose(classifier(IMAGES, training=training), model(IMAGES, training=training), atol=1e-5)


def test_a_single_logit_belongs_to_class_1():
    model = functional(1)
    logits = plain_classifier(model)(IMAGES).numpy()
    np.testing.assert_array_equal(logits[:, 0], 0)
    np.testing.assert_allclose(logits[:, 1], model(IMAGES)[:, 0], atol=1e-6)


@pytest.mark.parametrize(
    "end",
    [
        layers.Softmax(),
        layers.Activation("softmax"),
        keras.ops.softmax,
        keras.activations.softmax,
        lambda x: layers.Identity()(layers.Activation("linear", dtype="float32")(layers.Softmax()(x))),
    ],
)
def test_every_form_of_softmax_at_the_end_is_removed(end):
    images = image_input()
    logits = layers.Dense(4, name="scores")(layers.Flatten()(images))
    found = plain_classifier(keras.Model(images, end(logits)))
    np.testing.assert_allclose(found(IMAGES), keras.Model(images, logits)(IMAGES), atol=1e-6)


def test_low_rank_adapters_are_kept():
    model = lora()
    images = {"image": keras.Input((8, 8, 3))}
    classifier = plain_classifier(keras.Model(images, model(images["image"])))
    np.testing.assert_allclose(classifier(IMAGES), model(IMAGES), atol=1e-6)


def test_a_layer_that_is_called_twice_stays_one_layer():
    shared = keras.Sequential([keras.Input((4, 8, 3)), layers.Conv2D(3, 3, name="both"), layers.Flatten()])
    images = image_input()
    both = layers.Concatenate()([shared(images[:, :4]), shared(images[:, 4:])])
    model = keras.Model(images, layers.Dense(3, activation="softmax")(both))
    classifier = plain_classifier(model)
    assert [layer.name for layer in classifier.layers].count("both") == 1
    np.testing.assert_allclose(tf.nn.softmax(classifier(IMAGES)), model(IMAGES), atol=1e-6)


@pytest.mark.parametrize("activation", ["sigmoid", "softmax", "tanh"])
def test_one_output_behind_a_reshape_is_refused(activation):
    """Its activation is not at the end, so it cannot be removed."""
    images = image_input()
    x = layers.Dense(1, activation=activation)(layers.Flatten()(images))
    with pytest.raises(UserError, match=f"whose output ends in {activation}"):
        plain_classifier(keras.Model(images, layers.Reshape((1,))(x)))


def test_a_model_without_a_shape_is_refused():
    for model in (
        keras.Sequential([layers.Flatten(), layers.Dense(2)], name="shapeless"),
        Subclassed(name="shapeless"),
    ):
        with pytest.raises(UserError, match="'shapeless', built for None.*keras.Input"):
            plain_classifier(model)


def test_a_layer_with_a_reserved_name_is_renamed():
    images = image_input()
    x = layers.Dense(3, name="logits")(layers.Flatten()(layers.Conv2D(2, 3, name="features")(images)))
    classifier = plain_classifier(keras.Model(images, layers.Dense(2, name="out")(x)))
    assert [layer.name for layer in classifier.layers] == ["images", "features_1", "flatten", "logits_1", "out"]


def test_the_error_for_a_file_with_custom_code_names_the_class(tmp_path):
    class Unknown(Subclassed):
        pass

    called(Unknown()).save(tmp_path / "mine.keras")
    with pytest.raises(
        UserError, match=r"mine.keras, which needs the Python code of 'Unknown'\. .* save keras.Model\("
    ) as error:
        load_classifier(tmp_path / "mine.keras")
    assert len(str(error.value)) < 400


def test_outputs_of_returns_the_unconverted_outputs():
    images = image_input()
    x = layers.Dense(3, activation="softmax")(layers.Flatten()(images))
    model = keras.Model({"image": images}, {"logits": x, "other": layers.Dense(2)(x)})
    np.testing.assert_array_equal(outputs_of(model, IMAGES), model({"image": IMAGES})["logits"])
    assert outputs_of(called(Subclassed()), IMAGES).shape == (5, 3)


@pytest.mark.parametrize(
    ("first", "warned"),
    [
        (layers.Rescaling(1 / 255), True),
        (layers.Rescaling(1 / 127.5, offset=-1.0), True),
        (layers.Rescaling([1 / 255, 1 / 255, 1 / 255]), True),
        (layers.Normalization(mean=[123.7, 116.8, 103.9], variance=[3400.0] * 3), True),
        (layers.Normalization(mean=[0.485, 0.456, 0.406], variance=[0.05] * 3), False),
        (layers.Rescaling(2.0, offset=-1.0), False),
        (layers.Rescaling(255.0), False),
    ],
)
def test_a_first_layer_for_pixels_up_to_255_gives_a_warning(first, warned):
    model = keras.Sequential([image_input(), first, layers.Flatten(), layers.Dense(2)])
    warning = pixel_warning(plain_classifier(model))
    assert bool(warning) == warned
    if warned:
        assert repr(first.name) in warning and "[0, 1]" in warning


def test_a_rescaling_after_another_layer_gives_no_warning():
    model = keras.Sequential(
        [image_input(), layers.Rescaling(255.0), layers.Rescaling(1 / 255), layers.Flatten(), layers.Dense(2)]
    )
    assert pixel_warning(plain_classifier(model)) is None
