"""What "features" means for a classifier, in transfer, in serving and in pictures: one place decides it."""

from collections.abc import Sequence

import keras

FEATURES, LOGITS = "features", "logits"


def head_of(layers: Sequence[keras.layers.Layer]) -> keras.layers.Layer | None:
    """The head among layers in their order: the last one with a kernel, or else with weights; None without any.

    A normalization layer after it does not count as a head.
    """
    with_weights = [layer for layer in layers if layer.weights]
    with_kernel = [layer for layer in with_weights if hasattr(layer, "kernel")]
    return (with_kernel or with_weights or [None])[-1]


def features_layer(classifier: keras.Model) -> keras.layers.Layer:
    """The layer "features", (batch, feature_dim), on which a head stands.

    It is the layer of that name where the classifier has one, as all of this package's have: hidden layers of a head
    come after it. For another model it is a new layer of that name, on the input of the last layer with a kernel (the
    head), averaged over all positions where that isn't (batch, feature_dim).

    Args:
        classifier: as of `plain_classifier`.
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
    """The classifier up to its `features_layer`: images to features (batch, feature_dim).

    Args:
        classifier: as of `plain_classifier`; the layers are shared with it.
        name: of the model that is returned.
    """
    return keras.Model(classifier.inputs[0], features_layer(classifier).output, name=name)
