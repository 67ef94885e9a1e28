"""VGG-16 with BatchNorm.

Initialization: Kaiming-normal with fan_out for convolutions; normal with standard deviation 0.01 for linear layers.
Source: Simonyan and Zisserman 2014 (arXiv 1409.1556).
"""

import keras

from robust_tf.models.layers import Layers, normal_001

LAYERS = Layers()
# (channels, number of convolutions) of each stage. A stage ends with a pooling layer. The first stage is the stem.
STAGES = {"stem": (64, 2), "stage1": (128, 2), "stage2": (256, 3), "stage3": (512, 3), "stage4": (512, 3)}


def vgg16_bn(x: keras.KerasTensor) -> keras.KerasTensor:
    """Returns the features of VGG-16, (batch, 4096).

    Args:
        x: Normalized images (batch, height, width, 3).
    """
    for stage, (filters, convolutions) in STAGES.items():
        for index in range(1, convolutions + 1):
            x = LAYERS.conv(x, filters, 3, name=f"{stage}_conv{index}", use_bias=True)
            x = LAYERS.batch_norm(x, name=f"{stage}_bn{index}")
            x = LAYERS.relu(x, name=f"{stage}_relu{index}")
        x = keras.layers.MaxPooling2D(2, name=f"{stage}_pool")(x)
    # Adaptive pooling of a single pixel repeats it. Keras 3.15 cannot do that in a graph, where it needs a 2x2 window.
    pool = keras.layers.UpSampling2D if x.shape[1] == 1 else keras.layers.AdaptiveAveragePooling2D
    x = pool(7, name="head_pool")(x)
    # The reference flattens channel by channel. With the same order here, its linear weights can be used unchanged.
    x = keras.layers.Permute((3, 1, 2), name="head_channels_first")(x)
    x = keras.layers.Flatten(name="head_flatten")(x)
    for index, dropout in ((1, "head_dropout1"), (2, "features")):
        start = normal_001(x.shape[-1], 4096)
        x = keras.layers.Dense(4096, kernel_initializer=start, name=f"head_dense{index}")(x)
        x = LAYERS.relu(x, name=f"head_relu{index}")
        x = keras.layers.Dropout(0.5, name=dropout)(x)
    return x


def reference_module(layer: str) -> str:
    """Returns the reference's module for a layer. The reference numbers all modules, including activations and pooling.

    Args:
        layer: Name of a layer with weights.
    """
    head = {"head_dense1": "classifier.0", "head_dense2": "classifier.3", "logits": "classifier.6"}
    if layer in head:
        return head[layer]
    stage, part = layer.split("_")
    before = list(STAGES).index(stage)
    start = sum(3 * convolutions + 1 for _, convolutions in list(STAGES.values())[:before])
    kind, index = part[:-1], int(part[-1])
    return f"features.{start + 3 * (index - 1) + (kind == 'bn')}"
