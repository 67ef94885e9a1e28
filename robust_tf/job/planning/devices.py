"""The accelerators that a job can be planned for: the DEVICES table, and the syntax of `--plan_devices`.

To add an accelerator, add a row to DEVICES.
"""

import dataclasses
import re
from collections.abc import Sequence

from robust_tf.errors import UserError, unknown_name

_GB, _GIB, _TERA = 1e9, 2**30, 1e12


@dataclasses.dataclass(frozen=True, kw_only=True)
class Device:
    """One row of the table: the maker's specification of one device. Peak speeds do not assume sparsity.

    Attributes:
        float32: Peak FLOP/s in float32; None if the device has no units for it.
        tf32: Peak FLOP/s of TensorFlow's convolutions and matrix products of float32 operands, on devices that compute
            them in a lower precision by default: TF32 on NVIDIA's tensor cores since Ampere, one bfloat16 pass on TPUs.
        bfloat16: Peak FLOP/s in bfloat16 with sums in float32; None if the device has no units for it.
        float16: Peak FLOP/s in float16 with sums in float32; None if the device has no units for it.
        memory: Size of the memory in bytes.
        bandwidth: Bandwidth of the memory in bytes/s.
        link: Bytes/s that a device sends to the other devices of its host (for a TPU, of its slice), in one direction.
        network: Bytes/s that a host sends to other hosts, in one direction, in the maker's reference system; a rented
            machine may have far less. None if the links are the only connection.
        per_host: Number of devices of each host in a TPU slice with several hosts.
        single_host: Number of devices in the largest TPU slice with a single host.
        slice_unit: How much each device adds to the number in the name of its TPU slice (2 for v4, where the number
            counts cores); 0 for other devices.
        source: Source of these numbers.
    """

    float32: float | None
    tf32: float | None = None
    bfloat16: float | None = None
    float16: float | None = None
    memory: float
    bandwidth: float
    link: float
    network: float | None
    per_host: int = 0
    single_host: int = 0
    slice_unit: int = 0
    source: str

    def peak(self, precision: str) -> float | None:
        """Returns the peak FLOP/s of convolutions and matrix products for a value of `--precision`."""
        peaks = {"float32": self.tf32 or self.float32, "mixed_bfloat16": self.bfloat16, "mixed_float16": self.float16}
        return peaks[precision]


