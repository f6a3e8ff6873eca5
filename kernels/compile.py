"""The compile check: every Triton kernel built for a GPU that need not be there, and what the binary shows.

Two looks at each kernel, in worker processes, as many as there are cores and memory for:

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
import signal
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from importlib import import_module
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, TypeVar

from ..documents import read_json
from ..errors import CinemeshError, in_a_line
from ..files import atomic_file, check_output_folder
from ..interrupt import WAKE_S, be_deaf, deaf_children, interrupt_later
from ..memory import available_bytes
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
WORKER_BYTES = 700_000_000  # of a worker with ptxas: 0.4 GB at most, measured over every kernel of the 30B, 2026-11-29

R = TypeVar("R")
Job = tuple[str, Sizes]  # a module of this folder, and the sizes of its kernels
Look = Callable[[Spec], R]


@dataclass(frozen=True)
class CompileReport:
    """What one kernel is at one shape. Registers and spilled bytes (its stack) are a thread's, shared bytes a block's.

    ``wide_accesses``: share of the global loads and stores in the binary that move 16 bytes a thread or more.
    ``held_factors``: share of the wgmma instructions whose left factor is in registers, not read from shared memory.
    ``occupancy``: warps that fit on a multiprocessor over those that it can hold.
    """

    name: str
    shape: str
    registers: int
    spilled_bytes: int
    shared_bytes: int
    tensor_core_instructions: int
    wgmma_instructions: int
    held_factors: float
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
    begin: Callable[[str], None] = lambda _: None,
) -> list[CompileReport]:
    """Build every kernel of ``modules`` (default: all) at ``sizes``; identical (kernel, shape) pairs once.

    ``count=False`` leaves out the bytes (0 in the report). ``begin`` is told of every module at every size that begins,
    twice: once to build its kernels, once to count. Raises CinemeshError without Triton, or for a target that is
    unknown.
    """
    if target not in TARGETS:
        raise CinemeshError(f"compile target {target!r} is unknown", remedy=f"choose one of {', '.join(TARGETS)}")
    if "triton" in missing():
        raise CinemeshError("compiling kernels needs Triton", remedy="pip install 'cinemesh[triton]'")
    folder = cache or cache_directory()
    check_output_folder(folder, "the kernel cache")
    folder.mkdir(parents=True, exist_ok=True)
    jobs = [(module, size) for module in (modules or triton_modules()) for size in sizes]
    workers = workers or min(len(jobs), os.cpu_count() or 1, max(1, available_bytes() // WORKER_BYTES))
    build, measure = partial(_build, target=target, folder=folder), partial(_count, folder=folder)
    built = _work_through(jobs, build, workers, interpret=False, begin=lambda name: begin(f"building {name}"))
    moved = None
    if count:
        moved = _work_through(jobs, measure, workers, interpret=True, begin=lambda name: begin(f"counting {name}"))
    found: dict[tuple[str, str], CompileReport] = {}
    for i, reports in enumerate(built):
        for k, report in enumerate(reports):
            if moved is not None:
                over = moved[i][k] / max(1, report.least_bytes)
                report = replace(report, moved_bytes=moved[i][k], bytes_over_least=round(over, 4))
            found.setdefault((report.name, report.shape), report)
    return list(found.values())


def as_json(reports: Sequence[CompileReport], target: str) -> dict[str, Any]:
    return {"target": target, "kernels": [asdict(report) for report in reports]}


def cache_directory() -> Path:
    """``$XDG_CACHE_HOME/cinemesh/kernels``, by default below ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cinemesh" / "kernels"


# -- worker processes -------------------------------------------------------------------------------------------------


class _Failure(str):
    """What a kernel raised."""


class _Worker:
    """A process in which Triton either compiles or interprets: it decides when a kernel's module is imported."""

    def __init__(self, look: Look[Any], interpret: bool) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, far_end = context.Pipe()
        self.process = context.Process(target=_serve, args=(far_end, look, interpret), daemon=True)
        self.process.start()
        far_end.close()  # held by the process alone: its death ends the connection
        self.job: int | None = None
        self.kernel = "before its first kernel"

    def answer(self) -> list[Any] | None:
        """What it has to say: a job's results, or only which kernel comes next. Raises CinemeshError if it is dead."""
        try:
            said = self.connection.recv()
        except (EOFError, ConnectionResetError):
            self.process.join()
            code = self.process.exitcode or 0
            ended = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
            raise CinemeshError(
                f"compile check, {self.kernel}: the process that looked at it {ended}",
                remedy="if the system ran out of memory, end other jobs; what was looked at is kept, and the same "
                "command goes on from there",
            ) from None
        if isinstance(said, _Failure):
            raise CinemeshError(
                f"compile check, {self.kernel}: {said}",
                remedy="if Triton's interpreter raised it: Triton 3.6's takes NumPy below 2.5",
            )
        if isinstance(said, str):
            self.kernel = said
            return None
        return said


