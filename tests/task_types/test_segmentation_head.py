"""The segmenter has the right form on every architecture, shares the backbone, and is a plain Keras model."""

import subprocess
import sys

import keras
import numpy as np
import pytest

from robust_tf.errors import UserError
from robust_tf.models import ARCHITECTURES, build_classifier
from robust_tf.models.layers import without_initial_values
from robust_tf.tasks.segmentation.head import build_segmenter, dilation_rates
from robust_tf.tasks.segmentation.losses import PixelCrossEntropy
from robust_tf.tasks.segmentation.mean_iou import MeanIoU
from robust_tf.transfer.stages import stage_of
from tests.task_types.mask_scenes import scenes

USUAL = ("resnet18", "mobilenet_v2", "resnet20")  # the others run with the slow tests
NORMALIZATION = {"mean": (0.5,) * 3, "std": (0.25,) * 3}
# Sides of the last map and of the finer map for images of 64 pixels.
MAPS = {
    "resnet18": (2, 8),
    "densenet161": (2, 8),
    "mnasnet1_0": (2, 8),
    "mobilenet_v2": (2, 8),
    "shufflenet_v2_x1_0": (2, 8),
    "vgg16_bn": (2, 8),
    "cifar_resnet18": (8, 32),
    "cifar_wide_resnet28_10": (16, 64),
    "resnet20": (16, 64),
    "resnet20_width8": (16, 64),
    "resnet8": (16, 64),
}


def small(image_size: int = 32, seed: int = 0) -> keras.Model:
    return build_segmenter(build_classifier("resnet8", 10, image_size=image_size, **NORMALIZATION), 3, seed=seed)


def names_of(model: keras.Model) -> list[str]:
    return [layer.name for layer in model.layers]


@pytest.mark.parametrize(
    "architecture", [name if name in USUAL else pytest.param(name, marks=pytest.mark.slow) for name in ARCHITECTURES]
)
def test_every_architecture_becomes_a_segmenter(architecture):
    classifier = without_initial_values(lambda: build_classifier(architecture, 10, image_size=64, **NORMALIZATION))
    segmenter = build_segmenter(classifier, 5, seed=0)
    assert segmenter.output_shape == (None, 64, 64, 5)
    assert segmenter.name == architecture
    assert names_of(segmenter)[-2:] == ["head_mask_logits", "head_mask"]
    shared = {id(layer) for layer in classifier.layers}
    new = [layer for layer in segmenter.layers if id(layer) not in shared]
    assert all(layer.name.startswith("head_") for layer in new)
    assert all(type(layer).__module__.startswith("keras.") for layer in new)
    # All stages are in use, so nothing that the backbone has learned is lost.
    stages = {stage_of(layer.name) for layer in segmenter.layers}
    assert {stage_of(layer.name) for layer in classifier.layers} <= stages
    maps = tuple(segmenter.get_layer(name).input.shape[1] for name in ("head_pyramid1_conv", "head_fine_conv"))
    assert maps == MAPS.get(architecture, (2, 8))
    # The layers before the pooling belong to the last map, whatever their names. The rest of the old head is left out.
    assert ("head_bn" in names_of(segmenter)) == ("head_bn" in names_of(classifier))
    assert not {"head_dense1", "features", "logits"} & set(names_of(segmenter))
    rates = [segmenter.get_layer(f"head_pyramid{index}_conv").dilation_rate[0] for index in (2, 3, 4)]
    assert tuple(rates) == dilation_rates(maps[0])


def test_dilation_follows_the_size_of_the_map():
    assert dilation_rates(33) == (6, 12, 18)  # as published
    for size in range(1, 130):
        rates = dilation_rates(size)
        assert list(rates) == sorted(rates) and rates[0] >= 1
        assert size < 2 or rates[-1] < size  # every kernel sees more than its center
        assert size < 4 or len(set(rates)) == 3


@pytest.mark.parametrize("size", [29, 44])
def test_sides_need_not_be_multiples_of_the_strides(size):
    segmenter = build_segmenter(build_classifier("resnet18", 2, image_size=size, **NORMALIZATION), 3, seed=0)
    assert segmenter(np.zeros((1, size, size, 3), np.float32)).shape == (1, size, size, 3)


