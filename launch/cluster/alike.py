"""What must be alike on all ranks of a job beside its recipe: software, and the environment that matters."""

from __future__ import annotations

import hashlib
import os
import platform
from functools import lru_cache
from pathlib import Path

import torch

from ...kernels.packages import version_of
from ...parallel.ir.program import Program

SOURCE_FOLDERS = ("kernels", "parallel", "model", "data", "perf_model", "launch")  # beside the package's own files
# Distributions that change what a step computes, where they are installed.
DISTRIBUTIONS = (
    "torch", "triton", "numpy", "safetensors", "flash-attn", "flash-attn-3", "flash-attn-4", "apex", "nvidia-nccl-cu12",
    "nvidia-nccl-cu13", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13", "nvidia-cublas-cu12", "nvidia-cublas",
)  # fmt: skip
# Variables that libraries of a step read begin with these.
VARIABLES = ("NCCL_", "TORCH_", "PYTORCH_", "CUBLAS_", "CUDNN_", "CUDA_", "NVIDIA_", "TRITON_", "GLOO_")
# What a rank, or a machine, may have for itself among them, and why.
PER_RANK = {
    "CUDA_VISIBLE_DEVICES": "its GPU",
    "CUDA_CACHE_PATH": "a folder of its machine",
    "CUDA_HOME": "a folder of its machine",
    "CUDA_PATH": "a folder of its machine",
    "GLOO_SOCKET_IFNAME": "its machine's link",
    "NCCL_DEBUG": "what is printed",
    "NCCL_DEBUG_FILE": "what is printed",
    "NCCL_DEBUG_SUBSYS": "what is printed",
    "NCCL_HOSTID": "its machine",
    "NCCL_IB_HCA": "its machine's link",
    "NCCL_SOCKET_IFNAME": "its machine's link",
    "NCCL_TOPO_FILE": "its machine",
    "NVIDIA_VISIBLE_DEVICES": "its GPU",
    "TORCH_CPP_LOG_LEVEL": "what is printed",
    "TORCH_EXTENSIONS_DIR": "a folder of its machine",
    "TORCH_HOME": "a folder of its machine",
    "TORCH_LOGS": "what is printed",
    "TRITON_CACHE_DIR": "a folder of its machine",
    "TRITON_HOME": "a folder of its machine",
}


def software_alike() -> dict[str, str]:
    """Versions, the code itself, and the environment, by the name under which a difference is told."""
    facts = {f"package {name}": version for name in DISTRIBUTIONS if (version := version_of(name)) is not None}
    facts |= {"python": platform.python_version(), "package torch": torch.__version__, "code of cinemesh": code()}
    facts |= {
        f"variable {name}": value
        for name, value in os.environ.items()
        if name.startswith(VARIABLES) and name not in PER_RANK
    }
    return facts


@lru_cache(maxsize=1)
def code() -> str:
    """A digest of this package's source and tables."""
    root = Path(__file__).parents[2]
    files = [path for path in root.glob("*.py") if path.name != "setup.py"]  # no part of it
    files += [path for folder in SOURCE_FOLDERS for kind in ("*.py", "*.yaml") for path in (root / folder).rglob(kind)]
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(f"{path.relative_to(root)} {path.stat().st_size} ".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def program_digest(program: Program) -> str:
    """Of all records and buffers, in order: it does not depend on the process, as the order of a set does."""
    digest = hashlib.sha256()
    for buffer in program.buffers.values():
        digest.update(f"{buffer.name} {buffer.shape} {buffer.dtype} {buffer.placement} {buffer.kind} {buffer.base} "
                      f"{buffer.offset} {buffer.strides} {buffer.space}\n".encode())  # fmt: skip
    for op in program.ops:
        digest.update(f"{op.name} {op.kind} {op.inputs} {op.outputs} {op.attrs} {op.comm}\n".encode())
    return digest.hexdigest()[:16]
