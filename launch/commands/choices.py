"""What runs each call of a step, and why the others do not (torch-free)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ...kernels.catalogue import PACKAGES, share
from ...kernels.counts import DTYPE_BYTES
from ...kernels.ops import OPS
from ...kernels.rates import rate
from ...kernels.selection import Choice, Software, select
from ...parallel.ir.plan import Plan
from ...parallel.ir.program import Program
from ..tables import DTYPES, new_console, plain_table, quantity

SHAPE_LABELS = "tsblhkdfpn"  # labels shown of a call: tokens, keys, samples, text tokens, heads, head dim, width, ...


@dataclass(frozen=True)
class Line:
    """One op at one combination of dtype and sizes, how often a step calls it, and what runs it."""

    op: str
    dtype: str
    sizes: Mapping[str, int]
    calls: int
    bytes: int
    workspace_bytes: int
    choice: Choice

    @property
    def shape(self) -> str:
        return " ".join(f"{label}={self.sizes[label]}" for label in SHAPE_LABELS if label in self.sizes)


def lines(program: Program, device: str) -> Iterator[Line]:
    """Every distinct call of a step: optional packages as installed here, torch and Triton taken for granted."""
    software = Software.planned()
    calls: dict[tuple[str, str, tuple[tuple[str, int], ...]], list[int]] = {}
    sized: dict[tuple[str, str, tuple[tuple[str, int], ...]], dict[str, int]] = {}
    for op in program.ops:
        if op.kind not in OPS:
            continue
        floating = (program.buffers[name].dtype for name in (*op.inputs, *op.outputs))
        dtype = next((name for name in floating if name not in ("bool", "int64")), "bool")
        whole = program.label_sizes(op)
        sizes = {label: size for label, size in whole.items() if label in SHAPE_LABELS}
        key = (op.kind, dtype, tuple(sorted(sizes.items())))
        sized.setdefault(key, whole)
        entry = calls.setdefault(key, [0, 0])
        entry[0] += 1
        entry[1] += program.bytes_moved(op)
    for (kind, dtype, sizes), (count, moved) in calls.items():
        choice = select(kind, device, software, dtype=dtype, sizes=dict(sizes))
        work = choice.entry.workspace(sized[kind, dtype, sizes], DTYPE_BYTES[dtype])
        yield Line(kind, dtype, dict(sizes), count, moved, work, choice)


def _reasons(line: Line) -> dict[str, str]:
    """Package -> why it does not run; one reason a package, none for the chosen one."""
    found: dict[str, str] = {}
    for entry, reason in line.choice.others:
        if entry.package != line.choice.entry.package:
            found[entry.package] = reason  # of several devices' entries the usable one comes last
    return found


def as_json(found: list[Line], device: str, origin: str, model: str, plan: Plan) -> dict[str, Any]:
    """What runs every op and why nothing else does, as JSON values."""
    ops = []
    for line in found:
        entry = line.choice.entry
        known = rate(entry.rate_class, device)
        ops.append(
            {
                "op": line.op,
                "dtype": line.dtype,
                "sizes": dict(line.sizes),
                "calls": line.calls,
                "bytes": line.bytes,
                "package": entry.package,
                "function": f"{entry.module}.{entry.function}",
                "rate_class": entry.rate_class,
                "share": share(entry, device),
                "limit": known.limit,
                "origin": known.origin,
                "workspace_bytes": line.workspace_bytes,
                "others": _reasons(line),
            }
        )
    return {"model": model, "plan": plan.to_dict(), "device": device, "device_origin": origin, "ops": ops}


def show(found: list[Line], device: str, origin: str, model: str, plan: Plan) -> None:
    """The same as tables."""
    out = new_console()
    out.print(f"{model}, {plan.equation()}, {plan.dtype}, on {device}: {origin}\n")
    columns = ("op", "calls", "local shape", "", "runs", "rate class", "share of")
    table = plain_table(*columns, right=("calls",), breaks=("runs",))
    of: dict[tuple[str, str], dict[str, None]] = {}
    first = {line.op: i for i, line in reversed(list(enumerate(found)))}
    for line in sorted(found, key=lambda line: first[line.op]):
        entry = line.choice.entry
        dtype = DTYPES.get(line.dtype, line.dtype)
        rated = f"{share(entry, device):.2f} {rate(entry.rate_class, device).limit}"
        table.add_row(line.op, f"{line.calls:,}", line.shape, dtype, entry.package, entry.rate_class, rated)
        for package, reason in _reasons(line).items():
            of.setdefault((package, reason), {})[line.op] = None
    out.print(table)
    out.print("\nwhy not the others", style="bold")
    table = plain_table("package", "does not run, since", "ops", breaks=("ops",))
    for (package, reason), ops in sorted(of.items(), key=lambda item: PACKAGES.index(item[0][0])):
        table.add_row(package, reason, ", ".join(ops))
    out.print(table)
    total = sum(line.bytes for line in found)
    out.print(f"\n{sum(line.calls for line in found):,} calls a step, {quantity(total, 'B')} read and written at least")
