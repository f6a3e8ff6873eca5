"""When collectives of different communicators overlap, against NCCL's own rule, written out here a second time."""

from __future__ import annotations

from itertools import product

import pytest

from cinemesh.parallel.ir.nccl_stack import NcclStack

STACKS = [*product(((2, 26), (2, 27), (2, 28), (2, 30), (3, 0)), ((12, 2), (12, 3), (12, 8), (12, 9), (13, 0)))]


def implicit_order(nccl: tuple[int, int], driver: tuple[int, int], capturing: bool) -> str:
    """``getImplicitOrder`` of src/enqueue.cc as it stands in v2.26.2 and in v2.27.3 to v2.30.3."""
    version = 1000 * driver[0] + 10 * driver[1]
    if capturing and (nccl == (2, 26) or version < 12090):
        return "serial"
    return "launch" if version >= 12030 else "serial"


@pytest.mark.parametrize(("nccl", "driver"), STACKS)
def test_nccl_decides_so(nccl: tuple[int, int], driver: tuple[int, int]) -> None:
    stack = NcclStack(nccl, driver)
    orders = {captured: implicit_order(nccl, driver, captured) for captured in (False, True)}
    for captured, order in orders.items():
        assert bool(stack.serial(captured)) == (order == "serial")
    assert stack.captures("required") and not stack.captures("off")
    assert stack.captures("auto") == (orders[True] == orders[False])  # nothing is lost by it
    assert bool(stack.told()) == ("serial" in orders.values())


def test_the_message_names_what_is_there_and_what_is_needed() -> None:
    assert NcclStack((2, 28), (12, 8)).told() == (
        "NCCL 2.28 on a driver of CUDA 12.8 runs captured collectives of different axes one after another, from NCCL "
        "2.27 and CUDA 12.9 on side by side: steps are captured only where capture is required"
    )
