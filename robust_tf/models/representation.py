"""The features of a classifier, as used in transfer, in serving and in pictures."""

from collections.abc import Sequence

import keras

FEATURES, LOGITS = "features", "logits"


def head_of(layers: Sequence[keras.layers.Layer]) -> keras.layers.Layer | None:
    """Returns the head: the last layer with a kernel, or else the last one with weights, or None.

    A normalization layer at the end is not mistaken for the head, because it has no kernel.

    Args:
        layers: Layers of a classifier in their order.
    """
    with_weights = [layer for layer in layers if layer.weights]
    with_kernel = [layer for layer in with_weights if hasattr(layer, "kernel")]
    return (with_kernel or with_weights or [None])[-1]


def features_layer(classifier: keras.Model) -> keras.layers.Layer:
    """Returns the layer "features", whose output (batch, feature_dim) is the input of the head.

    All classifiers of this package have a layer of this name; hidden layers of a head come after it. For any other
    classifier, a new layer is created: it takes the input of the last layer with a kernel, and averages this input over
    all positions if its shape is not (batch, feature_dim).

    Args:
        classifier: Plain classifier, see `plain_classifier`.
    """
    for layer in classifier.layers:
        if layer.name == FEATURES:
            return layer
    head = head_of(classifier.layers)
    x = classifier.outputs[0] if head is None else keras.tree.flatten(head.input)[0]
    new: dict[int, keras.layers.Layer] = {
        2: keras.layers.Identity(name=FEATURES),
        3: keras.layers.GlobalAveragePooling1D(data_format="channels_last", name=FEATURES),
        4: keras.layers.GlobalAveragePooling2D(data_format="channels_last", name=FEATURES),
    }
    layer = new.get(len(x.shape)) or keras.layers.Flatten(name=FEATURES)
    layer(x)
    return layer


def features_of(classifier: keras.Model, *, name: str | None = None) -> keras.Model:
    """Returns a model that maps images to the features of a classifier, (batch, feature_dim).

    Args:
        classifier: Plain classifier, see `plain_classifier`. The new model shares its layers.
        name: Name of the new model.

    Example:
        >>> from robust_tf.models import build_classifier
        >>> model = build_classifier("resnet8", 10, image_size=32, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
        >>> features_of(model).output_shape
        (None, 64)
    """
    return keras.Model(classifier.inputs[0], features_layer(classifier).output, name=name)
