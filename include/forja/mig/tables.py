"""What each GPU can be cut into: profiles, placements and engines, as data.

Sources: ``nvidia-smi mig -lgip`` and ``-lgipp`` as NVIDIA's MIG user guide prints them
(https://docs.nvidia.com/datacenter/tesla/mig-user-guide), and device ids of mig-parted's stock configuration
(https://github.com/NVIDIA/mig-parted). ``Gpu.inferred`` names what was concluded from the family instead.
Names in gigabytes drift between drivers and boards: where a device can be asked, ask it; this table is for planning without one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from forja.errors import BadInput

ENGINES = ("SM", "CE", "NVDEC", "NVENC", "JPEG", "OFA")
"""Multiprocessors, copy engines, decoders, encoders, JPEG decoders, optical flow accelerators."""


@dataclass(frozen=True, kw_only=True)
class InstanceProfile:
    """A kind of GPU instance."""

    name: str
    """For example ``1g.10gb+me``."""
    id: int
    """The driver's number, which ``nvidia-smi mig -cgi`` takes; it means something else on another family."""
    starts: tuple[int, ...]
    """Memory slices that it may begin at."""
    size: int
    """Memory slices that it takes."""
    most: int
    """Instances of it on one GPU, at most (NVML: InstanceCount)."""
    engines: Mapping[str, int] = field(default_factory=dict)
    """How many of each engine it takes; those that no source gives are left out."""

    @property
    def resource(self) -> str:
        """The device plugin's resource under ``mig.strategy`` mixed."""
        return resource(self.name)


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A GPU that can be cut."""

    name: str
    units: int
    """Memory slices."""
    profiles: Mapping[str, InstanceProfile]
    """By name, smallest first."""
    full: str
    """The profile of the whole GPU; its engines are all that there are."""
    devices: tuple[str, ...]
    """PCI device and vendor, as mig-parted's ``device-filter`` writes them."""
    products: tuple[str, ...]
    """Values of the node label ``nvidia.com/gpu.product``."""
    inferred: str = ""
    """What no source shows for this very GPU; empty when all is sourced."""

    def profile(self, name: str) -> InstanceProfile:
        """The profile called ``name``; BadInput when this GPU has none."""
        if name not in self.profiles:
            raise BadInput(f"MIG profile of {self.name}", value=name, allowed=", ".join(self.profiles), do="see ./forja mig plan --gpu")
        return self.profiles[name]


def resource(profile: str) -> str:
    """Resource name of a profile: a ``+`` may not stand in one."""
    return f"nvidia.com/mig-{profile.replace('+', '.')}"


AMPERE = {
    "1g": {"CE": 1, "NVDEC": 0, "JPEG": 0, "OFA": 0},
    "1g+me": {"CE": 1, "NVDEC": 1, "JPEG": 1, "OFA": 1},
    "1g double": {"CE": 1, "NVDEC": 1, "JPEG": 0, "OFA": 0},
    "2g": {"CE": 2, "NVDEC": 1, "JPEG": 0, "OFA": 0},
    "3g": {"CE": 3, "NVDEC": 2, "JPEG": 0, "OFA": 0},
    "4g": {"CE": 4, "NVDEC": 2, "JPEG": 0, "OFA": 0},
    "7g": {"CE": 7, "NVDEC": 5, "JPEG": 1, "OFA": 1},
}
HOPPER = {
    "1g": {"NVDEC": 1, "JPEG": 1, "OFA": 0},
    "1g+me": {"NVDEC": 1, "JPEG": 1, "OFA": 1},
    "1g double": {"NVDEC": 1, "JPEG": 1, "OFA": 0},
    "2g": {"NVDEC": 2, "JPEG": 2, "OFA": 0},
    "3g": {"NVDEC": 3, "JPEG": 3, "OFA": 0},
    "4g": {"NVDEC": 4, "JPEG": 4, "OFA": 0},
    "7g": {"NVDEC": 7, "JPEG": 7, "OFA": 1},
}
EIGHT: Mapping[str, tuple[int, tuple[int, ...], int, int]] = {
    "1g": (19, (0, 1, 2, 3, 4, 5, 6), 1, 7),
    "1g+me": (20, (0, 1, 2, 3, 4, 5, 6), 1, 1),
    "1g double": (15, (0, 2, 4, 6), 2, 4),
    "2g": (14, (0, 2, 4), 2, 3),
    "3g": (9, (0, 4), 4, 2),
    "4g": (5, (0,), 4, 1),
    "7g": (0, (0,), 8, 1),
}
"""The family of eight memory slices: id, starts, size, most."""