def test_the_seed_decides_the_initial_weights():
    classifier = build_classifier("resnet8", 10, image_size=32, **NORMALIZATION)
    first, same, other = (build_segmenter(classifier, 3, seed=seed).get_weights() for seed in (0, 0, 1))
    assert all(np.array_equal(one, two) for one, two in zip(first, same, strict=True))
    assert not all(np.array_equal(one, two) for one, two in zip(first, other, strict=True))
    kernels = [weight for weight in build_segmenter(classifier, 3, seed=0).weights if "head_pyramid" in weight.path]
    kernels = [weight.numpy().ravel()[:5].tolist() for weight in kernels if weight.path.endswith("kernel")]
    assert len({str(kernel) for kernel in kernels}) == len(kernels)  # no two layers start alike


def test_an_image_does_not_depend_on_its_batch_while_the_backbone_is_frozen():
    segmenter = small()
    for layer in segmenter.layers:
        layer.trainable = layer.name.startswith("head_")
    images = scenes(4, size=32)[0]
    together = segmenter(images, training=True)
    np.testing.assert_allclose(together[:1], segmenter(images[:1], training=True), atol=1e-5)
    np.testing.assert_allclose(together, segmenter(images, training=False), atol=1e-5)


def test_the_head_follows_the_precision_of_the_backbone_except_at_the_end():
    keras.config.set_dtype_policy("mixed_bfloat16")
    classifier = build_classifier("resnet8", 10, image_size=32, **NORMALIZATION)
    keras.config.set_dtype_policy("float32")
    segmenter = build_segmenter(classifier, 3, seed=0)
    for layer in segmenter.layers:
        if layer.name.startswith("head_"):
            expected = "float32" if layer.name.startswith("head_mask") else "bfloat16"
            assert layer.compute_dtype == expected, layer.name
    assert segmenter(np.zeros((1, 32, 32, 3), np.float32)).dtype == "float32"


def test_wrong_arguments_are_refused():
    classifier = build_classifier("resnet8", 10, image_size=32, **NORMALIZATION)
    with pytest.raises(UserError, match="at least 2 classes. Received: num_classes=1"):
        build_segmenter(classifier, 1, seed=0)
    inputs = keras.Input((None, None, 3))
    open_size = keras.Model(inputs, keras.layers.Conv2D(3, 3, name="stage1_conv")(inputs))
    with pytest.raises(
        UserError, match=r"fixed size. Received: a classifier of images of shape \(None, None, None, 3\)"
    ):
        build_segmenter(open_size, 3, seed=0)
    inputs = keras.Input((8, 8, 3))
    foreign = keras.Model(inputs, keras.layers.Conv2D(3, 3, name="convolution")(inputs))
    with pytest.raises(UserError, match="layers without such a name: convolution"):
        build_segmenter(foreign, 3, seed=0)


@pytest.mark.slow
def test_a_segmenter_learns_its_images_and_loads_without_this_package(tmp_path):
    images, masks = scenes(24)
    classifier = build_classifier("resnet20", 10, image_size=64, **NORMALIZATION)
    segmenter = build_segmenter(classifier, 4, seed=0)
    segmenter.compile(keras.optimizers.Adam(2e-3), PixelCrossEntropy(), metrics=[MeanIoU(4)])
    for _ in range(8):
        segmenter.fit(images, masks, batch_size=8, epochs=5, verbose=0)
        found = segmenter.evaluate(images, masks, verbose=0, return_dict=True)["mean_iou"]
        if found >= 0.95:
            break
    assert found >= 0.95

    plain = keras.Model(segmenter.inputs, segmenter.outputs)  # a file holds the loss of a compiled model
    plain.save(tmp_path / "segmenter.keras")
    np.save(tmp_path / "images.npy", images[:2])
    np.save(tmp_path / "logits.npy", plain.predict(images[:2], verbose=0))
    code = f"""
import sys
sys.modules["robust_tf"] = None  # an import would fail
import keras, numpy
folder = {str(tmp_path)!r}
model = keras.saving.load_model(folder + "/segmenter.keras", safe_mode=True)
logits = model.predict(numpy.load(folder + "/images.npy"), verbose=0)
numpy.testing.assert_array_equal(logits, numpy.load(folder + "/logits.npy"))
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