_A100 = Device(
    float32=19.5 * _TERA,
    tf32=156 * _TERA,
    bfloat16=312 * _TERA,
    float16=312 * _TERA,
    link=300 * _GB,
    network=200 * _GB,
    memory=40 * _GIB,
    bandwidth=1555 * _GB,
    source="NVIDIA A100 (SXM4, 40 GB) data sheet; links and network of the DGX A100 (8 x 200 Gb/s), recalled",
)
_H100 = Device(
    float32=66.9 * _TERA,
    tf32=494.7 * _TERA,
    bfloat16=989.4 * _TERA,
    float16=989.4 * _TERA,
    link=450 * _GB,
    network=400 * _GB,
    memory=80 * _GIB,
    bandwidth=3350 * _GB,
    source="NVIDIA H100 (SXM5, 80 GB HBM3) data sheet (half of its figures with sparsity); network of the DGX H100 "
    "(8 x 400 Gb/s), recalled",
)
# "Recalled" marks numbers that were written down from memory of the maker's data sheet, without looking them up.
DEVICES = {
    "V100": Device(
        float32=15.7 * _TERA,
        float16=125 * _TERA,
        memory=16 * _GIB,
        bandwidth=900 * _GB,
        link=150 * _GB,
        network=50 * _GB,
        source="NVIDIA V100 (SXM2, 16 GB) data sheet, DGX-1 (4 x 100 Gb/s); recalled",
    ),
    "T4": Device(
        float32=8.1 * _TERA,
        float16=65 * _TERA,
        memory=16 * _GIB,
        bandwidth=320 * _GB,
        link=16 * _GB,
        network=12.5 * _GB,
        source="NVIDIA T4 data sheet, PCIe 3 x16, a 100 Gb/s network; recalled",
    ),
    "L4": Device(
        float32=30.3 * _TERA,
        tf32=60 * _TERA,
        bfloat16=121 * _TERA,
        float16=121 * _TERA,
        memory=24 * _GIB,
        bandwidth=300 * _GB,
        link=32 * _GB,
        network=12.5 * _GB,
        source="NVIDIA L4 data sheet (half of its figures with sparsity), PCIe 4 x16, a 100 Gb/s network; recalled",
    ),
    "A100": _A100,
    "A100-80GB": dataclasses.replace(
        _A100,
        memory=80 * _GIB,
        bandwidth=2039 * _GB,
        source="NVIDIA A100 (SXM4, 80 GB) data sheet; links and network of the DGX A100 (8 x 200 Gb/s), recalled",
    ),
    "H100": _H100,
    "H200": dataclasses.replace(
        _H100,
        memory=143_771 * 2**20,
        bandwidth=4800 * _GB,
        source="NVIDIA H200 (SXM, 141 GB HBM3e) data sheet (half of its figures with sparsity); memory as nvidia-smi "
        "reports it; network of the DGX H200 (8 x 400 Gb/s), recalled",
    ),
    "RTX4090": Device(
        float32=82.6 * _TERA,
        tf32=82.6 * _TERA,
        bfloat16=165.2 * _TERA,
        float16=165.2 * _TERA,
        memory=24 * _GIB,
        bandwidth=1008 * _GB,
        link=32 * _GB,
        network=12.5 * _GB,
        source="NVIDIA Ada architecture white paper, PCIe 4 x16, a 100 Gb/s network; recalled",
    ),
    "v4": Device(
        float32=None,
        tf32=275 * _TERA,
        bfloat16=275 * _TERA,
        memory=32 * _GIB,
        bandwidth=1200 * _GB,
        link=268 * _GB,
        network=None,
        per_host=4,
        single_host=4,
        slice_unit=2,
        source="Google Cloud TPU v4 documentation; link: its all-reduce bandwidth, 1.1 PB/s for 4,096 chips",
    ),
    "v5e": Device(
        float32=None,
        tf32=197 * _TERA,
        bfloat16=197 * _TERA,
        memory=16 * _GB,
        bandwidth=819 * _GB,
        link=200 * _GB,
        network=None,
        per_host=4,
        single_host=8,
        slice_unit=1,
        source="Google Cloud TPU v5e documentation (link: half of 400 GB/s in both directions); hosts recalled",
    ),
    "v5p": Device(
        float32=None,
        tf32=459 * _TERA,
        bfloat16=459 * _TERA,
        memory=95 * _GB,
        bandwidth=2765 * _GB,
        link=600 * _GB,
        network=None,
        per_host=4,
        single_host=4,
        slice_unit=2,
        source="Google Cloud TPU v5p documentation (link: 4,800 Gb/s); hosts recalled",
    ),
    "v6e": Device(
        float32=None,
        tf32=918 * _TERA,
        bfloat16=918 * _TERA,
        memory=32 * _GB,
        bandwidth=1638 * _GB,
        link=400 * _GB,
        network=None,
        per_host=4,
        single_host=8,
        slice_unit=1,
        source="Google Cloud TPU v6e documentation (link: half of 800 GB/s in both directions); hosts recalled",
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cluster:
    """Several identical hosts with identical devices.

    Attributes:
        name: Name as given in `--plan_devices`.
        device_name: Key of DEVICES.
        hosts: Number of hosts.
        per_host: Number of devices of each host.
    """

    name: str
    device_name: str
    hosts: int
    per_host: int

    @property
    def device(self) -> Device:
        """The row of DEVICES for this device."""
        return DEVICES[self.device_name]

    @property
    def devices(self) -> int:
        """Number of devices of all hosts."""
        return self.hosts * self.per_host


def parse_clusters(items: Sequence[str]) -> list[Cluster]:
    """Reads the clusters of `--plan_devices`: N x device, HOSTS x N x device, or the name of a TPU slice.

    Example:
        >>> [cluster.devices for cluster in parse_clusters(["8xA100", "4x8xH100", "v4-128"])]
        [8, 32, 64]

    Args:
        items: Clusters such as "8xA100", "4x8xH100" (4 hosts with 8 devices each) or "v4-128", where the number counts
            cores for v4 and v5p, and chips for v5e and v6e, as Google's names do.

    Raises:
        UserError: An item has none of these forms, or names a device that is not in the table.
    """
    return [_parse(item) for item in items]


def _parse(item: str) -> Cluster:
    names = {name.lower(): name for name in DEVICES}
    tpu = re.fullmatch(r"(v\d+\w*)-([1-9]\d*)", item)
    if tpu and tpu[1].lower() not in names:
        raise unknown_name("device of --plan_devices", tpu[1], DEVICES)
    if tpu:
        name = names[tpu[1].lower()]
        device, number = DEVICES[name], int(tpu[2])
        chips, rest = divmod(number, device.slice_unit)
        hosts = 1 if chips <= device.single_host else chips // device.per_host
        if rest or not chips or (hosts > 1 and chips % device.per_host):
            raise UserError(
                f"A slice of {name} has a multiple of {device.slice_unit * device.per_host} "
                f"{'cores' if device.slice_unit > 1 else 'chips'}. Received: --plan_devices={item}."
            )
        return Cluster(name=item, device_name=name, hosts=hosts, per_host=chips // hosts)
    numbers = re.fullmatch(r"(?:([1-9]\d*)x)?(?:([1-9]\d*)x)?([A-Za-z].*)", item)
    if not numbers:
        raise UserError(
            "--plan_devices takes N x device, HOSTS x N x device or a TPU slice, e.g. 8xA100,4x8xH100,v4-128. "
            f"Received: {item!r}."
        )
    first, second, wanted = numbers.groups()
    if wanted.lower() not in names:
        raise unknown_name("device of --plan_devices", wanted, DEVICES)
    name = names[wanted.lower()]
    if DEVICES[name].slice_unit:
        raise UserError(f"A TPU slice is named by its size, e.g. {name}-128. Received: --plan_devices={item}.")
    hosts, per_host = (int(first), int(second)) if second else (1, int(first or 1))
    return Cluster(name=item, device_name=name, hosts=hosts, per_host=per_host)