def _eight(
    name: str, gb: tuple[int, ...], sm: tuple[int | None, ...], media: Mapping[str, Mapping[str, int]], devices: str, products: str,
    inferred: str = "",
) -> Gpu:  # fmt: skip
    """A GPU of the eight-slice family; ``gb`` and ``sm`` for 1g, 1g with double memory, 2g, 3g, 4g and 7g."""
    index = {"1g": 0, "1g+me": 0, "1g double": 1, "2g": 2, "3g": 3, "4g": 4, "7g": 5}
    made = {}
    for kind, (number, starts, size, most) in EIGHT.items():
        at = index[kind]
        profile = f"{kind[:2]}.{gb[at]}gb{'+me' if kind.endswith('+me') else ''}"
        multiprocessors = sm[at]
        engines = {**({} if multiprocessors is None else {"SM": multiprocessors}), **media.get(kind, {})}
        made[profile] = InstanceProfile(name=profile, id=number, starts=starts, size=size, most=most, engines=engines)
    return Gpu(
        name=name, units=8, profiles=made, full=f"7g.{gb[5]}gb", devices=_ids(devices), products=tuple(products.split()),
        inferred=inferred,
    )  # fmt: skip


def _ids(text: str) -> tuple[str, ...]:
    return tuple(f"0x{word}10DE" for word in text.split())


def _profile(name: str, number: int, starts: tuple[int, ...], size: int, most: int, engines: tuple[int, ...]) -> InstanceProfile:
    """One profile; engines are SM, NVDEC, NVENC, JPEG, OFA."""
    kinds = ("SM", "NVDEC", "NVENC", "JPEG", "OFA")
    return InstanceProfile(name=name, id=number, starts=starts, size=size, most=most, engines=dict(zip(kinds, engines, strict=True)))


def _by_name(*profiles: InstanceProfile) -> dict[str, InstanceProfile]:
    return {p.name: p for p in profiles}


A30 = Gpu(
    name="a30", units=4, full="4g.24gb", devices=_ids("20B7"), products=("NVIDIA-A30",),
    profiles=_by_name(
        _profile("1g.6gb", 14, (0, 1, 2, 3), 1, 4, (14, 0, 0, 0, 0)),
        _profile("1g.6gb+me", 21, (0, 1, 2, 3), 1, 1, (14, 1, 0, 1, 1)),
        _profile("2g.12gb", 5, (0, 2), 2, 2, (28, 2, 0, 0, 0)),
        _profile("2g.12gb+me", 6, (0, 2), 2, 1, (28, 2, 0, 1, 1)),
        _profile("4g.24gb", 0, (0,), 4, 1, (56, 4, 0, 1, 1)),
    ),
)  # fmt: skip
"""NVML's InstanceCount is wrong here; these are mig-parted's numbers."""

RTX_PRO_6000 = Gpu(
    name="rtx-pro-6000", units=12, full="4g.96gb", devices=_ids("2BB5"),
    products=("NVIDIA-RTX-PRO-6000-Blackwell-Server-Edition",),
    profiles=_by_name(
        _profile("1g.24gb", 14, (0, 3, 6, 9), 3, 4, (46, 1, 1, 1, 0)),
        _profile("1g.24gb+me", 21, (0, 3, 6, 9), 3, 1, (46, 1, 1, 1, 1)),
        _profile("1g.24gb+gfx", 47, (0, 3, 6, 9), 3, 4, (46, 1, 1, 1, 0)),
        _profile("1g.24gb+me.all", 65, (0, 3, 6, 9), 3, 1, (46, 4, 4, 4, 1)),
        _profile("1g.24gb-me", 67, (0, 3, 6, 9), 3, 4, (46, 0, 0, 0, 0)),
        _profile("2g.48gb", 5, (0, 6), 6, 2, (94, 2, 2, 2, 0)),
        _profile("2g.48gb+gfx", 35, (0, 6), 6, 2, (94, 2, 2, 2, 0)),
        _profile("2g.48gb+me.all", 64, (0, 6), 6, 1, (94, 4, 4, 4, 1)),
        _profile("2g.48gb-me", 66, (0, 6), 6, 2, (94, 0, 0, 0, 0)),
        _profile("4g.96gb", 0, (0,), 12, 1, (188, 4, 4, 4, 1)),
        _profile("4g.96gb+gfx", 32, (0,), 12, 1, (188, 4, 4, 4, 1)),
    ),
    inferred="engines of 2g.48gb+gfx, 2g.48gb+me.all and 4g.96gb+gfx",
)  # fmt: skip

