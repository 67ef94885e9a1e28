"""The stages of a classifier, and which of them train.

A layer belongs to the stage that its name starts with: "stage2_block1_conv1" to "stage2". The last layer, "logits",
belongs to the head. Layers without weights may have any name.
"""

import math
import re
from collections.abc import Iterable, Iterator
from typing import get_args

import keras

from robust_tf.config.transfer import FrozenBatchNorm, TransferMode
from robust_tf.errors import UserError, unknown_name

TRANSFER_MODES: tuple[TransferMode, ...] = get_args(TransferMode)
FROZEN_BATCHNORM: tuple[FrozenBatchNorm, ...] = get_args(FrozenBatchNorm)

HEAD = "head"


def stage_of(layer_name: str) -> str | None:
    """The stage that a layer of this name belongs to ("stem", "stage1", ..., "head"), or None."""
    if layer_name == "logits":
        return HEAD
    prefix = layer_name.partition("_")[0]
    return prefix if re.fullmatch(r"stem|stage[1-9]\d*|head", prefix) else None


def stages(classifier: keras.Model) -> dict[str, list[keras.layers.Layer]]:
    """The layers of each stage, from the input to the output.

    Args:
        classifier: a flat functional model whose layer names start with their stage.

    Returns:
        The layers by stage, in the order "stem", "stage1", ..., "stageN", "head".

    Raises:
        UserError: a layer with weights belongs to no stage.
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
            "... or 'head_', or be 'logits', as in the architectures of this package. Received layers of no stage: "
            f"{shortened(homeless)}; stages found: {', '.join(sorted(by_stage, key=_depth)) or 'none'}. Use the "
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
    """Says which layers of the classifier train; what was frozen before does not matter.

    Call it before `compile`: a model that is compiled already goes on training the weights that it trained. A saved
    `.keras` file does not hold `batchnorm="update"`: call `freeze` again after loading.

    Args:
        classifier: changed in place. "fixed_feature" needs a layer called "features", "partial" needs `stages`;
            otherwise it may be any flat or nested Keras model.
        mode: "full_network": everything trains; "fixed_feature": only the layers after "features" train; "partial":
            all stages after the stage `through` train.
        through: the last frozen stage, for "partial" only; the stages before it are frozen too.
        batchnorm: what the frozen BatchNormalization layers do in training. "frozen": nothing, they use their moving
            statistics. "update": they use the statistics of the batch and go on updating the moving ones, as the
            reference does. Their gamma and beta are frozen in both cases.

    Raises:
        UserError: an unknown mode or stage, `through` missing or given where it has no meaning, no layer "features",
            a layer that belongs to no stage, or quantized layers that should train.

    Source: Salman et al. 2020, arXiv 2007.08489, section 2 (fixed-feature and full-network transfer).
    """
    if mode not in TRANSFER_MODES:
        raise unknown_name("transfer mode", mode, TRANSFER_MODES)
    if batchnorm not in FROZEN_BATCHNORM:
        raise unknown_name("behaviour of frozen BatchNormalization", batchnorm, FROZEN_BATCHNORM)
    if (mode == "partial") != (through is not None):
        raise UserError(
            "`through` names the last frozen stage of mode='partial', and of no other mode. "
            f"Received: mode={mode!r}, through={through!r}."
        )
    quantized = [layer.name for layer in _without_nesting(classifier.layers) if layer.quantization_mode is not None]
    if quantized and mode != "fixed_feature":
        raise UserError(
            "Quantized weights do not train. Received: "
            f"mode={mode!r} for a classifier with quantized layers: {shortened(quantized)}. Use fixed_feature, or the "
            "classifier as it was before its quantization."
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
            # With trainable=False the layer would use its moving statistics, so only its weights are frozen.
            for weight in layer.trainable_weights:
                weight.trainable = False
        else:
            layer.trainable = False


def parameter_counts(classifier: keras.Model) -> tuple[int, int]:
    """The number of trainable parameters and of all parameters, moving statistics included."""
    trainable, total = (
        sum(math.prod(weight.shape) for weight in weights)
        for weights in (classifier.trainable_weights, classifier.weights)
    )
    return trainable, total


def shortened(names: list[str]) -> str:
    """Names for a message; of many, the first and the last."""
    return ", ".join(names if len(names) <= 6 else [*names[:3], "...", *names[-2:]])


def _depth(stage: str) -> tuple[int, int]:
    """Sorts "stem" first, "stage10" after "stage9", "head" last."""
    number = stage.removeprefix("stage")
    return (1, int(number)) if number.isdigit() else (0 if stage == "stem" else 2, 0)


def _layers_before_features(classifier: keras.Model) -> list[keras.layers.Layer]:
    names = [layer.name for layer in classifier.layers]
    if "features" not in names:
        raise UserError(
            "mode='fixed_feature' freezes everything before the layer called 'features', the input of the head. "
            f"Received a model without it; its last layers: {', '.join(names[-4:])}. Give that layer this name."
        )
    return classifier.layers[: names.index("features")]


def _unfreeze(layer: keras.layers.Layer) -> None:
    # Keras ignores an assignment of the value that `trainable` has already, and would leave alone what is inside:
    # frozen layers of a trainable model, the frozen weights of a trainable layer.
    layer.trainable = False
    layer.trainable = True
    for inner in getattr(layer, "layers", []):
        _unfreeze(inner)


def _without_nesting(layers: Iterable[keras.layers.Layer]) -> Iterator[keras.layers.Layer]:
    """The layers themselves, with models among them replaced by their layers."""
    for layer in layers:
        if isinstance(layer, keras.Model):
            yield from _without_nesting(layer.layers)
        else:
            yield layer
