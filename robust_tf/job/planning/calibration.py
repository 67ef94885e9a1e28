"""The share of a device's speed that a training step reaches, as measured on a GPU, and the flags that keep XLA out.

After a new measurement, change the numbers in MEASURED, and the command beside them if it differs. Nothing else depends
on them: the plans, and the tests that compare plans with the measurements, follow.
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
        gpu: Name of the GPU in `DEVICES`.
        compiled: Whether XLA compiled the step.
        precision: Value of `--precision`.
        images_per_second: Speed of the training step, including the attack.
        peak_gib: Peak memory of the tensors in GiB.
    """

    gpu: str
    compiled: bool
    precision: Precision
    images_per_second: float
    peak_gib: float

    @property
    def utilization(self) -> float:
        """Share of the memory's bandwidth that this step reached, by the bytes that plans count."""
        moved = TRAFFIC_FACTOR * _MOVED[self.precision == "float32"] * self.images_per_second
        return round(moved / DEVICES[self.gpu].bandwidth, 3)

    @property
    def memory_factor(self) -> float:
        """Memory for the images of this step, as a multiple of what plans count for a compiled one; at least 1."""
        is_float32 = self.precision == "float32"
        images = self.peak_gib * 2**30 - _FIXED[is_float32]
        return max(1.0, round(images / (MEASURED_BATCH_SIZE * _PER_IMAGE[is_float32]), 2))


# PGD-3 training of ResNet-50 at 224x224, L2, best iterate, batch 128, with TensorFlow 2.21 and driver 580.159:
#   python -m tests.bench.gpu_step --shape=resnet50_224 --batches=128
# The H100 was measured on 27 November 2026 (medians of 9 steps), the H200 on 26 November (medians of 5 steps), when
# Keras computed BatchNorm from several operations. XLA has not been measured in float32 and float16.
MEASURED_BATCH_SIZE = 128
MEASURED = (
    Measured(gpu="H100", compiled=True, precision="mixed_bfloat16", images_per_second=1590, peak_gib=5.20),
    Measured(gpu="H100", compiled=False, precision="mixed_bfloat16", images_per_second=773, peak_gib=6.36),
    Measured(gpu="H200", compiled=True, precision="mixed_bfloat16", images_per_second=1702, peak_gib=5.20),
    Measured(gpu="H200", compiled=False, precision="mixed_float16", images_per_second=369, peak_gib=9.18),
    Measured(gpu="H200", compiled=False, precision="float32", images_per_second=394, peak_gib=12.2),
)
# What plans count for this step, in half precision and in float32: the bytes that convolutions and matrix products move
# for an image, the bytes that do not depend on the batch, and those for an image. A test counts them again.
_MOVED = (440.0e6, 879.2e6)
_FIXED = (358.1e6, 306.9e6)
_PER_IMAGE = (43.87e6, 87.74e6)


def expected(*, compiled: bool, precision: Precision, gpu: str) -> Measured:
    """Returns the measurement that is nearest to a job: compiled or not in any case, then the precision, then the GPU.

    Args:
        compiled: Whether XLA compiles the training step.
        precision: Value of `--precision`.
        gpu: Name of the device in `DEVICES`. If it has not been measured, the first GPU that has been stands for it.

    Example:
        >>> expected(compiled=True, precision="float32", gpu="A100").gpu
        'H100'
    """
    candidates = [row for row in MEASURED if row.compiled == compiled]
    return max(candidates, key=lambda row: (row.precision == precision, row.gpu == gpu))


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
