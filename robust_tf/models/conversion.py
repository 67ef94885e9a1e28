"""From a checkpoint of the PyTorch reference to a classifier."""

import keras

from robust_tf.models.architectures import build_classifier
from robust_tf.models.layers import without_initial_values
from robust_tf.models.reference_checkpoint import ReferenceCheckpoint
from robust_tf.models.reference_state import load_reference_state, reference_normalization, reference_num_classes

# Mean and standard deviation of a checkpoint that stores none: torchvision's own, whose users normalise with these.
IMAGENET_NORMALIZATION = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def classifier_from_checkpoint(
    checkpoint: ReferenceCheckpoint, architecture: str, *, image_size: int = 224
) -> keras.Model:
    """Builds the classifier that a checkpoint holds, with the checkpoint's classes, normalisation and weights.

    Args:
        checkpoint: as `read_reference_checkpoint` gives it.
        architecture: a name in `ARCHITECTURES`.
        image_size: height and width of the images, in pixels; checkpoints do not tell.

    Returns:
        a classifier as of `build_classifier`.

    Raises:
        UserError: the checkpoint is of another architecture, has other keys or shapes, or the image size is too small.
    """
    state = checkpoint.state
    num_classes = reference_num_classes(state, architecture)
    mean, std = reference_normalization(state) or IMAGENET_NORMALIZATION
    classifier = without_initial_values(
        lambda: build_classifier(architecture, num_classes, image_size=image_size, mean=mean, std=std)
    )
    load_reference_state(classifier, state)
    return classifier