def _work_through(
    jobs: Sequence[Job], look: Look[R], workers: int, *, interpret: bool, begin: Callable[[str], None] = lambda _: None
) -> list[list[R]]:
    """``look`` at every kernel of every job, in ``workers`` processes; the results of each job."""
    results: dict[int, list[R]] = {}
    waiting = list(enumerate(jobs))[::-1]
    pool: list[_Worker] = []
    try:
        with deaf_children():
            pool += [_Worker(look, interpret) for _ in range(min(workers, len(jobs)))]
        while len(results) < len(jobs):
            for worker in pool:
                if worker.job is None and waiting:
                    worker.job, job = waiting.pop()
                    begin(job[0])
                    worker.connection.send(job)
            ready = wait([worker.connection for worker in pool if worker.job is not None], WAKE_S)
            for worker in (worker for worker in pool if worker.connection in ready):
                said = worker.answer()
                if said is not None and worker.job is not None:
                    results[worker.job], worker.job = said, None
    finally:
        with interrupt_later():
            for worker in pool:
                worker.process.kill()
                worker.process.join()
    return [results[i] for i in range(len(jobs))]


def _serve(connection: Connection, look: Look[Any], interpret: bool) -> None:
    be_deaf()
    os.environ["TRITON_INTERPRET"] = "1" if interpret else "0"
    os.environ["TRITON_DEFAULT_FP_FUSION"] = "1"  # multiply-add in one instruction; Triton 3.9 wants it said
    os.environ["OMP_NUM_THREADS"] = "1"
    while True:
        module, sizes = connection.recv()
        results: list[Any] = []
        for spec in _specs(module, sizes):
            connection.send(f"{spec.name} {_shape(spec)}")
            try:
                results.append(look(spec))
            except Exception as error:  # noqa: BLE001  Triton's, MLIR's, ptxas's: told where the check was asked for
                connection.send(_Failure(f"{type(error).__name__}: {in_a_line(error, lines=1)}"))
                return
        connection.send(results)


def _specs(module: str, sizes: Sizes) -> list[Spec]:
    return import_module(f".{module}", __package__).compile_specs(sizes)


def _shape(spec: Spec) -> str:
    return " ".join(f"{label}={size}" for label, size in spec.shape.items())


def _cached(folder: Path, key: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    path = folder / f"{hashlib.sha256(key.encode()).hexdigest()[:40]}.json"
    if path.exists():
        return read_json(path, "the report", "remove it, and the kernel is compiled again")
    value = make()
    with atomic_file(path) as unfinished:
        unfinished.write_text(json.dumps(value), encoding="utf-8")
    return value


# -- build ------------------------------------------------------------------------------------------------------------


def _build(spec: Spec, target: str, folder: Path) -> CompileReport:
    import triton

    signature, constexprs, attributes = specialise(spec)
    told = [field.name for field in fields(CompileReport)]  # an older form is none
    key = repr(
        (spec.kernel.cache_key, signature, constexprs, attributes, spec.num_warps, spec.num_stages, target, told)
    )
    binary = _cached(folder, f"build {triton.__version__} {key}", partial(_binary, spec, target))
    programs = math.prod(spec.grid)
    return CompileReport(
        name=spec.name,
        shape=_shape(spec),
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

    Pointers are divisible by 16; so is an integer that is; an integer that is 1 becomes a constant, and one beyond 31
    bits an i64.
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
        if kind == "i32" and isinstance(value, int) and value >= 1 << 31:
            forced = spec.kernel.params[position].annotation_type
            assert not forced, f"{spec.name}: {name} is annotated as {forced}, and its value is {value}"
            signature[name] = "i64"
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
    code = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P[T\d]+\s+)?([A-Z0-9_.]+)(.*);", sass, re.MULTILINE)
    instructions = [name for name, _ in code]
    accesses = [name for name in instructions if re.match(r"(LDG|STG|LDGSTS|UTMALDG|UTMASTG|UBLKCP)\b", name)]
    wide = [name for name in accesses if ".128" in name or name.startswith(("UTMA", "UBLKCP"))]
    left_factors = [operands.split(",")[1].strip() for name, operands in code if name.startswith("HGMMA")]
    wgmma = len(left_factors)
    return {
        "registers": resources["REG"],
        "spilled_bytes": resources.get("STACK", 0) + resources.get("LOCAL", 0),
        "tensor_core_instructions": wgmma + sum(name.startswith("HMMA") for name in instructions),
        "wgmma_instructions": wgmma,
        "held_factors": round(sum(factor.startswith("R") for factor in left_factors) / max(1, wgmma), 3),
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
            texts[name] = (Path(__file__).parent / f"{name}.py").read_text(encoding="utf-8")
            waiting += re.findall(r"^from \.(\w+) import", texts[name], re.MULTILINE)
    return "".join(texts[name] for name in sorted(texts))


def _count(spec: Spec, folder: Path) -> int:
    import triton

    what = (spec.name, dict(spec.signature), dict(spec.constexprs), spec.grid, dict(spec.arguments))
    key = f"count {triton.__version__} {what!r} {_sources(spec.kernel.fn.__module__.rpartition('.')[2])}"
    return _cached(folder, key, lambda: {"bytes": count_bytes(spec)})["bytes"]
