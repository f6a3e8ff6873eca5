"""``cinemesh kernels --compile``: Triton's kernels compiled for a GPU that need not be here (torch-free)."""

from __future__ import annotations

import json

from ...errors import CinemeshError
from ...kernels.spec import Sizes
from ...kernels.tiles import TRITON_DTYPES
from ...model.config import ModelConfig
from ...model.inputs import BatchShape
from ...model.step import check, unit_layout
from ...parallel.ir.plan import Plan
from ..progress import progress
from ..tables import new_console, plain_table

DEGREES = tuple((tp, cp) for tp in (1, 2, 4, 8) for cp in (1, 2))
GPUS = 6144  # over which the flat states of the compiled shapes are sharded, as in the paper's largest run


def sizes_of(config: ModelConfig, plan: Plan, batch: BatchShape) -> Sizes:
    """What one rank computes, as the kernels' compile check wants it. Raises CinemeshError for dtype float64."""
    if plan.compute_dtype not in TRITON_DTYPES:
        raise CinemeshError(f"dtype {plan.dtype}: Triton's kernels take bf16 and float32", remedy="choose one of them")
    check(config, plan, batch)
    return Sizes(
        tokens=config.tokens(batch.latent),
        batch=batch.samples,
        width=config.width,
        heads=config.heads,
        head_dim=config.head_dim,
        ffn=config.ffn,
        text_tokens=tuple(encoder.tokens for encoder in config.encoders),
        text_widths=tuple(encoder.width for encoder in config.encoders),
        latent=(config.channels, *batch.latent),
        patch=config.patch,
        shard_elements=unit_layout(config, plan).flat_elements,
        tp=plan.tp,
        cp=plan.cp,
        dtype=TRITON_DTYPES[plan.compute_dtype],
    )


def run(config: ModelConfig, plan: Plan | None, batch: BatchShape, *, target: str, as_json: bool) -> None:
    """Compile every kernel for ``target`` at the plan's shapes, without one at those of ``DEGREES``, and print it."""
    plans = [plan] if plan else [Plan(tp=tp, cp=cp, dp_shard=GPUS // (tp * cp)) for tp, cp in DEGREES]
    sizes = [sizes_of(config, each, batch) for each in plans]  # refuses before torch and Triton are loaded
    from ...kernels.compile import as_json as reports_as_json
    from ...kernels.compile import compile_check, triton_modules

    with progress("compile check", 2 * len(triton_modules()) * len(sizes), silent=as_json) as begin:
        reports = compile_check(sizes, target, begin=begin)
    if as_json:
        print(json.dumps(reports_as_json(reports, target), indent=1))
        return
    out = new_console()
    right = ("regs", "spilled", "shared", "tensor", "held", "16-byte", "occupancy", "over least")
    table = plain_table("kernel", "local shape", *right, right=right, breaks=("regs",))
    for report in reports:
        table.add_row(
            report.name,
            report.shape,
            str(report.registers),
            f"{report.spilled_bytes} B",
            f"{report.shared_bytes / 1024:.0f} KiB",
            f"{report.tensor_core_instructions}" + (" wgmma" if report.wgmma_instructions else ""),
            f"{100 * report.held_factors:.0f} %" if report.wgmma_instructions else "",
            f"{100 * report.wide_accesses:.0f} %",
            f"{100 * report.occupancy:.0f} %",
            f"{report.bytes_over_least:.3f}",
        )
    out.print(table)
    out.print(
        f"\n{target}, {len(reports)} kernels. regs and spilled of a thread, shared of a block; tensor: tensor-core "
        "instructions in the binary; held: those of wgmma whose left factor is in registers; 16-byte: global accesses "
        "that move 16 bytes a thread; over least: bytes of all loads and stores, counted, over every input and output "
        "once."
    )
