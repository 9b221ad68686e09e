"""Machines that a calibration may run on: memory and speeds, as far as they are known.

Speeds are from data sheets or assumed, as is said of each; nothing here is measured.
"""

from __future__ import annotations

from dataclasses import dataclass

from shardsurgeon.layerwise.memory import free_memory
from shardsurgeon.layerwise.settings import Settings, require

_HERE = "this machine"


@dataclass(frozen=True, slots=True)
class Machine:
    """A machine: devices that are alike, each with a link of its own, one host, one disk.

    devices: how many; on_gpu: whether they have a memory of their own; device_memory, host_memory:
    bytes that are free, of one device and of the host, the same where there is one memory; flops:
    operations per second that products reach in practice on one device, 0 where nobody knows;
    link: bytes per second each way between the host and one device; disk: bytes per second of
    reading and of writing; dtype: that it computes fast in, None for the model's own.
    """

    name: str
    devices: int
    on_gpu: bool
    device_memory: int
    host_memory: int
    flops: float = 0.0
    link: float = 0.0
    disk: float = 0.0
    dtype: str | None = None


# Of the dense bf16 (CPU: float32) peak in a data sheet, products of a few hundred rows an expert
# are assumed to reach 40 %: 400 of 989 TFLOP/s is what the goal for one H200 was set by.
# Free is what the name says less 3 GB of a GPU's memory, for the driver and what lies unused
# between allocations, and less 5 % of a host's.
MACHINES = (
    Machine(
        "1 x H200",
        devices=1,
        on_gpu=True,
        device_memory=138 * 10**9,  # NVIDIA's data sheet: 141 GB
        # Assumed: the states of 16.8 million tokens of width 7168 take half of it.
        host_memory=486 * 10**9,
        flops=400e12,  # data sheet: 989 TFLOP/s in bf16, dense
        link=50e9,  # PCIe 5.0 x16 is 64 GB/s on paper; pinned copies reach about 50
        disk=5e9,  # assumed: one NVMe drive of PCIe 4.0, 7 GB/s on paper
    ),
    Machine(
        "8 x H100",
        devices=8,
        on_gpu=True,
        device_memory=77 * 10**9,  # data sheet: 80 GB
        host_memory=1900 * 10**9,  # as in a DGX H100: 2 TB
        flops=400e12,  # data sheet: 989 TFLOP/s in bf16, dense
        link=50e9,  # as above, each GPU has a slot of its own
        disk=20e9,  # assumed: several such drives in stripes, half of what they have on paper
    ),
    Machine(
        "1 x 24 GB GPU",
        devices=1,
        on_gpu=True,
        device_memory=21 * 10**9,
        host_memory=61 * 10**9,  # assumed: a desktop of 64 GB
        flops=66e12,  # NVIDIA's Ada whitepaper, RTX 4090: 165 TFLOP/s in bf16, dense
        link=25e9,  # PCIe 4.0 x16 is 32 GB/s on paper
        disk=5e9,  # assumed, as above
    ),
    Machine(
        "64-core CPU",
        devices=1,
        on_gpu=False,
        device_memory=486 * 10**9,
        host_memory=486 * 10**9,  # assumed: 512 GB
        flops=2.4e12,  # 64 cores x 32 float32 operations a cycle (two units of AVX2) x 3 GHz: 6.1
        disk=5e9,  # assumed, as above
        dtype="float32",  # bf16 has no unit of its own on many
    ),
)


def this_machine(device: str) -> Machine:
    """This machine as far as it is known: its free memory. Raises UsageError where torch is needed
    to know of a device and is not installed, and where there is no such device."""
    if device == "cpu":
        free = free_memory(device)
        return Machine(_HERE, 1, False, free, free)
    require("torch")
    from shardsurgeon.layerwise.devices import require_device
    from shardsurgeon.layerwise.processes import devices

    names = devices(Settings(device))
    for name in names:
        require_device(name)
    return Machine(_HERE, len(names), True, min(map(free_memory, names)), free_memory("cpu"))
