"""Adapters of flash-attn, apex and torch's CUDA kernels: called as those packages want, in their layouts.

None of them runs without a GPU. Here stand-ins take the calls (``stand_ins.py``). Where a package's Python sources are
installed, the stand-ins' signatures are held against them; on a GPU the real packages are compared with the reference.
"""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import PackageNotFoundError, distribution
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from cinemesh.kernels import apex, flash_attention, packages, torch_cuda
from cinemesh.kernels.catalogue import IMPLEMENTATIONS, Implementation, candidates
from cinemesh.kernels.reference import REFERENCE
from cinemesh.kernels.registry import function
from cinemesh.launch.proof.verify import small_case
from cinemesh.model.step import build_step
from cinemesh.parallel.ir.plan import Plan
from cinemesh.parallel.passes.pipeline import prepare

from .against_float64 import check, rand, relative_error
from .stand_ins import ATEN, IN_ORDER, STAND_INS, aten_on_cpu

T, S, B, H, K = 5, 7, 2, 3, 64  # queries, keys, samples, heads, head dim


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules of the packages' names that take the adapters' calls."""
    for name, functions in STAND_INS.items():
        module = ModuleType(name)
        vars(module).update({key: value.__func__ for key, value in vars(functions).items() if key[:2] != "__"})
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))
    monkeypatch.setitem(sys.modules, "flash_attn.cute", ModuleType("flash_attn.cute"))


# -- calls ------------------------------------------------------------------------------------------------------------


def attention_tensors(dtype: torch.dtype, device: str = "cpu") -> tuple[list[Tensor], list[Tensor]]:
    q, kv = rand(T, B, H, K, dtype=dtype), rand(S, B, 2, H, K, dtype=dtype)
    lse = torch.empty(B, H, T)
    return [q.to(device), kv.to(device)], [torch.empty_like(q, device=device), lse.to(device)]


def backward_tensors(dtype: torch.dtype, device: str = "cpu") -> tuple[list[Tensor], list[Tensor]]:
    inputs, (o, lse) = attention_tensors(dtype, device)
    REFERENCE["attention"](inputs, (o, lse))
    do = rand(T, B, H, K, dtype=dtype).to(device)
    return [do, *inputs, o, lse], [torch.empty_like(x) for x in inputs]


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize("version", [2, 3, 4])
def test_flash_attention(version: int) -> None:
    inputs, outputs = attention_tensors(torch.bfloat16)
    check("attention", getattr(flash_attention, f"attention_{version}"), inputs, outputs)
    inputs, outputs = backward_tensors(torch.bfloat16)
    for given in ({}, {"deterministic": True}):
        IN_ORDER.clear()
        kernel = partial(getattr(flash_attention, f"attention_backward_{version}"), **given)
        check("attention_backward", kernel, inputs, outputs)
        assert set(IN_ORDER) == {bool(given)}


ADAMW = {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "ema_decay": 0.99}


def adamw_inputs(finite: bool, elements: int = 40) -> list[Tensor]:
    states = [rand(1, elements) for _ in range(5)]
    states[2].abs_()  # second moments
    scalars = [torch.tensor(0.5), torch.tensor(finite), torch.tensor([7, 3]), torch.tensor(0.01)]
    return [*states, *scalars]


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize("finite", [True, False])
@pytest.mark.parametrize("decayed", [0, 13, 40])
def test_apex_adamw(finite: bool, decayed: int) -> None:
    attrs = {**ADAMW, "last_offset": 0, "last_elements": 40, "last_decayed": decayed, "rank": 0}
    inputs = adamw_inputs(finite)
    check("adamw", apex.adamw, inputs, [torch.empty_like(x) for x in inputs[:4]], attrs)


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_apex_norms(dtype: torch.dtype) -> None:
    x, gain, bias = rand(5, 2, 48, dtype=dtype), rand(48, dtype=dtype), rand(48, dtype=dtype)
    scale, shift = rand(2, 48, dtype=dtype), rand(2, 48, dtype=dtype)
    rows = torch.empty(5, 2)
    check("modulate_norm", apex.modulate_norm, [x, gain, scale, shift], [x, rows], {"eps": 1e-5}, rounded=(0,))
    check("layer_norm", apex.layer_norm, [x, gain, bias], [x, rows, rows], {"eps": 1e-5})
    dy, mean, rstd = rand(5, 2, 48, dtype=dtype), rand(5, 2), rand(5, 2).abs() + 0.5
    vectors = [torch.empty(48), torch.empty(48)]
    inputs = [dy, x, mean, rstd, gain]
    check("layer_norm_backward", apex.layer_norm_backward, inputs, [x, *vectors], rounded=(1, 2))


def test_torch_operators_take_the_calls() -> None:
    """On the meta device torch checks names, order and types of every argument, and infers the shapes."""
    q, kv, mask = (torch.empty(s, device="meta", dtype=d) for s, d in (
        ((T, B, H, K), torch.bfloat16), ((S, B, 2, H, K), torch.bfloat16), ((B, S), torch.bool),
    ))  # fmt: skip
    lse = torch.empty(B, H, T, device="meta")
    torch_cuda.attention([q, kv], [q, lse])
    torch_cuda.attention_backward([q, q, kv, q, lse], [q, kv], deterministic=True)
    torch_cuda.cudnn_attention([q, kv], [q, lse])
    torch_cuda.cudnn_attention_backward([q, q, kv, q, lse], [q, kv])
    torch_cuda.cross_attention([q, kv, mask], [q, lse])
    torch_cuda.cross_attention_backward([q, q, kv, q, lse, mask], [q, kv], deterministic=True)
    assert not torch.are_deterministic_algorithms_enabled()  # switched back
    x, weight, out = (torch.empty(s, device="meta", dtype=torch.bfloat16) for s in ((4, 2, 8), (8, 16), (4, 2, 16)))
    for target in (out, out.float()):
        for add in (False, True):
            if add and target.dtype != x.dtype and tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13):
                continue  # an older meta function takes the dtype for beta; the CUDA kernel does not
            torch_cuda.matmul([x, weight], [target], signature="tbi,io->tbo", add=add)


def masked(tensors: tuple[list[Tensor], list[Tensor]]) -> tuple[list[Tensor], list[Tensor]]:
    """An attention call with a key mask; o and log-sum-exp, where the call takes them, are those of the mask."""
    (*inputs,), outputs = tensors
    mask = torch.arange(S)[None] < torch.tensor([[S - 2], [1]])
    if len(inputs) > 2:
        REFERENCE["cross_attention"]((*inputs[1:3], mask), inputs[3:5])
    return [*inputs, mask], outputs


def check_torch(name: str, **given: bool) -> None:
    op = name.removeprefix("cudnn_")
    inputs, outputs = (backward_tensors if "backward" in op else attention_tensors)(torch.bfloat16)
    if "cross" in op:
        inputs, outputs = masked((inputs, outputs))
    check(op, partial(getattr(torch_cuda, name), **given), inputs, outputs)


@pytest.mark.parametrize("op", ["attention", "attention_backward", "cross_attention", "cross_attention_backward"])
def test_torch_attention(op: str) -> None:
    """Layouts, the mask, the padded log-sum-exp and which gradient is whose, through the operators' own schemas."""
    for given in ({}, {"deterministic": True}) if "backward" in op else ({},):
        IN_ORDER.clear()
        with aten_on_cpu():
            check_torch(op, **given)
        assert set(IN_ORDER) == ({bool(given)} if "backward" in op else set())
    assert not torch.are_deterministic_algorithms_enabled()  # switched back


