"""The software that a step is priced on, and what other would give it, as text (torch-free)."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from ...perf_model.report.explain import digits
from ...perf_model.report.software import OtherSoftware, PricedKernel


def print_kernels(console: Console, kernels: Sequence[PricedKernel]) -> None:
    """A line for each kernel, with the attention ops that it runs."""
    ops: dict[str, list[str]] = {}
    for kernel in kernels:
        ops.setdefault(str(kernel), []).append(kernel.op)
    console.print("attention is priced on")
    for kernel, run in ops.items():
        console.print(f"  {kernel}: {', '.join(run)}")


def print_order(console: Console, told: str) -> None:
    """What NCCL and the driver take from the step, where they do."""
    if told:
        console.print(told)


def print_others(console: Console, step_s: float, others: Sequence[OtherSoftware]) -> None:
    """A line for each other software: the step now, and there."""
    if not others:
        return
    console.print("the same plan with other software")
    for other in others:
        runs = "; ".join(dict.fromkeys(f"{kernel.op} on {kernel.package}" for kernel in other.kernels))
        guess = ", at rates that are a guess" if any(kernel.guessed for kernel in other.kernels) else ""
        by = f" ({runs}{guess})" if runs else ""
        console.print(f"  {other.name}: step {digits(step_s, 3)} s -> {digits(other.step_s, 3)} s{by}")
