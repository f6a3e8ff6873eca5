"""The compile check: every Triton kernel built for a GPU that need not be there, and what the binary shows.

Two looks at each kernel, in worker processes of their own:

    build   Triton and ptxas make the cubin that a launch with these arguments would make: pointers aligned as the arena
            aligns them, integers specialised by their values. The binary and its disassembly give registers, spills,
            shared memory, tensor-core instructions, access widths; these give occupancy.
    count   Triton's interpreter runs some of the launch's programs and sums what they load and store (``traffic.py``).

Results are kept under the user's cache directory, by kernel source, arguments and compiler.
"""

from __future__ import annotations

import hashlib
import json
import math
import multiprocessing
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from ..documents import read_json
from ..errors import CinemeshError
from ..files import atomic_file
from .catalogue import IMPLEMENTATIONS
from .packages import missing
from .spec import Sizes, Spec
from .traffic import count_bytes

TARGETS = ("sm_80", "sm_90", "sm_100")
# One multiprocessor of sm_80, sm_90 and sm_100 alike but for shared memory: CUDA C++ Programming Guide, table of
# compute capabilities.
WARPS, REGISTERS, BLOCKS = 64, 65536, 32
SHARED_BYTES = {"sm_80": 164 * 1024, "sm_90": 228 * 1024, "sm_100": 228 * 1024}
SHARED_RESERVED_BYTES = 1024  # of each block, by the driver
REGISTER_UNIT = 256  # registers are given to a warp in steps of this many
THREADS = 32  # of a warp


@dataclass(frozen=True)
class CompileReport:
    """What one kernel is at one shape. Registers and spilled bytes (its stack) are a thread's, shared bytes a block's.

    ``wide_accesses``: share of the global loads and stores in the binary that move 16 bytes a thread or more.
    ``occupancy``: warps that fit on a multiprocessor over those that it can hold.
    """

    name: str
    shape: str
    registers: int
    spilled_bytes: int
    shared_bytes: int
    tensor_core_instructions: int
    wgmma_instructions: int
    wide_accesses: float
    occupancy: float
    programs: int
    least_bytes: int
    moved_bytes: int
    bytes_over_least: float
    memory_bound: bool


def triton_modules() -> list[str]:
    """Modules of this folder that hold Triton kernels."""
    return sorted({entry.module for entry in IMPLEMENTATIONS if entry.package == "triton"})


def compile_check(
    sizes: Sequence[Sizes],
    target: str = "sm_90",
    *,
    modules: Sequence[str] | None = None,
    workers: int | None = None,
    count: bool = True,
    cache: Path | None = None,
) -> list[CompileReport]:
    """Build every kernel of ``modules`` (default: all) at ``sizes``; identical (kernel, shape) pairs once.

    ``count=False`` leaves out the bytes (0 in the report). Raises CinemeshError without Triton, or for a target that is
    unknown.
    """
    if target not in TARGETS:
        raise CinemeshError(f"compile target {target!r} is unknown", remedy=f"choose one of {', '.join(TARGETS)}")
    if "triton" in missing():
        raise CinemeshError("compiling kernels needs Triton", remedy="pip install 'cinemesh[triton]'")
    folder = cache or cache_directory()
    folder.mkdir(parents=True, exist_ok=True)
    jobs = [(module, size) for module in (modules or triton_modules()) for size in sizes]
    workers = workers or min(len(jobs), os.cpu_count() or 1)
    with _pool(workers, interpret=False) as builders, _pool(workers, interpret=True) as counters:
        built = [builders.submit(_build_all, module, size, target, folder) for module, size in jobs]
        moved = [counters.submit(_count_all, module, size, folder) if count else None for module, size in jobs]
        found: dict[tuple[str, str], CompileReport] = {}
        for reports, bytes_moved in zip(built, moved, strict=True):
            traffic = bytes_moved.result() if bytes_moved is not None else None
            for i, report in enumerate(reports.result()):
                if traffic is not None:
                    over = traffic[i] / max(1, report.least_bytes)
                    report = replace(report, moved_bytes=traffic[i], bytes_over_least=round(over, 4))
                found.setdefault((report.name, report.shape), report)
    return list(found.values())


def as_json(reports: Sequence[CompileReport], target: str) -> dict[str, Any]:
    return {"target": target, "kernels": [asdict(report) for report in reports]}


def cache_directory() -> Path:
    """``$XDG_CACHE_HOME/cinemesh/kernels``, by default below ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cinemesh" / "kernels"


# -- worker processes -------------------------------------------------------------------------------------------------


def _pool(workers: int, *, interpret: bool) -> ProcessPoolExecutor:
    """Processes in which Triton either compiles or interprets: it decides when a kernel's module is imported."""
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(workers, context, initializer=_set_up, initargs=(interpret,))


def _set_up(interpret: bool) -> None:
    os.environ["TRITON_INTERPRET"] = "1" if interpret else "0"
    os.environ["TRITON_DEFAULT_FP_FUSION"] = "1"  # multiply-add in one instruction; Triton 3.9 wants it said
    os.environ["OMP_NUM_THREADS"] = "1"


def _specs(module: str, sizes: Sizes) -> list[Spec]:
    return import_module(f".{module}", __package__).compile_specs(sizes)


