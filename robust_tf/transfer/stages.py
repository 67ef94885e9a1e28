"""The stages of a classifier, and which of them are trained.

The name of a layer starts with its stage, so "stage2_block1_conv1" belongs to "stage2". The last layer, "logits",
belongs to the head. Layers without weights may have any name.
"""

import math
import re
from collections.abc import Iterable, Iterator
from typing import cast, get_args

import keras

from robust_tf.config.transfer import FrozenBatchNorm, TransferMode
from robust_tf.errors import UserError, unknown_name

TRANSFER_MODES: tuple[TransferMode, ...] = get_args(TransferMode)
FROZEN_BATCHNORM: tuple[FrozenBatchNorm, ...] = get_args(FrozenBatchNorm)

HEAD = "head"
# Layers with weights that some architectures have between their last stage and the pooling. Their names put them into
# the head, but they belong to the feature map of the last stage.
_BEFORE_POOLING = ("head_conv", "head_bn")


def stage_of(layer_name: str) -> str | None:
    """Returns the stage that a layer of this name belongs to ("stem", "stage1", ..., "head"), or None."""
    if layer_name == "logits":
        return HEAD
    prefix = layer_name.partition("_")[0]
    return prefix if re.fullmatch(r"stem|stage[1-9]\d*|head", prefix) else None


def stages(classifier: keras.Model) -> dict[str, list[keras.layers.Layer]]:
    """Returns the layers of each stage, from the input to the output.

    Args:
        classifier: Flat functional model whose layer names start with their stage, like the architectures of this
            package.

    Returns:
        The layers by stage, in the order "stem", "stage1", ..., "stageN", "head".

    Raises:
        UserError: A layer with weights belongs to no stage.

    Example:
        >>> from robust_tf.models import build_classifier
        >>> from robust_tf.transfer import stages
        >>> classifier = build_classifier("resnet8", 10, image_size=8, mean=(0.5,) * 3, std=(0.25,) * 3)
        >>> list(stages(classifier))
        ['stem', 'stage1', 'stage2', 'stage3', 'head']
    """
    by_stage: dict[str, list[keras.layers.Layer]] = {}
    homeless = []
    for layer in classifier.layers:
        stage = stage_of(layer.name)
        if stage is not None:
            by_stage.setdefault(stage, []).append(layer)
        elif layer.weights and not isinstance(layer, keras.layers.Normalization):
            homeless.append(layer.name)
    if homeless:
        raise UserError(
            "Every layer with weights must belong to a stage: its name must start with 'stem_', 'stage1_', 'stage2_', "
            "... or 'head_', or be 'logits', as in the architectures of this package. Received: layers without such a "
            f"name: {shortened(homeless)}; stages found: {', '.join(sorted(by_stage, key=_depth)) or 'none'}. Use the "
            "transfer mode fixed_feature or full_network, or build the model with such names."
        )
    return {stage: by_stage[stage] for stage in sorted(by_stage, key=_depth)}