PLACED = "placements and ids, from the family"
GPUS: Mapping[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        _eight("a100-40", (5, 10, 10, 20, 20, 40), (14, 14, 28, 42, 56, 98), AMPERE, "20B0 20B1 20F1 20F6",
               "NVIDIA-A100-SXM4-40GB NVIDIA-A100-PCIE-40GB NVIDIA-A800-40GB"),
        _eight("a100-80", (10, 20, 20, 40, 40, 80), (14, 14, 28, 42, 56, 98), AMPERE, "20B2 20B5 20F3 20F5",
               "NVIDIA-A100-SXM4-80GB NVIDIA-A100-80GB-PCIe NVIDIA-A800-SXM4-80GB NVIDIA-A800-80GB-PCIe"),
        _eight("h100-80", (10, 20, 20, 40, 40, 80), (16, 26, 32, 60, 64, 132), HOPPER, "2330 2331 2322 2324",
               "NVIDIA-H100-80GB-HBM3 NVIDIA-H100-PCIe NVIDIA-H800 NVIDIA-H800-PCIe"),
        _eight("h100-nvl", (12, 24, 24, 47, 47, 94), (None, None, None, None, 64, 132), HOPPER, "2321 233A",
               "NVIDIA-H100-NVL NVIDIA-H800-NVL"),
        _eight("h100-96", (12, 24, 24, 48, 48, 96), (None,) * 6, HOPPER, "2342 233D 20B6 2329",
               "NVIDIA-GH200-480GB NVIDIA-H100-96GB-HBM3 NVIDIA-H20", PLACED),
        _eight("h200", (18, 35, 35, 71, 71, 141), (16, None, 32, 60, None, 132), HOPPER, "2335 233B",
               "NVIDIA-H200 NVIDIA-H200-NVL", PLACED),
        _eight("gh200-144", (18, 36, 36, 72, 72, 144), (16, 26, 32, None, None, None), HOPPER, "2348",
               "NVIDIA-GH200-144G-HBM3e", PLACED),
        _eight("b200", (23, 45, 45, 90, 90, 180), (18, 30, 36, None, None, None), {}, "2901", "NVIDIA-B200", PLACED),
        _eight("gb200", (23, 47, 47, 93, 93, 186), (18, 32, 38, None, None, None), {}, "2941", "NVIDIA-GB200", PLACED),
        _eight("b300", (34, 67, 67, 135, 135, 269), (None,) * 6, {}, "3182", "NVIDIA-B300", PLACED),
        _eight("gb300", (35, 70, 70, 139, 139, 278), (None,) * 6, {}, "31C2", "NVIDIA-GB300", PLACED),
        A30,
        RTX_PRO_6000,
    )
}  # fmt: skip


def gpu(name: str) -> Gpu:
    """The GPU called ``name``; BadInput when the table has none."""
    if name not in GPUS:
        raise BadInput("GPU", value=name, allowed=", ".join(GPUS), do="add it to include/forja/mig/tables.py with its source")
    return GPUS[name]


def of_product(product: str) -> Gpu | None:
    """The GPU of a node label ``nvidia.com/gpu.product``, whose value may end in how the device plugin shares it; None when unknown."""
    plain = product.split("-MIG-")[0].removesuffix("-SHARED")
    return next((g for g in GPUS.values() if plain in g.products), None)