def _cached(folder: Path, key: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    path = folder / f"{hashlib.sha256(key.encode()).hexdigest()[:40]}.json"
    if path.exists():
        return read_json(path, "the report", "remove it, and the kernel is compiled again")
    value = make()
    with atomic_file(path) as unfinished:
        unfinished.write_text(json.dumps(value))
    return value


# -- build ------------------------------------------------------------------------------------------------------------


def _build_all(module: str, sizes: Sizes, target: str, folder: Path) -> list[CompileReport]:
    return [_build(spec, target, folder) for spec in _specs(module, sizes)]


def _build(spec: Spec, target: str, folder: Path) -> CompileReport:
    import triton

    signature, constexprs, attributes = specialise(spec)
    key = repr((spec.kernel.cache_key, signature, constexprs, attributes, spec.num_warps, spec.num_stages, target))
    binary = _cached(folder, f"build {triton.__version__} {key}", partial(_binary, spec, target))
    programs = math.prod(spec.grid)
    return CompileReport(
        name=spec.name,
        shape=" ".join(f"{label}={size}" for label, size in spec.shape.items()),
        **binary,
        occupancy=occupancy(binary["registers"], binary["shared_bytes"], spec.num_warps, target),
        programs=programs,
        least_bytes=spec.least_bytes,
        moved_bytes=0,
        bytes_over_least=0.0,
        memory_bound=spec.memory_bound,
    )


def specialise(
    spec: Spec,
) -> tuple[dict[str, str | tuple[str, ...]], dict[str, Any], dict[tuple[int, ...], list[list[Any]]]]:
    """(signature, constants, attributes) as a launch with the spec's arguments makes them.

    Pointers are divisible by 16; so is an integer that is; an integer that is 1 becomes a constant.
    """
    names = list(spec.kernel.arg_names)
    unknown = spec.signature.keys() ^ (set(names) - spec.constexprs.keys())
    assert not unknown, f"{spec.name}: signature and kernel differ in {sorted(unknown)}"
    signature = {name: spec.signature.get(name, "constexpr") for name in names}
    constants = dict(spec.constexprs)
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for position, name in enumerate(names):
        value, kind = spec.arguments.get(name), signature[name]
        if name in spec.constexprs:
            continue
        if isinstance(kind, tuple):
            attributes |= {(position, i): [["tt.divisibility", 16]] for i in range(len(kind))}
        elif isinstance(value, int) and value == 1 and kind.startswith("i"):
            signature[name], constants[name] = "constexpr", 1
        elif kind.startswith("*") or (isinstance(value, int) and value % 16 == 0):
            attributes[(position,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def _binary(spec: Spec, target: str) -> dict[str, Any]:
    import triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget

    signature, constants, attributes = specialise(spec)
    source = triton.compiler.ASTSource(spec.kernel, signature, constants, attributes)
    options = {"num_warps": spec.num_warps, "num_stages": spec.num_stages}
    kernel = triton.compile(source, target=GPUTarget("cuda", int(target.removeprefix("sm_")), THREADS), options=options)
    tool = knobs.nvidia.cuobjdump.path
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        usage = subprocess.run([tool, "-res-usage", cubin.name], capture_output=True, text=True, check=True).stdout
        sass = subprocess.run([tool, "-sass", cubin.name], capture_output=True, text=True, check=True).stdout
    return read_binary(usage, sass) | {"shared_bytes": int(kernel.metadata.shared)}


def read_binary(usage: str, sass: str) -> dict[str, Any]:
    """Registers, spilled bytes and instructions from what cuobjdump prints of resources and code."""
    resources = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    instructions = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P[T\d]+\s+)?([A-Z0-9_.]+)", sass, re.MULTILINE)
    accesses = [name for name in instructions if re.match(r"(LDG|STG|LDGSTS|UTMALDG|UTMASTG|UBLKCP)\b", name)]
    wide = [name for name in accesses if ".128" in name or name.startswith(("UTMA", "UBLKCP"))]
    wgmma = sum(name.startswith("HGMMA") for name in instructions)
    return {
        "registers": resources["REG"],
        "spilled_bytes": resources.get("STACK", 0) + resources.get("LOCAL", 0),
        "tensor_core_instructions": wgmma + sum(name.startswith("HMMA") for name in instructions),
        "wgmma_instructions": wgmma,
        "wide_accesses": round(len(wide) / max(1, len(accesses)), 3),
    }


def occupancy(registers: int, shared_bytes: int, num_warps: int, target: str = "sm_90") -> float:
    """Resident warps over the most that a multiprocessor holds."""
    of_warp = -(-registers * THREADS // REGISTER_UNIT) * REGISTER_UNIT
    by_registers = REGISTERS // max(1, of_warp) // num_warps
    by_shared = SHARED_BYTES[target] // (shared_bytes + SHARED_RESERVED_BYTES)
    return round(min(by_registers, by_shared, WARPS // num_warps, BLOCKS) * num_warps / WARPS, 3)


# -- count ------------------------------------------------------------------------------------------------------------


def _sources(module: str) -> str:
    """Text of a module of this folder and of all that it imports of the folder: what its traffic depends on."""
    texts: dict[str, str] = {}
    waiting = [module, "traffic"]
    while waiting:
        name = waiting.pop()
        if name not in texts:
            texts[name] = (Path(__file__).parent / f"{name}.py").read_text()
            waiting += re.findall(r"^from \.(\w+) import", texts[name], re.MULTILINE)
    return "".join(texts[name] for name in sorted(texts))


def _count_all(module: str, sizes: Sizes, folder: Path) -> list[int]:
    import triton

    sources = _sources(module)
    moved: list[int] = []
    for spec in _specs(module, sizes):
        what = (spec.name, dict(spec.signature), dict(spec.constexprs), spec.grid, dict(spec.arguments))
        key = f"count {triton.__version__} {what!r} {sources}"
        moved.append(_cached(folder, key, lambda spec=spec: {"bytes": count_bytes(spec)})["bytes"])
    return moved
