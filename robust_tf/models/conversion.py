"""Conversion of a PyTorch checkpoint of the reference into a classifier."""

import keras

from robust_tf.models.architectures import build_classifier
from robust_tf.models.layers import without_initial_values
from robust_tf.models.reference_checkpoint import ReferenceCheckpoint
from robust_tf.models.reference_state import load_reference_state, reference_normalization, reference_num_classes

# Mean and standard deviation for checkpoints that do not store them. Users of torchvision's checkpoints, for example,
# normalize with these values.
IMAGENET_NORMALIZATION = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def classifier_from_checkpoint(
    checkpoint: ReferenceCheckpoint, architecture: str, *, image_size: int = 224
) -> keras.Model:
    """Builds the classifier of a checkpoint, with the checkpoint's number of classes, normalization and weights.

    Args:
        checkpoint: Checkpoint from `read_reference_checkpoint`.
        architecture: Name in `ARCHITECTURES`.
        image_size: Height and width of the images, in pixels. Checkpoints do not store it.

    Returns:
        A classifier like those of `build_classifier`.

    Raises:
        UserError: The checkpoint belongs to another architecture, has other keys or shapes, or the image size is too
            small.

    Example:
        >>> from robust_tf.models import to_reference_state
        >>> model = build_classifier("resnet8", 10, image_size=32, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
        >>> checkpoint = ReferenceCheckpoint(state=to_reference_state(model))  # or read_reference_checkpoint(path)
        >>> classifier_from_checkpoint(checkpoint, "resnet8", image_size=32).output_shape
        (None, 10)
    """
    state = checkpoint.state
    num_classes = reference_num_classes(state, architecture)
    mean, std = reference_normalization(state) or IMAGENET_NORMALIZATION
    classifier = without_initial_values(
        lambda: build_classifier(architecture, num_classes, image_size=image_size, mean=mean, std=std)
    )
    load_reference_state(classifier, state)
    return classifier
