"""On a machine with a GPU the tests of Triton kernels prove them there: no file of them makes a tensor elsewhere.

A kernel that is given a CPU tensor there fails for that alone; a test that avoids it by running nothing proves nothing.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from cinemesh.kernels.compile import triton_modules

from . import against_float64, test_adamw, test_attention_triton, test_merge
from .conftest import DEVICE

TESTS = Path(__file__).parent
FIXTURE = "where_kernels_run"
ELSEWHERE = ("cpu", "numpy", "from_numpy", "Generator")  # a method or function; and ``device=`` whatever it says


def of_triton(tree: ast.Module) -> bool:
    """Whether a file imports a module of Triton kernels."""
    modules = triton_modules()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "cinemesh.kernels":
            if any(name.name in modules for name in node.names):
                return True
        elif isinstance(node, ast.ImportFrom) and node.module in [f"cinemesh.kernels.{name}" for name in modules]:
            return True
    return False


def faults(tree: ast.Module) -> Iterator[str]:
    """What of a test file would be on another device than the kernels."""
    marks = [
        node for node in tree.body if isinstance(node, ast.Assign) and "pytestmark" in ast.unparse(node.targets[0])
    ]
    if not any(FIXTURE in ast.unparse(node.value) for node in marks):
        yield f"asks for no {FIXTURE}"
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    inside = {id(node) for function in functions for node in ast.walk(function)}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if name in ELSEWHERE or any(word.arg == "device" for word in node.keywords):
            yield f"line {node.lineno}: {name} says where"
        if any(isinstance(given, ast.Constant) and given.value in ("cpu", "cuda") for given in node.args):
            yield f"line {node.lineno}: {name} says where"
        made = isinstance(node.func, ast.Attribute) and ast.unparse(node.func.value) == "torch" and name != "device"
        if made and id(node) not in inside:
            yield f"line {node.lineno}: {name} before the test begins"


def files() -> dict[str, ast.Module]:
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in TESTS.glob("test_*.py")}
    return {path.name: tree for path, tree in trees.items() if of_triton(tree)}


def test_no_triton_test_says_where_its_tensors_are() -> None:
    found = files()
    assert len(found) >= 10 and Path(test_adamw.__file__).name in found
    assert [f"{name}: {fault}" for name, tree in found.items() for fault in faults(tree)] == []


PLANTED = f"""
import pytest, torch
from cinemesh.kernels import adamw
pytestmark = pytest.mark.usefixtures("{FIXTURE}")
ONES = torch.ones(3)
def test_it():
    adamw.adamw([torch.ones(3).cpu(), tensors(call, "cpu"), torch.ones(3, device="cuda")], [])
"""


def test_each_way_to_be_elsewhere_is_found() -> None:
    tree = ast.parse(PLANTED)
    assert of_triton(tree) and not of_triton(ast.parse("from cinemesh.kernels import rates"))
    assert sorted(faults(tree)) == [
        "line 5: ones before the test begins",
        "line 7: cpu says where",
        "line 7: ones says where",
        "line 7: tensors says where",
    ]
    assert next(faults(ast.parse(PLANTED.replace("pytestmark", "mark")))) == f"asks for no {FIXTURE}"


def test_what_these_tests_make_is_where_it_is_asked_for() -> None:
    """On a device that has no values, in place of a GPU."""
    with torch.device("meta"):
        made = [
            *test_adamw.state(5, 1),
            *test_merge.parts(2, (1, 1, 1, 5), torch.float32),
            *test_attention_triton.problem((5, 3, 2, 3, 64), torch.bfloat16, masked=True)[0],
            against_float64.poisoned(against_float64.rand(3)),
        ]
    assert {x.device.type for x in made} == {"meta"} and against_float64.rand(3).device.type == "cpu"


@pytest.mark.usefixtures(FIXTURE)
def test_the_device_is_the_gpu_where_there_is_one() -> None:
    assert against_float64.rand(3).device.type == DEVICE == ("cuda" if torch.cuda.is_available() else "cpu")