@pytest.mark.parametrize(("grid", "tokens"), [((3, 2, 2), 6), ((4, 3, 5), 15), ((2, 3, 4), 5)])
def test_position_gradients_as_products(grid: tuple[int, int, int], tokens: int) -> None:
    """Of shares that begin and end inside a row of the grid, too; tables hold rows on which no token stands."""
    tables = [torch.empty(rows + 2, 8) for rows in grid]
    check("position_backward", torch_cuda.position_backward, [rand(tokens, 8)], tables, {"grid": grid, "rank": 1})


@pytest.mark.parametrize("before", [False, True])
def test_nothing_is_filled_while_sums_are_asked_for_in_order(before: bool) -> None:
    """Torch fills what it allocates with NaN while its switch is on: a pass over memory for each output."""
    read = torch._C._get_deterministic_fill_uninitialized_memory
    write = torch._C._set_deterministic_fill_uninitialized_memory
    was = read()
    try:
        write(before)
        with torch_cuda._in_order(True):
            assert torch.are_deterministic_algorithms_enabled() and not read()
            assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert read() is before and not torch.are_deterministic_algorithms_enabled()
        with torch_cuda._in_order(False):
            assert read() is before
    finally:
        write(was)


@pytest.mark.parametrize("op", ["cudnn_attention", "cudnn_attention_backward"])
def test_cudnn_attention(op: str) -> None:
    """Layouts, the log-sum-exp's fourth dim and which gradient is whose, through the operators' own schemas."""
    with aten_on_cpu():
        check_torch(op)


