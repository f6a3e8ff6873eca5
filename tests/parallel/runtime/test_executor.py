"""How records are bound where no test here has the device: a fused record on CUDA is one call, made of its parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from cinemesh.launch.proof.verify import small_case
from cinemesh.model.step import build_step
from cinemesh.parallel.ir.collectives import FUSED
from cinemesh.parallel.ir.layout import HEADS, Axes
from cinemesh.parallel.ir.plan import Plan
from cinemesh.parallel.passes.pipeline import prepare
from cinemesh.parallel.runtime.comm import BoundCollective, Communicator
from cinemesh.parallel.runtime.executor import Executor


class Calls:
    """Stands for a communicator: keeps what it is called with."""

    def __init__(self) -> None:
        self.taken: dict[str, Any] = {}

    def symmetric_memory(self, axes: Axes, nbytes: int) -> Tensor:
        return torch.zeros(nbytes, dtype=torch.uint8)

    def bind(self, *_: object) -> BoundCollective:
        return cast("BoundCollective", type("Bound", (), {"issue": print, "wait": print})())

    def bind_gather_products(self, axes: Axes, source: Tensor, gathered: Tensor, products: Any) -> Callable[[], None]:
        self.taken = {"axes": axes, "source": source, "output": gathered, "products": products, "added": None}
        return print

    def bind_product_scatter(
        self, axes: Axes, product: Any, added: Tensor | None, received: Tensor, output: Tensor
    ) -> Callable[[], None]:
        self.taken = {"axes": axes, "output": output, "products": [product], "added": added, "received": received}
        return print


def ends(x: Tensor) -> tuple[int, int]:
    return x.data_ptr(), x.data_ptr() + x.numel() * x.element_size()


@pytest.mark.parametrize("text", ["tp=2,cp=2,fused_tp=true", "tp=2,fused_tp=true,recompute=full"])
def test_a_fused_record_on_cuda_is_a_call_with_what_its_parts_read_and_write(text: str) -> None:
    """Numbers tell: the product of the matrices handed over, and the addend, is what the part itself computes."""
    case = small_case(Plan.parse(text, dtype="float64"))
    program = prepare(build_step(case.config, case.plan, case.batch), backend="nccl")
    calls = Calls()
    executor = Executor(program, dict.fromkeys(program.sizes, 0), cast("Communicator", calls))
    parts_of = {record.op.name: record.parts for record in executor.records if record.op.kind in FUSED}
    executor.device = "cuda"
    seen = {"gather_matmul": 0, "matmul_scatter": 0, "adds": 0}
    for op in program.ops:
        if op.kind not in FUSED:
            continue
        executor._bind(op)
        call, parts = calls.taken, parts_of[op.name]
        multiplied = [part for part in parts if part.op.kind == "matmul"]
        sent = next(part for part in parts if part.op.is_issue)
        waited = next(part for part in parts if part.op.is_wait)
        for tensor in {t.data_ptr(): t for part in multiplied for t in part.inputs}.values():
            tensor.copy_(torch.randn_like(tensor))
        assert len(call["products"]) == len(multiplied) and call["axes"] == HEADS == sent.op.axes
        for part, (left, weight, result) in zip(multiplied, call["products"], strict=True):
            wanted = left @ weight
            if len(part.op.inputs) == 3:
                wanted = wanted + call["added"].reshape(wanted.shape)
            part.run()
            torch.testing.assert_close(result, wanted, rtol=1e-12, atol=1e-12)
            assert ends(result) == ends(part.outputs[0])
        assert ends(call["output"]) == ends(waited.outputs[0])
        if op.kind == "gather_matmul":
            assert ends(call["source"]) == ends(sent.inputs[0])
        else:
            first, last = ends(call["received"])
            assert last - first == ends(sent.inputs[0])[1] - ends(sent.inputs[0])[0]
            adds = len(multiplied[0].op.inputs) == 3
            assert adds == (call["added"] is not None)
            for read in multiplied[0].inputs:  # rows arrive while others are still made
                assert last <= ends(read)[0] or ends(read)[1] <= first
            seen["adds"] += adds
        seen[op.kind] += 1
    assert min(seen.values()) >= 2, seen


class OnGpu:
    """What stands for an input on a GPU."""

    is_cuda, dtype, shape = True, torch.bfloat16, torch.Size((3, 2))

    def __init__(self) -> None:
        self.given: list[tuple[Tensor, bool]] = []

    def copy_(self, value: Tensor, non_blocking: bool) -> None:
        self.given.append((value, non_blocking))


def test_what_is_loaded_onto_a_gpu_is_pinned_first_as_it_will_lie_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """From pageable memory, or changed on the way, a copy makes the host wait for all that runs before it."""
    pinned: list[Tensor] = []
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: (pinned.append(self), self)[1])
    executor, target = object.__new__(Executor), OnGpu()
    executor.buffers = cast("dict[str, Tensor]", {"x": target})
    executor.load("x", torch.arange(6.0).view(2, 3).T)
    [(value, non_blocking)] = target.given
    assert non_blocking and value is pinned[0]
    assert value.dtype == torch.bfloat16 and value.is_contiguous()
    assert value.tolist() == [[0, 3], [1, 4], [2, 5]]
    executor.buffers["x"] = torch.zeros(3, 2)
    executor.load("x", torch.arange(6.0).view(2, 3).T)
    assert len(pinned) == 1 and executor.buffers["x"].tolist() == value.tolist()
