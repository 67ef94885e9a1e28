"""Which network a job trains, and what a transfer does with its source, as a record that checks itself."""

import dataclasses
from typing import Literal

from robust_tf.config.checks import check_choice, check_choices, check_default, check_ranges
from robust_tf.errors import UserError
from robust_tf.flags import flag

TransferMode = Literal["fixed_feature", "full_network", "partial"]
FrozenBatchNorm = Literal["frozen", "update"]
Normalization = Literal["source", "dataset"]
FeatureMode = Literal["live", "cached"]
HeadMethod = Literal["sgd", "lbfgs", "ridge"]
Claim = Literal["clean_accuracy", "robust_accuracy"]
# Flags that have no effect on a network that is trained from scratch.
TRANSFER_ONLY = ("transfer_mode", "hidden_layers", "normalization", "unfreeze_at_epoch")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransferConfig:
    """The network of a job: its architecture, and in transfer its source and head. See `--help` for each field.

    Example:
        >>> TransferConfig(source="resnet50_l2_eps3", transfer_mode="partial", freeze_through="stage3").cached
        False
    """

    architecture: str = flag(
        "",
        "Architecture of the network; an unknown name prints all names. If it is left out, transfer takes the "
        "architecture of the source, and pretraining takes resnet20.",
    )
    source: str = flag(
        "none",
        "Where transfer takes its weights from: the path of a .keras file or of a PyTorch checkpoint (.ckpt, .pt, "
        ".pth, .safetensors), the name of a published model such as resnet50_l2_eps3, or the path of a flag file, "
        "whose job runs first unless it is finished.",
    )
    transfer_mode: TransferMode = flag(
        "fixed_feature",
        "Which layers transfer trains. fixed_feature: the head. full_network: all. partial: all layers after "
        "--freeze_through.",
    )
    freeze_through: str = flag("", "Last frozen stage with --transfer_mode=partial, such as stage3.")
    frozen_batchnorm: FrozenBatchNorm = flag(
        "frozen",
        "What happens to the statistics of frozen BatchNorm layers. frozen: they do not change. update: they follow "
        "the new images, as in the code of Salman et al. (2020).",
    )
    hidden_layers: int = flag(0, "Number of hidden ReLU layers in the new head.")
    normalization: Normalization = flag(
        "source",
        "Which mean and standard deviation normalize the input in transfer: the values of the source, or "
        "the values of the data set, as in the code of Salman et al. (2020).",
    )
    features: FeatureMode = flag(
        "live",
        "When the backbone runs. live: in every step. cached, for --transfer_mode=fixed_feature: once for each view of "
        "an image, so that the head trains on stored features.",
    )
    views: int = flag(
        1,
        "Number of views of each training image with --features=cached. The first is the center crop, and the others "
        "are augmented.",
    )
    head: HeadMethod = flag(
        "sgd",
        "How the head is fitted. sgd: by training, as the optimization flags say. lbfgs and ridge, with "
        "--features=cached: by multinomial logistic regression or ridge regression, with the amount of regularization "
        "that does best on the validation images.",
    )
    features_cache_size_gb: float = flag(
        10.0, "Largest size of all stored features in GB. The least recently used are deleted first.", identity=False
    )
    unfreeze_at_epoch: int | None = flag(
        None,
        "Epoch, counted from 0, from which on the whole network is trained. By default the frozen layers stay frozen.",
    )
    baseline: bool = flag(
        False,
        "Also run the job from the counterpart of --source that was trained without an attack, and compare the two.",
        identity=False,
    )

    draws: int = flag(
        1,
        "Number of draws of the labeled images, with --features=cached and --examples_per_class. A head is fitted for "
        "each of the seeds --seed, --seed + 1, ..., also from the source of --baseline, and the comparison takes the "
        "mean over the draws. The published classifier is from the first draw.",
        identity=False,
    )
    claims: tuple[str, ...] = flag(
        (),
        "Accuracies for which the documentation of an experiment claims that the robust source is better: "
        "clean_accuracy, robust_accuracy or both. results.json marks them as claimed; nothing else changes.",
        identity=False,
    )

    def __post_init__(self) -> None:
        check_choices(self)
        check_ranges(self, ("views", "draws"), lowest=1)
        for claim in self.claims:
            check_choice("--claims", claim, Claim)
        if not self.baseline:
            check_default(self, ("claims",), "--baseline")
        check_ranges(self, ("hidden_layers",), lowest=0)
        if self.unfreeze_at_epoch is not None and self.transfer_mode == "full_network":
            raise UserError(
                "--unfreeze_at_epoch is for a network that is partly frozen. Received: "
                f"--unfreeze_at_epoch={self.unfreeze_at_epoch} --transfer_mode=full_network."
            )
        if (self.transfer_mode == "partial") != bool(self.freeze_through):
            raise UserError(
                "--freeze_through and --transfer_mode=partial go together. Received: "
                f"--transfer_mode={self.transfer_mode} --freeze_through={self.freeze_through!r}."
            )
        if not self.cached:
            check_default(self, ("views", "head", "draws"), "--features=cached")
        elif not self.features_cache_size_gb > 0:
            raise UserError(f"--features_cache_size_gb must be more than 0. Received: {self.features_cache_size_gb}.")

    @property
    def cached(self) -> bool:
        """Whether the head trains on stored features."""
        return self.features == "cached"