def test_torch_has_cudnns_operators_as_they_are_called() -> None:
    """Those of 2.11 and of 2.13 alike: names, order and types of arguments, and of what comes back."""
    forward = torch.ops.aten._scaled_dot_product_cudnn_attention.default._schema
    backward = torch.ops.aten._scaled_dot_product_cudnn_attention_backward.default._schema
    assert [(a.name, str(a.type), a.kwarg_only) for a in forward.arguments] == [
        *((name, "Tensor", False) for name in ("query", "key", "value")),
        ("attn_bias", "Optional[Tensor]", False), ("compute_log_sumexp", "bool", False), ("dropout_p", "float", False),
        ("is_causal", "bool", False), ("return_debug_mask", "bool", False), ("scale", "Optional[float]", True),
    ]  # fmt: skip
    assert [a.name for a in forward.returns][:2] == ["output", "logsumexp"]
    names = ("grad_out", "query", "key", "value", "out", "logsumexp", "philox_seed", "philox_offset", "attn_bias",
             "cum_seq_q", "cum_seq_k")  # fmt: skip
    assert [(a.name, str(a.type), a.kwarg_only) for a in backward.arguments] == [
        *((name, "Tensor", False) for name in names), ("max_q", "int", False), ("max_k", "int", False),
        ("dropout_p", "float", False), ("is_causal", "bool", False), ("scale", "Optional[float]", True),
    ]  # fmt: skip
    assert [str(a.type) for a in backward.returns] == ["Tensor"] * 3


