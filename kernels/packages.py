"""Which packages with fast kernels are installed here, and why one cannot be used (torch-free).

Nothing is imported: a package is looked for, and told apart from another of the same name by its files.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import lru_cache
from importlib.machinery import PathFinder
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from ..errors import CinemeshError


def version_of(name: str) -> str | None:
    """Of an installed distribution; None where there is none, as of a checkout that is only on the path."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _flash_attn() -> str | None:
    if find_spec("flash_attn") is None or version_of("flash-attn") is None:
        return "not installed; pip install flash-attn"
    if find_spec("flash_attn_2_cuda") is None:
        return "installed without its CUDA build; install it where nvcc is, FLASH_ATTENTION_SKIP_CUDA_BUILD unset"
    return None


def _flash_attn_3() -> str | None:
    if find_spec("flash_attn_interface") is None or find_spec("flash_attn_3") is None:
        return "not installed; build the folder hopper of FlashAttention's sources"
    return None


def _flash_attn_4() -> str | None:
    return None if version_of("flash-attn-4") else "not installed; pip install flash-attn-4"


def nvidia_apex(where: str | None) -> str | None:
    """Why the package ``apex`` in folder ``where`` (None: anywhere on the path) is not NVIDIA's with its CUDA build.

    PyPI's ``apex`` is a web toolkit of the same name; NVIDIA's is built from its sources.
    """
    path = [where] if where else None
    found = PathFinder.find_spec("apex", path)
    if found is None or found.origin is None:
        return "not installed; build NVIDIA's from its sources (the apex on PyPI is another package)"
    folder = Path(found.origin).parent
    if not (folder / "normalization" / "fused_layer_norm.py").exists() or not (folder / "multi_tensor_apply").exists():
        return f"the apex in {folder} is not NVIDIA's; uninstall it and build NVIDIA's from its sources"
    for extension in ("amp_C", "fused_layer_norm_cuda"):
        if PathFinder.find_spec(extension, path) is None:
            return f"installed without its CUDA extension {extension}; build it with --cpp_ext and --cuda_ext"
    return None


def _present(module: str, remedy: str) -> str | None:
    return None if find_spec(module) else f"not installed; {remedy}"


_PROBES: Mapping[str, Callable[[], str | None]] = {
    "flash-attn": _flash_attn,
    "flash-attn-3": _flash_attn_3,
    "flash-attn-4": _flash_attn_4,
    "apex": lambda: nvidia_apex(None),
    "triton": lambda: _present("triton", "torch's CUDA builds bring it"),
    "cudnn": lambda: None,  # every CUDA build of a torch that is new enough brings it
    "torch": lambda: _present("torch", "pip install torch"),
    "reference": lambda: _present("torch", "pip install torch"),
}


@lru_cache(maxsize=1)
def missing() -> Mapping[str, str]:
    """Package -> why it cannot be used here, with the remedy; a package that can be used is not in it."""
    found = {package: probe() for package, probe in _PROBES.items()}
    return {package: reason for package, reason in found.items() if reason is not None}


def interpreter() -> bool:
    """Whether Triton's kernels run under its interpreter: on any device, far too slowly to train."""
    return os.environ.get("TRITON_INTERPRET") == "1"


OLDEST_TORCH = (2, 11)  # whose operators of cuDNN's attention, and all else, are those that are called here


def check_torch() -> None:
    """Raise CinemeshError where the torch that is installed is older than ``OLDEST_TORCH``. Vendors' builds count."""
    found, oldest = version_of("torch"), ".".join(map(str, OLDEST_TORCH))
    if found is not None and tuple(map(int, found.split(".")[:2])) < OLDEST_TORCH:
        raise CinemeshError(f"torch {found} is older than {oldest}", remedy=f"install {oldest} or newer")
