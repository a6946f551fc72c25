"""What `mmkv doctor` finds: versions, device, kernels, video readers, and what is missing."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from importlib import metadata

from packaging.requirements import Requirement

SUPPORTED = {"torch": "2.9", "transformers": "5.2"}  # oldest that the tests run on; the newest is not limited


@dataclass(frozen=True)
class Package:
    """One package: installed version or None, what mmkv asks for, and whether that is met."""

    name: str
    version: str | None
    wants: str
    ok: bool


def _package(requirement: Requirement) -> Package:
    try:
        version = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return Package(requirement.name, None, str(requirement.specifier), False)
    ok = requirement.specifier.contains(version, prereleases=True)
    return Package(requirement.name, version, str(requirement.specifier), ok)


def _requirements() -> list[Requirement]:
    try:
        return [Requirement(r) for r in metadata.requires("mmkv") or []]
    except metadata.PackageNotFoundError:  # run from a checkout that was never installed
        return [Requirement(f"{name}>={oldest}") for name, oldest in SUPPORTED.items()]


def packages() -> list[Package]:
    """Every package that mmkv needs on this platform."""
    return [_package(r) for r in _requirements() if r.marker is None or r.marker.evaluate({"extra": ""})]


def extras() -> dict[str, list[str]]:
    """Extra -> those of its packages that are missing or too old."""
    found: dict[str, list[str]] = {}
    for requirement in _requirements():
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            continue
        for extra in metadata.metadata("mmkv").get_all("Provides-Extra") or []:
            if requirement.marker.evaluate({"extra": extra}):
                missing = found.setdefault(extra, [])
                if not _package(requirement).ok:
                    missing.append(requirement.name)
    return found


def device() -> str:
    """The device that models run on by default, in words."""
    import torch

    if not torch.cuda.is_available():
        return f"cpu ({platform.processor() or platform.machine()}, {torch.get_num_threads()} threads); no CUDA device"
    properties = torch.cuda.get_device_properties(0)
    return f"cuda: {properties.name}, {properties.total_memory / 2**30:.0f} GiB"


def kernels() -> dict[str, str]:
    """Kernel -> "triton" or "torch", whichever runs here."""
    from mmkv.kernels import which_kernels

    return which_kernels()