def freeze(
    classifier: keras.Model,
    *,
    mode: TransferMode,
    through: str | None = None,
    batchnorm: FrozenBatchNorm = "frozen",
) -> None:
    """Sets which layers of a classifier train, and freezes the others.

    Robust features are most useful when the backbone is kept: "fixed_feature" trains the head alone, "full_network"
    trains everything, and "partial" lies between them. Layers that were frozen before are unfrozen first.

    Call `freeze` before `compile`, because a compiled model continues to train the weights that it trained before.
    Call it again after loading a `.keras` file if you use `batchnorm="update"`, which the file does not hold.

    Args:
        classifier: Flat or nested Keras model, which is changed in place. The mode "fixed_feature" needs a layer called
            "features", and "partial" needs layers with the names that `stages` describes.
        mode: "full_network" trains everything, "fixed_feature" only the layers after "features", and "partial" only the
            stages after the stage `through`.
        through: Last frozen stage, for the mode "partial" only. The stages before it are frozen as well.
        batchnorm: Behavior of frozen BatchNormalization layers in training. With "frozen" they use their moving
            statistics and do not change them. With "update" they use the statistics of the batch and update the moving
            statistics, as in the code of Salman et al. Their gamma and beta are frozen in both cases.

    Raises:
        UserError: The mode or the stage is unknown, `through` is missing or has no meaning in this mode, there is no
            layer "features", a layer belongs to no stage, or quantized layers would have to train.

    Source: Salman et al. 2020, arXiv 2007.08489, section 2 (fixed-feature and full-network transfer).

    Example:
        >>> from robust_tf.models import build_classifier
        >>> from robust_tf.transfer import freeze
        >>> classifier = build_classifier("resnet8", 10, image_size=8, mean=(0.5,) * 3, std=(0.25,) * 3)
        >>> freeze(classifier, mode="fixed_feature")
        >>> [weight.path for weight in classifier.trainable_weights]
        ['logits/kernel', 'logits/bias']
        >>> freeze(classifier, mode="partial", through="stage2")
        >>> sorted({weight.path.split("_")[0] for weight in classifier.trainable_weights})
        ['logits/bias', 'logits/kernel', 'stage3']
    """
    if mode not in TRANSFER_MODES:
        raise unknown_name("transfer mode", mode, TRANSFER_MODES)
    if batchnorm not in FROZEN_BATCHNORM:
        raise unknown_name("behavior of frozen BatchNormalization", batchnorm, FROZEN_BATCHNORM)
    if (mode == "partial") != (through is not None):
        raise UserError(
            "`through` names the last frozen stage: mode='partial' needs it, and no other mode takes it. "
            f"Received: mode={mode!r}, through={through!r}."
        )
    quantized = [layer.name for layer in _without_nesting(classifier.layers) if layer.quantization_mode is not None]
    if quantized and mode != "fixed_feature":
        raise UserError(
            "Quantized weights cannot be trained. Received: "
            f"mode={mode!r} for a classifier with quantized layers: {shortened(quantized)}. Use fixed_feature, or the "
            "classifier before its quantization."
        )
    frozen: list[keras.layers.Layer] = []
    if mode == "fixed_feature":
        frozen = _layers_before_features(classifier)
    elif through is not None:
        layers_of = stages(classifier)
        backbone = [stage for stage in layers_of if stage != HEAD]
        if through not in backbone:
            raise unknown_name("stage to freeze through", through, backbone)
        frozen = [layer for stage in backbone[: backbone.index(through) + 1] for layer in layers_of[stage]]

    _unfreeze(classifier)
    for layer in _without_nesting(frozen):
        if batchnorm == "update" and isinstance(layer, keras.layers.BatchNormalization):
            # Only the weights are frozen, because with trainable=False the layer would use its moving statistics.
            for weight in layer.trainable_weights:
                weight.trainable = False
        else:
            layer.trainable = False


def parameter_counts(classifier: keras.Model) -> tuple[int, int]:
    """Returns the number of trainable parameters and the number of all parameters.

    Args:
        classifier: Any Keras model.

    Returns:
        The two numbers. The second one includes the moving statistics of BatchNormalization.

    Example:
        >>> from robust_tf.models import build_classifier
        >>> from robust_tf.transfer import freeze, parameter_counts
        >>> classifier = build_classifier("resnet8", 10, image_size=8, mean=(0.5,) * 3, std=(0.25,) * 3)
        >>> freeze(classifier, mode="fixed_feature")
        >>> trainable, total = parameter_counts(classifier)
        >>> trainable  # 64 features and a bias for each of 10 classes
        650
    """
    trainable, total = (
        sum(math.prod(weight.shape) for weight in weights)
        for weights in (classifier.trainable_weights, classifier.weights)
    )
    return trainable, total


def shortened(names: list[str]) -> str:
    """Joins names for a message; if there are many, it shows only the first and the last ones."""
    return ", ".join(names if len(names) <= 6 else [*names[:3], "...", *names[-2:]])


def _depth(stage: str) -> tuple[int, int]:
    """Returns a sorting key that puts "stem" first, "stage10" after "stage9" and "head" last."""
    number = stage.removeprefix("stage")
    return (1, int(number)) if number.isdigit() else (0 if stage == "stem" else 2, 0)


def _layers_before_features(classifier: keras.Model) -> list[keras.layers.Layer]:
    names = [layer.name for layer in classifier.layers]
    if not {"features", "logits"} & set(names) and any(stage_of(name) == HEAD for name in names):
        # A head for boxes or masks takes the maps of several stages.
        by_stage = stages(classifier).items()
        return [
            layer for stage, layers in by_stage for layer in layers if stage != HEAD or layer.name in _BEFORE_POOLING
        ]
    if "features" not in names:
        raise UserError(
            "mode='fixed_feature' freezes everything before the layer called 'features', the input of the head. "
            f"Received: a model without it; its last layers are {', '.join(names[-4:])}. Rename the input of the head."
        )
    return cast(list[keras.layers.Layer], classifier.layers[: names.index("features")])


def _unfreeze(layer: keras.layers.Layer) -> None:
    # Keras ignores an assignment that does not change the value of `trainable`. It would then leave frozen layers of a
    # trainable model and frozen weights of a trainable layer as they are, so the value is changed twice.
    layer.trainable = False
    layer.trainable = True
    for inner in getattr(layer, "layers", []):
        _unfreeze(inner)


def _without_nesting(layers: Iterable[keras.layers.Layer]) -> Iterator[keras.layers.Layer]:
    """Yields the layers, with nested models replaced by their layers."""
    for layer in layers:
        if isinstance(layer, keras.Model):
            yield from _without_nesting(layer.layers)
        else:
            yield layer