@pytest.mark.parametrize("samples", [1, 2])
def test_cudnn_gets_views_that_it_may_read_by_strides(samples: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of K, V and the rest start at 16 bytes, the head dim is dense, and strides fit the 32 bits of torch's key.

    A mapping of the packed K and V that copies, or a log-sum-exp in another order, gives no wrong number elsewhere.
    """
    seen: list[Tensor] = []

    def backward(*given: Any) -> Any:
        seen.extend(x for x in given if isinstance(x, Tensor) and x.dim() == 4)
        return tuple(torch.empty_like(x) for x in given[1:4])

    monkeypatch.setattr(torch.ops.aten, "_scaled_dot_product_cudnn_attention_backward", backward)
    q = torch.empty(T, samples, H, K, dtype=torch.bfloat16)
    kv, lse = torch.empty(S, samples, 2, H, K, dtype=torch.bfloat16), torch.empty(samples, 2 * H, T)[:, :H]
    torch_cuda.cudnn_attention_backward([q, q.clone(), kv, q.clone(), lse], [q.clone(), kv.clone()])
    *rows, stats = seen
    assert stats.shape == (samples, H, T, 1) and stats.is_contiguous() and stats.dtype == torch.float32
    assert [x.shape for x in rows] == [(samples, H, n, K) for n in (T, T, S, S, T)]
    assert {x.data_ptr() for x in rows[2:4]} == {kv.data_ptr(), kv[:, :, 1].data_ptr()}, "K or V was copied"
    for x in rows:
        assert x.stride(-1) == 1 and max(x.stride()) < 2**31
        assert x.data_ptr() % 16 == 0 and all(step * x.element_size() % 16 == 0 for step in x.stride()[:3])
    assert rows[0].stride() == rows[4].stride(), "torch keeps one plan for one q, k, v, however o and do are laid out"


@pytest.mark.parametrize(
    "text", ["tp=2,cp=2", "cp=2,kv_slices=2", "cp=2,kv_chunks=2", "tp=2,tp_slices=2,recompute=none"]
)
def test_one_layout_of_q_k_and_v_has_one_of_all_else(text: str) -> None:
    """Torch keeps cuDNN's plan by the first three alone: o, or a gradient, of other strides would be read wrongly."""
    case = small_case(Plan.parse(text))
    program = prepare(build_step(case.config, case.plan, case.batch), backend="nccl")
    found = [op for op in program.ops if op.kind == "attention_backward"]
    layouts: dict[object, set[object]] = {}
    for op in found:
        do, q, kv, o, lse = ((program.local_shape(name), program.local_strides(name)) for name in op.inputs[:5])
        layouts.setdefault((q, kv), set()).add((do, o, lse))
    assert found and all(len(others) == 1 for others in layouts.values()), layouts


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_torch_matmul(dtype: torch.dtype, add: bool) -> None:
    """Every combination of transposes that the step's products have."""
    with aten_on_cpu():
        for signature, a, b, out in (
            ("tbi,io->tbo", (4, 2, 8), (8, 16), (4, 2, 16)),
            ("tbo,hko->tbhk", (4, 2, 8), (3, 5, 8), (4, 2, 3, 5)),
            ("tbhk,tbo->hko", (4, 2, 3, 5), (4, 2, 8), (3, 5, 8)),
            ("ori,bi->orb", (8, 6, 4), (2, 4), (8, 6, 2)),
        ):
            inputs = [rand(*a, dtype=torch.bfloat16), rand(*b, dtype=torch.bfloat16)]
            attrs = {"signature": signature}
            check("matmul", torch_cuda.matmul, inputs, [torch.empty(out, dtype=dtype)], attrs, add=add)


def swapped(name: str) -> Callable[..., Any]:
    """An operator whose gradients of K and V change places."""

    def body(*given: Any, **named: Any) -> Any:
        dq, dk, dv, *rest = ATEN[name](*given, **named)
        return dq, dv, dk, *rest

    return body


@pytest.mark.parametrize("op", ["attention_backward", "cudnn_attention_backward", "cross_attention_backward"])
def test_gradients_that_change_places_are_found(op: str) -> None:
    names = [name for name in ATEN if name.endswith("backward")]
    with aten_on_cpu(**{name: swapped(name) for name in names}), pytest.raises(AssertionError, match="output 1"):
        check_torch(op)


@pytest.mark.parametrize("op", ["cross_attention", "cross_attention_backward"])
def test_an_inverted_mask_is_found(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bias = torch_cuda._bias
    monkeypatch.setattr(torch_cuda, "_bias", lambda mask, q: bias(~mask, q))
    with aten_on_cpu(), pytest.raises(AssertionError, match="errs by"):
        check_torch(op)


# -- against the packages ---------------------------------------------------------------------------------------------

SOURCES = {
    "flash_attn.flash_attn_interface": ("flash-attn", "flash_attn/flash_attn_interface.py"),
    "flash_attn_interface": ("flash_attn_3", "flash_attn_interface.py"),
    "flash_attn.cute.interface": ("flash-attn-4", "flash_attn/cute/interface.py"),
}


@pytest.mark.parametrize("module", SOURCES)
def test_stand_ins_have_the_installed_packages_signatures(module: str) -> None:
    """Read, not imported: these packages load CUDA libraries."""
    name, path = SOURCES[module]
    try:
        source = distribution(name).locate_file(path)
    except PackageNotFoundError:
        pytest.skip(f"{name} is not installed")
    tree = ast.parse(source.read_text())  # pyright: ignore[reportAttributeAccessIssue]
    for function_name, stand_in in vars(STAND_INS[module]).items():
        if function_name[:2] == "__":
            continue
        found = next(n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == function_name)
        names = [argument.arg for argument in found.args.args]
        recorded = list(inspect.signature(stand_in.__func__).parameters)
        assert names[: len(recorded)] == recorded, f"{name}: {function_name}"


def calls(entry: Implementation) -> Iterator[tuple[list[Tensor], list[Tensor], dict[str, Any]]]:
    """Inputs, outputs and attributes on the GPU for an implementation of attention, norms or AdamW."""
    make: dict[str, Callable[[torch.dtype, str], tuple[list[Tensor], list[Tensor]]]] = {
        "attention": attention_tensors,
        "attention_backward": backward_tensors,
    }
    if entry.op in make:
        for dtype in (torch.bfloat16, torch.float16):
            yield *make[entry.op](dtype, "cuda"), {}
    elif entry.op in ("cross_attention", "cross_attention_backward"):
        mask = (torch.arange(S)[None] < torch.tensor([[S], [1]])).cuda()
        inputs, outputs = make[entry.op.removeprefix("cross_")](torch.bfloat16, "cuda")
        yield [*inputs, mask], outputs, {}
    elif entry.op == "adamw":
        inputs = [x.cuda() for x in adamw_inputs(True, 4096)]
        attrs = {**ADAMW, "last_offset": 0, "last_elements": 4096, "last_decayed": 1024, "rank": 0}
        yield inputs, inputs[:4], attrs
    elif entry.op == "position_backward":
        yield (
            [rand(64, 512).cuda()],
            [torch.empty(rows, 512).cuda() for rows in (4, 4, 8)],
            {"grid": (4, 4, 8), "rank": 1},
        )
    elif entry.op == "matmul":
        x, weight = rand(64, 2, 128, dtype=torch.bfloat16).cuda(), rand(128, 256, dtype=torch.bfloat16).cuda()
        for dtype in (torch.bfloat16, torch.float32):
            yield [x, weight], [torch.empty(64, 2, 256, dtype=dtype).cuda()], {"signature": "tbi,io->tbo"}
    else:
        x, vector = rand(64, 2, 512, dtype=torch.bfloat16).cuda(), rand(512, dtype=torch.bfloat16).cuda()
        rows, wide = torch.rand(64, 2).cuda() + 0.5, torch.empty(512).cuda()
        sample = rand(2, 512, dtype=torch.bfloat16).cuda()
        yield {
            "modulate_norm": ([x, vector, sample, sample], [x.clone(), rows], {"eps": 1e-5}),
            "layer_norm": ([x, vector, vector], [x.clone(), rows, rows.clone()], {"eps": 1e-5}),
            "layer_norm_backward": ([x, x, rows, rows, vector], [x.clone(), wide, wide.clone()], {}),
        }[entry.op]


FOREIGN = [e for e in IMPLEMENTATIONS if e.package not in ("triton", "reference") and "cuda" in e.devices]


@pytest.mark.gpu
@pytest.mark.parametrize("entry", FOREIGN, ids=lambda entry: f"{entry.op}-{entry.package}")
def test_package_computes_what_the_reference_does(entry: Implementation) -> None:
    if entry.package in packages.missing():
        pytest.skip(f"{entry.package}: {packages.missing()[entry.package]}")
    for inputs, outputs, attrs in calls(entry):
        wide = [x.double() if x.is_floating_point() else x for x in inputs]
        want = [torch.empty_like(x, dtype=torch.float64) for x in outputs]
        got = [torch.full_like(x, torch.nan) for x in outputs]
        if entry.op == "adamw":
            wide, mine = [x.clone() for x in wide], [x.clone() for x in inputs]
            want, got, inputs = wide[:4], mine[:4], mine
        elif "backward" in entry.op and "attention" in entry.op:
            o, lse = torch.empty_like(wide[3]), torch.empty_like(wide[4])
            REFERENCE["attention"]((wide[1], wide[2], *wide[5:]), (o, lse))
            wide[3:5], inputs[3:5] = [o, lse], [o.to(inputs[3].dtype), lse.float()]
        REFERENCE[entry.op](wide, want, **attrs)
        function(entry)(inputs, got, **attrs)
        for first, truth in zip(got, want, strict=True):
            assert relative_error(first, truth) <= 1e-2


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("package", ["cudnn", "torch", "triton"])
def test_attention_against_float64_eager_and_replayed(package: str, head_dim: int) -> None:
    """Of unequal lengths, from other values in the replay, within the workspace that is declared: on a device only."""
    if package in packages.missing():
        pytest.skip(f"{package}: {packages.missing()[package]}")
    forward, backward = (
        next(e for e in candidates(op) if e.package == package and "cuda" in e.devices)
        for op in ("attention", "attention_backward")
    )
    queries, keys, samples, heads = 2048, 8192, 2, 4
    shapes = ((queries, samples, heads, head_dim), (queries, samples, heads, head_dim),
              (keys, samples, 2, heads, head_dim))  # fmt: skip
    do, q, kv = (torch.empty(shape, dtype=torch.bfloat16, device="cuda") for shape in shapes)
    o, dq, dkv = torch.empty_like(q), torch.empty_like(q), torch.empty_like(kv)
    lse = torch.empty(samples, heads, queries, device="cuda")

    def run() -> None:
        function(forward)([q, kv], [o, lse])
        function(backward)([do, q, kv, o, lse], [dq, dkv])

    def fill() -> None:
        for x in (do, q, kv):
            x.copy_(rand(*x.shape, dtype=torch.bfloat16))

    def assert_right() -> None:
        wide = [x.double() for x in (do, q, kv)]
        truth = [torch.empty_like(x, dtype=torch.float64) for x in (o, lse, dq, dkv)]
        REFERENCE["attention"](wide[1:], truth[:2])
        REFERENCE["attention_backward"]([*wide, *truth[:2]], truth[2:])
        for got, want in zip((o, lse, dq, dkv), truth, strict=True):
            assert relative_error(got, want) <= 1e-2

    sizes = {"t": queries, "s": keys, "b": samples, "h": heads, "k": head_dim}
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            fill()
            run()
        stream.synchronize()
        assert_right()
        for entry, given, outputs in ((forward, [q, kv], [o, lse]), (backward, [do, q, kv, o, lse], [dq, dkv])):
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            function(entry)(given, outputs)
            taken = torch.cuda.max_memory_allocated() - before
            assert taken <= entry.workspace(sizes, 2) + 4 * 2**20, "4 MiB: blocks are rounded up"
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        run()
    fill()
    graph.replay()
    torch.cuda.synchronize()
    assert_right()


@pytest.mark.gpu
@pytest.mark.parametrize("entry", [e for e in FOREIGN if e.ordered == "asked"], ids=lambda e: f"{e.op}-{e.package}")
def test_a_backward_that_is_asked_to_sums_in_one_order(entry: Implementation) -> None:
    """Over many blocks of keys, whose sums atomics would add in another order each time."""
    if entry.package in packages.missing():
        pytest.skip(f"{entry.package}: {packages.missing()[entry.package]}")
    q, kv = rand(2048, 1, 4, K, dtype=torch.bfloat16).cuda(), rand(8192, 1, 2, 4, K, dtype=torch.bfloat16).cuda()
    mask = [torch.ones(1, 8192, dtype=torch.bool, device="cuda")] if "cross" in entry.op else []
    o, lse, forward = torch.empty_like(q), torch.empty(1, 4, 2048, device="cuda"), entry.op.removesuffix("_backward")
    REFERENCE[forward]((q, kv, *mask), (o, lse))
    first, second = ([torch.empty_like(q), torch.empty_like(kv)] for _ in range(2))
    for outputs in (first, second):
        function(entry)([q, q, kv, o, lse, *mask], outputs, deterministic=True)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
