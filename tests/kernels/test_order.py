"""Who sums in one order: the registry says so of every kernel, and what can be read of the kernels agrees."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cinemesh.errors import CinemeshError
from cinemesh.kernels.catalogue import BY_ATOMICS, IMPLEMENTATIONS
from cinemesh.kernels.ops import OPS
from cinemesh.kernels.reference import REFERENCE
from cinemesh.kernels.selection import Software, select

from .examples import EXAMPLES

KERNELS = Path(__file__).parents[2] / "kernels"

# torch.use_deterministic_algorithms of torch 2.13 lists what adds, or writes to one place, in any order on CUDA: of
# that, what a plain form could call.
IN_ANY_ORDER = {
    *("index_add", "index_copy", "index_put", "index_reduce", "put", "scatter", "scatter_add", "scatter_reduce"),
    *("cumsum", "cumprod", "bincount", "histc", "kthvalue", "median", "embedding_dense_backward"),
}


class Called(TorchDispatchMode):
    """The names of the operators that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.overloadpacket.__name__.removesuffix("_"))
        return func(*args, **(kwargs or {}))


def test_plain_forms_that_sum_in_any_order_are_listed() -> None:
    """All of them, run on their examples; one that is not listed would be chosen where deterministic ones are asked."""
    found: set[str] = set()
    assert set(EXAMPLES) == set(OPS)
    for kind, examples in EXAMPLES.items():
        for example in examples(5, 2, 8):
            outputs = [torch.empty_like(x) for x in example.wanted]
            for output, given in OPS[kind].in_place.items():
                outputs[output] = example.inputs[given]
            with Called() as called:
                REFERENCE[kind](example.inputs, outputs, **example.attrs, **({"add": True} if example.add else {}))
            if called.names & IN_ANY_ORDER:
                found.add(kind)
    assert found == set(BY_ATOMICS)


def atomics(source: str) -> Iterator[str]:
    """What a Triton source calls that adds in any order: atomic operations, and assembler."""
    for node in ast.walk(ast.parse(source)):
        name = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
        if (name.startswith("atomic_") and name != "atomic_file") or name in ("histogram", "inline_asm_elementwise"):
            yield f"line {node.lineno}: {name}"  # pyright: ignore[reportAttributeAccessIssue]


def test_no_triton_kernel_adds_by_atomics() -> None:
    """The registry says of all of them that they sum in one order."""
    sources = [path for path in KERNELS.glob("*.py") if "import triton" in path.read_text()]
    modules = {entry.module for entry in IMPLEMENTATIONS if entry.package == "triton"}
    assert {path.stem for path in sources} >= modules and all(
        entry.ordered == "always" for entry in IMPLEMENTATIONS if entry.package == "triton"
    )
    assert {path.name: found for path in sources if (found := list(atomics(path.read_text())))} == {}


def test_an_atomic_addition_would_be_found() -> None:
    source = (KERNELS / "partial_sums.py").read_text().replace("tl.store(", "tl.atomic_add(", 1)
    assert [text.split(": ")[1] for text in atomics(source)] == ["atomic_add"]


@pytest.mark.parametrize("device", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
def test_where_deterministic_kernels_are_asked_for_every_op_has_one(device: str, dtype: str) -> None:
    asked = Software(deterministic=True)
    for op in OPS:
        assert select(op, device, asked, dtype=dtype).entry.ordered != "never", op
    for op in BY_ATOMICS:
        with pytest.raises(CinemeshError, match="sums in any order"):
            select(op, device, Software(overrides={op: "reference"}, deterministic=True))
        assert select(op, "cpu", asked).entry.package == "reference", "a CPU adds in one order"
