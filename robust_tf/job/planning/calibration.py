"""The share of a device's speed that a training step reaches, as measured on a GPU, and the flags that keep XLA out.

After a new measurement, change the numbers in MEASURED, and the GPU and the command beside them if they differ. Nothing
else depends on them: the plans, and the tests that compare plans with the measurements, follow.
"""

import dataclasses

from robust_tf.config.job import JobConfig
from robust_tf.config.optimization import Precision
from robust_tf.job.planning.devices import DEVICES, Cluster

# Between two convolutions there are BatchNorm, an activation and additions. Even when XLA fuses them, they read and
# write about as many bytes as the convolutions do.
TRAFFIC_FACTOR = 2
# The share of the peak speed that convolutions and matrix products reach where they, and not the memory, are the limit.
# This is an assumption: in SCALING.md, one such run reached 0.29 and another one 0.64.
COMPUTE_UTILIZATION = 0.35


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
    """What one kind of training step reached.

    Attributes:
        compiled: Whether XLA compiled the step.
        precision: Value of `--precision`.
        images_per_second: Speed of the training step, including the attack.
        peak_gib: Peak memory of the tensors in GiB.
    """

    compiled: bool
    precision: Precision
    images_per_second: float
    peak_gib: float

    @property
    def utilization(self) -> float:
        """Share of the memory's bandwidth that this step reached, by the bytes that plans count."""
        moved = TRAFFIC_FACTOR * _MOVED[self.precision == "float32"] * self.images_per_second
        return round(moved / DEVICES[MEASURED_ON].bandwidth, 3)

    @property
    def memory_factor(self) -> float:
        """Memory for the images of this step, as a multiple of what plans count for a compiled one; at least 1."""
        is_float32 = self.precision == "float32"
        images = self.peak_gib * 2**30 - _FIXED[is_float32]
        return max(1.0, round(images / (MEASURED_BATCH_SIZE * _PER_IMAGE[is_float32]), 2))


# Measured with this command on one H200 (driver 580.159, TensorFlow 2.21), on 26 November 2026: PGD-3 training of
# ResNet-50 at 224x224, L2, best iterate, batch 128. Its figures are the medians of 5 steps.
#   python -m tests.bench.gpu_step --shape=resnet50_224 --batches=128
# The first row that fits is used; XLA has not been measured in float32 and float16.
MEASURED_ON = "H200"
MEASURED_BATCH_SIZE = 128
MEASURED = (
    Measured(compiled=True, precision="mixed_bfloat16", images_per_second=1702, peak_gib=5.20),
    Measured(compiled=False, precision="mixed_bfloat16", images_per_second=352, peak_gib=9.44),
    Measured(compiled=False, precision="mixed_float16", images_per_second=369, peak_gib=9.18),
    Measured(compiled=False, precision="float32", images_per_second=394, peak_gib=12.2),
)
# What plans count for this step, in half precision and in float32: the bytes that convolutions and matrix products move
# for an image, the bytes that do not depend on the batch, and those for an image. A test counts them again.
_MOVED = (440.0e6, 879.2e6)
_FIXED = (358.1e6, 306.9e6)
_PER_IMAGE = (43.87e6, 87.74e6)


def expected(*, compiled: bool, precision: Precision) -> Measured:
    """Returns the measurement that is nearest to a job: the same precision if possible, compiled or not in any case.

    Example:
        >>> expected(compiled=True, precision="float32").precision
        'mixed_bfloat16'

    Args:
        compiled: Whether XLA compiles the training step.
        precision: Value of `--precision`.
    """
    candidates = [row for row in MEASURED if row.compiled == compiled]
    return next((row for row in candidates if row.precision == precision), candidates[0])


def obstacle_to_xla(job: JobConfig, cluster: Cluster) -> str:
    """Returns the flag because of which XLA does not compile a job on these devices; empty if it does.

    With several devices, each one compiles its own part of the step: the attack, the forward pass and the gradients.
    The exchange of gradients stays outside. Synchronized BatchNorm exchanges within the forward pass, so nothing is
    compiled there. On TPUs there is nothing but XLA.

    Args:
        job: Job to plan.
        cluster: Devices to plan for.
    """
    if cluster.device.slice_unit:
        return ""
    if job.optimization.jit_compile == "false":
        return "--jit_compile=false"
    return "--sync_batchnorm" if job.run.sync_batchnorm and cluster.devices > 1 else ""
