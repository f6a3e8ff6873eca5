"""Fused records over tp: which pairs become one, what they keep of their parts, and what they say of time and place.

That the numbers stay right, the ledger and the live bytes with them: tests/model/test_parity.py, which runs such plans.
"""

from __future__ import annotations

import json
import platform
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from harness import Pool
from torch import Tensor
from torch._C._distributed_c10d import _resolve_process_group
from torch.distributed import _symmetric_memory as symmetric
from torch.distributed.distributed_c10d import GroupName

from cinemesh.errors import CinemeshError
from cinemesh.kernels import reference
from cinemesh.kernels.reference import product_of
from cinemesh.kernels.registry import kernels_for
from cinemesh.launch.proof.lint_step import lint_step
from cinemesh.launch.proof.parity import OPTIMIZER, load_batch
from cinemesh.launch.proof.verify import small_case
from cinemesh.model import weights
from cinemesh.model.runner import StepRunner
from cinemesh.model.step import build_step
from cinemesh.parallel.ir.builder import Builder
from cinemesh.parallel.ir.collectives import FUSED
from cinemesh.parallel.ir.dependencies import dependencies
from cinemesh.parallel.ir.layout import HEADS, TOKENS, Placement
from cinemesh.parallel.ir.plan import Plan
from cinemesh.parallel.ir.program import Program
from cinemesh.parallel.ir.records import Buffer, Op, Phase
from cinemesh.parallel.passes.arena import place
from cinemesh.parallel.passes.fuse_tp import fuse_tp, pipelined_s
from cinemesh.parallel.passes.liveness import lifetimes, persistent
from cinemesh.parallel.passes.pipeline import prepare
from cinemesh.parallel.passes.prices import Rates
from cinemesh.parallel.passes.schedule import ScheduleWindows
from cinemesh.parallel.passes.staging import SYMMETRIC, stage_for_gloo, stage_symmetric
from cinemesh.parallel.runtime import ledger
from cinemesh.parallel.runtime.comm import Communicator, set_up_nccl
from cinemesh.parallel.runtime.ledger import Entry
from cinemesh.parallel.runtime.mesh import Mesh

PLAN = "tp=2,cp=2,fused_tp=true"


def program_of(text: str, backend: str = "nccl") -> Program:
    plan = Plan.parse(text, dtype="float32")
    case = small_case(plan, max_procs=16)
    return prepare(build_step(case.config, plan, case.batch), backend=backend)


# -- which ------------------------------------------------------------------------------------------------------------


def called(op: Op) -> str:
    """What a record makes; with a ``~``, again."""
    return f"{op.label}{'~' if op.clone else ''}"


def fused_in(program: Program, phase: Phase) -> dict[str, tuple[str, ...]]:
    """Of one block: the fused records and their products, by role."""
    found: dict[str, tuple[str, ...]] = {}
    for op in program.ops:
        if op.kind in FUSED and op.place.block == 1 and op.place.phase is phase:
            found[called(op)] = tuple(called(part) for part in op.parts if part.kind == "matmul")
    return found


FORWARD = {
    "h1_gathered": ("kv",),  # K and V travel over cp next: q, which comes after them, hides that
    "y1": ("y1_partial",),
    "x1_gathered": ("cross_q",),
    "y2": ("y2_partial",),
    "h2_gathered": ("gate", "up"),
    "y3": ("y3_partial",),
}
BACKWARD = {
    "dy3_gathered": ("dact",),
    "dh2": ("dh2_gathered",),  # with what up gave, to which it is added
    "dy2_gathered": ("dcross_o",),
    "dx1_of_cross": ("dx1_gathered",),
    "dy1_gathered": ("do",),
    "dh1": ("dh1_gathered",),
}


@pytest.mark.parametrize("backend", ["gloo", "nccl"])
def test_every_collective_of_tokens_over_tp_takes_its_products_along(backend: str) -> None:
    program = program_of(PLAN, backend)
    assert fused_in(program, Phase.FORWARD) == FORWARD and fused_in(program, Phase.BACKWARD) == BACKWARD
    tokens = [op for op in program.ops if op.lane == "tp" and op.place.block == 1 and op.kind not in FUSED]
    assert set(map(called, tokens)) == {"h1_gathered~", "x1_gathered~", "h2_gathered~"}, (
        "backward needs no product of these: it has them"
    )


def test_without_cp_the_queries_come_too() -> None:
    assert fused_in(program_of("tp=2,fused_tp=true"), Phase.FORWARD) == FORWARD | {"h1_gathered": ("kv", "q")}


def test_what_backward_makes_again_is_fused_as_well() -> None:
    found = fused_in(program_of(f"{PLAN},recompute=full"), Phase.FORWARD)
    assert found["h2_gathered~"] == ("gate~", "up~") and found["y1~"] == ("y1_partial~",)


def test_the_builder_has_checked_the_parts() -> None:
    """So every mutation that tests/parallel/test_mutations.py tries is refused under ``fused_tp`` too."""
    built: list[list[tuple[object, ...]]] = []
    for text in ("tp=2,cp=2,dp_shard=2", "tp=2,cp=2,dp_shard=2,fused_tp=true"):
        plan = Plan.parse(text, dtype="float32")
        case = small_case(plan)
        ops = build_step(case.config, plan, case.batch).ops
        built.append([(op.name, op.kind, op.inputs, op.outputs, op.attrs, op.comm) for op in ops])
    assert built[0] == built[1]


def test_a_plan_that_does_not_ask_for_it_has_none() -> None:
    program = program_of("tp=2,cp=2")
    assert not any(op.kind in FUSED for op in program.ops) and SYMMETRIC not in program.buffers


@pytest.mark.parametrize("more", ["", ",recompute=full,micro_batches=2", ",recompute=none,dp_shard=2"])
def test_the_same_is_sent_and_computed(more: str) -> None:
    fused, plain = program_of(PLAN + more), program_of(PLAN.replace("true", "false") + more)
    sent = [Counter(map(str, ledger.expected(program))) for program in (fused, plain)]
    assert sent[0] == sent[1] and any(key.startswith("all_gather on tp,") for key in sent[0])
    assert sum(map(fused.flops, fused.ops)) == sum(map(plain.flops, plain.ops))
    assert sum(map(fused.bytes_moved, fused.ops)) == sum(map(plain.bytes_moved, plain.ops))
    wires = [sum(p.wire_bytes(op) for op in p.ops if not op.is_wait and op.comm is not None) for p in (fused, plain)]
    assert wires[0] == wires[1]


# -- small programs ---------------------------------------------------------------------------------------------------

T, B, D, F = 12, 2, 8, 6


def small(between: str = "") -> Program:
    """x gathered, times w, times v, scattered; ``between``: what stands in the way."""
    b = Builder(Plan(tp=2, fused_tp=True, dtype="float64"))
    x = b.input("x", (T, B, D), "float64", Placement((TOKENS, (), ())))
    w = b.input("w", (D, F), "float64", Placement(((), HEADS)))
    v = b.input("v", (F, D), "float64", Placement((HEADS, ())))
    outputs: dict[str, tuple[Buffer, Placement]] = {}

    def out(name: str, buffer: Buffer) -> None:
        outputs[name] = (buffer, buffer.placement)

    def copy(source: Buffer, name: str, into: Buffer | None = None) -> Buffer:
        return b.op("copy", [source], name, signature="tbd->tbd", into={0: into} if into else None)[0]

    mine = copy(x, "mine")
    gathered = b.all_gather(mine, HEADS, "gathered")
    if between == "a reader of what is gathered":
        out("early", copy(gathered, "early"))
    if between == "a writer of what is sent":
        out("again", copy(x, "again", into=mine))
    (y,) = b.op("matmul", [gathered, w], "y", signature="tbi,if->tbf")
    (z,) = b.op("matmul", [y, v], "z_partial", signature="tbf,fo->tbo")
    if between == "a reader of the product":
        out("unsummed", copy(z, "unsummed"))
    out("z", b.reduce_scatter(z, HEADS, "z"))
    if between == "a second reader of the product":
        out("unsummed", copy(z, "unsummed"))
    return b.finish(outputs)


@pytest.mark.parametrize(
    ("between", "kinds"),
    [
        ("", ["copy", "gather_matmul", "matmul_scatter"]),
        ("a reader of what is gathered", ["copy", "all_gather", "wait", "copy", "matmul", "matmul_scatter"]),
        ("a writer of what is sent", ["copy", "all_gather", "wait", "copy", "matmul", "matmul_scatter"]),
        ("a reader of the product", ["copy", "gather_matmul", "matmul", "copy", "reduce_scatter", "wait"]),
        ("a second reader of the product", ["copy", "gather_matmul", "matmul", "reduce_scatter", "wait", "copy"]),
    ],
)
def test_what_stands_in_the_way_keeps_them_apart(between: str, kinds: list[str]) -> None:
    assert [op.kind for op in fuse_tp(small(between)).ops] == kinds


def test_a_record_knows_its_parts() -> None:
    program = fuse_tp(small())
    _, gather, scatter = program.ops
    assert (gather.inputs, gather.outputs, gather.lane) == (("mine", "w"), ("gathered", "y"), "tp")
    assert (scatter.inputs, scatter.outputs) == (("y", "v"), ("z", "z_partial"))
    assert program.flops(gather) == 2 * T * B * D * F // 2 and program.payload_bytes(gather) == T * B * D * 8
    assert program.payload_bytes(scatter) == T * B * D * 8 and program.wire_bytes(scatter) == T * B * D * 8 / 2
    kinds = ("all_gather", "reduce_scatter")
    assert ledger.expected(program) == [Entry(kind, "tp", "tp", T * B * D * 8) for kind in kinds]


# -- memory -----------------------------------------------------------------------------------------------------------


def test_what_symmetric_memory_takes_is_listed() -> None:
    """Two ranks' rows of what is reduced, more than one rank's of what is gathered; a place for what is received."""
    program = program_of(PLAN)
    rows = program.local_elements("mb0/blocks.0.forward/y1")
    assert program.local_elements(SYMMETRIC) == 2 * rows and SYMMETRIC in persistent(program)
    assert SYMMETRIC not in place(program).offsets
    plain = program_of(PLAN.replace("true", "false"))
    assert lifetimes(program).persistent_bytes - lifetimes(plain).persistent_bytes == 2 * rows * 4
    staged = {op.label for op in program.ops if op.kind == "matmul_scatter" and len(op.outputs) > 2}
    assert staged == {"dh1", "dh2"}, "only what is added to a term needs more than its own product's place"


def test_gloo_needs_no_symmetric_memory_but_its_staging() -> None:
    program = program_of(PLAN, "gloo")
    assert SYMMETRIC not in program.buffers
    for op in program.ops:
        if op.kind == "matmul_scatter":
            issue, wait = op.collective, op.parts[-1]
            assert op.outputs[-1] == issue.outputs[-1] == wait.inputs[-1] == f"{op.name}.staging"


@pytest.mark.parametrize("stage", [stage_for_gloo, stage_symmetric])
def test_what_a_record_touches_keeps_its_place_in_the_arena(stage: Callable[[Program], Program]) -> None:
    """All that its parts touch lives as long as the record: lifetimes, and so the arena, go by its names."""
    program = stage(fuse_tp(small()))
    for op in program.ops:
        named = {program.root(name)[0] for name in (*op.inputs, *op.outputs)}
        touched = {program.root(name)[0] for part in op.parts for name in (*part.inputs, *part.outputs)}
        assert touched <= named


# -- order and time ---------------------------------------------------------------------------------------------------


def test_the_formula_at_its_two_ends_and_where_they_meet() -> None:
    """Derived in fuse_tp.py: compute hides all but one rank's product, or nothing is left to hide."""
    assert pipelined_s(8.0, 1.0, 4) == 8.0
    assert pipelined_s(8.0, 9.0, 4) == 11.0
    assert pipelined_s(8.0, 6.0, 4) == 8.0
    slow, fast = 3.0, 1.0  # by hand, three ranks: rows at 0, 3, 6; products of 1 from 0, 3, 6
    assert pipelined_s(3 * fast, 2 * slow, 3) == 7.0


def test_the_default_prices_say_the_same() -> None:
    program = fuse_tp(small())
    rates = Rates(1e3, 1e9, 8, 100.0, 1.0, 0.0, 0.0, 1.0)
    for op in program.ops[1:]:
        products = program.flops(op) / 1e3
        assert rates.price(program, op) == pytest.approx(max(products, program.wire_bytes(op) / 100 + products / 2))


def test_the_schedule_keeps_what_depends_on_what() -> None:
    plan = Plan.parse(f"{PLAN},dp_shard=2,kv_slices=3,defer_weight_gradients=true,recompute=full", dtype="float32")
    case = small_case(plan, max_procs=16)
    unordered = prepare(build_step(case.config, replace(plan, kv_slices=3), case.batch), backend="nccl")
    ordered = ScheduleWindows(unordered).ordered(unordered, lambda program, op: 0.5 if op.lane == "compute" else 1.0)
    position = {op.name: i for i, op in enumerate(ordered.ops)}
    for op, needed in zip(unordered.ops, dependencies(unordered, unordered.ops), strict=True):
        assert all(position[unordered.ops[k].name] < position[op.name] for k in needed), op.name
    assert [op.name for op in ordered.ops] != [op.name for op in unordered.ops]


# -- the lint ---------------------------------------------------------------------------------------------------------


def writes_its_input(inputs: reference.Tensors, outputs: reference.Tensors, **attrs: Any) -> None:
    reference.matmul(inputs, outputs, **attrs)
    inputs[1].mul_(1.0)


def allocates(inputs: reference.Tensors, outputs: reference.Tensors, **attrs: Any) -> None:
    outputs[0].new_empty(1 << 20)
    reference.matmul(inputs, outputs, **attrs)


@pytest.mark.parametrize(("kernel", "check"), [(writes_its_input, "writes"), (allocates, "allocates")])
def test_a_fault_within_a_fused_record_is_found(kernel: reference.Kernel, check: str) -> None:
    """It may call collectives, which no compute record may; it may do nothing else that these may not."""
    case = small_case(Plan.parse("tp=2,fused_tp=true", dtype="float32"))
    found = lint_step(case, kernels={**kernels_for("cpu"), "matmul": kernel})
    assert {finding.check for finding in found} == {check}
    named = {match[1] for finding in found if (match := re.search(r"\((\w+)\)$", finding.op))}
    assert named == {"matmul", "gather_matmul", "matmul_scatter"}


# -- legality ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cp=2,fused_tp=true", r"fused_tp\(true\) with tp\(1\): activations .* set fused_tp to false or raise tp"),
        ("tp=2,fused_tp=true,tp_slices=3", r"fused_tp\(true\) with tp_slices\(3\): both hide the same"),
        ("tp=2,fused_tp=2", "fused_tp is 2; it must be true or false"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(text: str, message: str) -> None:
    with pytest.raises(CinemeshError, match=message):
        Plan.parse(text)


def test_it_goes_with_the_degrees() -> None:
    plan = Plan(tp=4, fused_tp=True)
    assert Plan.from_yaml(plan.to_yaml()) == plan and not plan.overlaps, "records keep the builder's order"
    assert plan.with_degrees(tp=2).fused_tp and not plan.with_degrees(tp=1).fused_tp


def refusal_on_two_servers(order: str) -> str:
    """Ranks 0 and 1 on one server, 2 and 3 on another."""
    mesh = Mesh(Plan.parse(f"tp=2,cp=2,fused_tp=true,order={order}"))
    answer = ""
    with mock.patch.object(platform, "node", lambda: f"node{mesh.rank // 2}"):
        try:
            Communicator(mesh).check_one_server(HEADS)
        except CinemeshError as error:
            answer = str(error)
    mesh.close()
    return answer


def test_a_group_on_two_servers_is_refused_with_its_ranks(pool: Pool) -> None:
    assert pool.run(4, refusal_on_two_servers, "tp:cp:dp_shard:dp_replicate") == [""] * 4
    for rank, message in enumerate(pool.run(4, refusal_on_two_servers, "cp:tp:dp_shard:dp_replicate")):
        assert f"ranks {rank % 2}, {rank % 2 + 2} of one tp group lie on 2 servers (node0, node1)" in message
        assert "put tp first in order" in message


# -- torch's pipeline -------------------------------------------------------------------------------------------------


def _gather_as_documented(
    shard: Tensor, consume: Callable[[Tensor, int], None], gathered: Tensor, name: str, needed: bool = True
) -> None:
    """What torch says that ``_pipelined_all_gather_and_consume`` does, own rows first, on gloo."""
    group = _resolve_process_group(GroupName(name))
    dist.all_gather_single(gathered, shard, group=group)
    shards = gathered.chunk(group.size())
    for step in range(group.size()):
        rank = (group.rank() + step) % group.size()
        consume(shard if step == 0 else shards[rank], rank)


def _all_to_all_as_documented(produce: Callable[[int, Tensor], None], output: Tensor, name: str) -> None:
    """What torch says that ``_pipelined_produce_and_all2all`` does, on gloo."""
    group = _resolve_process_group(GroupName(name))
    chunks = torch.full_like(output, torch.nan)
    for step in range(1, group.size() + 1):
        rank = (group.rank() + step) % group.size()
        produce(rank, chunks.chunk(group.size())[rank])
    dist.all_to_all_single(output, chunks, group=group)


def by_torch(ranks: int) -> list[float]:
    """Largest errors of the calls that CUDA makes, with torch's pipeline replaced by what its documentation says."""
    with (
        mock.patch.object(symmetric, "_pipelined_all_gather_and_consume", _gather_as_documented),
        mock.patch.object(symmetric, "_pipelined_produce_and_all2all", _all_to_all_as_documented),
    ):
        return errors_of(ranks)


def errors_of(ranks: int) -> list[float]:
    mesh = Mesh(Plan(tp=ranks, fused_tp=True, dtype="float64"))
    comm = Communicator(mesh)
    comm.record = True
    generator = torch.Generator().manual_seed(mesh.rank)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    x, whole = drawn(T // ranks, B, D), torch.empty(T, B, D, dtype=torch.float64)
    kv, up = drawn(D, 2, 3, F), drawn(D, F)
    ykv, yup = torch.empty(T, B, 2, 3, F, dtype=torch.float64), torch.empty(T, B, F, dtype=torch.float64)
    products = [product_of("tbi,ichk->tbchk", whole, kv, ykv), product_of("tbi,if->tbf", whole, up, yup)]
    before = comm.bind("all_gather", HEADS, x, torch.empty_like(whole), None)
    assert (work := before.issue()) is not None
    comm.bind_gather_products(HEADS, x, whole, products)()
    assert work.is_completed(), "a collective over the same group comes first"
    before.wait()
    wanted = torch.empty_like(whole)
    dist.all_gather_single(wanted, x)
    differences = [
        whole - wanted,
        ykv - torch.einsum("tbi,ichk->tbchk", wanted, kv),
        yup - torch.einsum("tbi,if->tbf", wanted, up),
    ]
    y, weight, term = drawn(T, B, 3, F), drawn(D, 3, F), drawn(T, B, D)
    partial, received = torch.empty(T, B, D, dtype=torch.float64), torch.empty(T, B, D, dtype=torch.float64)
    for added in (None, term):
        out = torch.empty(T // ranks, B, D, dtype=torch.float64)
        matrices = product_of("tbhk,ihk->tbi", y, weight, partial)
        comm.bind_product_scatter(HEADS, matrices, added, received, out)()
        total = torch.einsum("tbhk,ihk->tbi", y, weight) + (0 if added is None else added)
        dist.all_reduce(total)
        differences.append(out - total.chunk(ranks)[mesh.rank])
    size = T * B * D * 8
    assert comm.ledger == [Entry(kind, "tp", "tp", size) for kind in ("all_gather", "reduce_scatter") for _ in range(2)]
    mesh.close()
    return [float(difference.abs().max()) for difference in differences]


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_the_calls_for_torch_mean_the_same(pool: Pool, ranks: int) -> None:
    """Only the calls: torch's own pipeline needs two GPUs (below). Rows, weights, sums and their order are ours."""
    for errors in pool.run(ranks, by_torch, ranks):
        assert max(errors) < 1e-12


def test_a_torch_without_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(symmetric, "_pipelined_produce_and_all2all")
    comm = Communicator.__new__(Communicator)
    with pytest.raises(
        CinemeshError, match=r"torch 2\.\S+ has no _pipelined_produce_and_all2all, .* fused_tp to false"
    ):
        comm.symmetric_memory(HEADS, 8)


# -- on GPUs ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    set_up_nccl()
    store = dist.FileStore(str(tmp_path / "store"), 1)  # pyright: ignore[reportPrivateImportUsage]
    dist.init_process_group("nccl", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def steps_of(text: str, device: str, rank: int, store: str) -> list[float]:
    """Losses and gradient norms of one process: two steps from the executor, two replayed."""
    ranks = (plan := Plan.parse(text)).world_size
    if device == "cuda":
        torch.cuda.set_device(rank)
        device = f"cuda:{rank}"
        set_up_nccl()
    backend = "gloo" if device == "cpu" else "nccl"
    dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=ranks)
    case, mesh = small_case(plan), Mesh(plan)
    runner = StepRunner(case.config, plan, case.batch, OPTIMIZER, mesh, seed=case.seed, device=device)
    runner.initialise(weights.probe_values(case.seed))
    found: list[float] = []
    for step in range(4):
        if step == 2:
            runner.capture("required")
        load_batch(case, runner, step)
        runner.step(1e-2)
        found += [float(runner.loss), float(runner.gradient_norm)]
    runner.close()
    mesh.close()
    dist.destroy_process_group()
    return found


def run_processes(text: str, device: str, folder: Path) -> list[float]:
    """:func:`steps_of` on processes of its own, which no other test has touched."""
    code = "import json, sys; sys.path[:0] = {!r}; from test_fuse_tp import steps_of; print(json.dumps(steps_of({})))"
    here = Path(__file__).parent
    running: list[subprocess.Popen[str]] = []
    for rank in range(Plan.parse(text).world_size):
        arguments = f"{text!r}, {device!r}, {rank}, {str(folder / 'store')!r}"
        line = [sys.executable, "-c", code.format([str(here), str(here.parents[1])], arguments)]
        running.append(subprocess.Popen(line, stdout=subprocess.PIPE, text=True))
    answers = [process.communicate(timeout=300)[0] for process in running]
    assert [process.returncode for process in running] == [0] * len(running)
    return json.loads(answers[0].splitlines()[-1])


@pytest.mark.parametrize(
    ("device", "ranks"),
    [
        pytest.param("cpu", 2, marks=pytest.mark.slow),
        pytest.param("cuda", 2, marks=pytest.mark.gpu),
        pytest.param("cuda", 4, marks=pytest.mark.gpu),
    ],
)
def test_fused_steps_are_the_plain_ones(device: str, ranks: int, tmp_path: Path) -> None:
    """Bitwise on gloo, which runs the parts; torch's pipeline adds the ranks' products in another order than NCCL."""
    if device == "cuda" and torch.cuda.device_count() < ranks:
        pytest.skip(f"needs {ranks} GPUs of one server")
    found: list[list[float]] = []
    for fused in ("true", "false"):
        (folder := tmp_path / fused).mkdir()
        found.append(run_processes(f"tp={ranks},fused_tp={fused},recompute=full,dtype=float32", device, folder))
    assert len(found[0]) == 8 and len(set(found[0])) == 8
    assert found[0] == (found[1] if device == "cpu" else pytest.approx(found[1], rel=1e-4))


@pytest.mark.gpu
@pytest.mark.usefixtures("alone")
def test_torchs_pipeline_over_one_rank() -> None:
    """Symmetric memory of a group of one, and a capture of it: what one GPU can show."""
    mesh = Mesh(Plan())
    group = dist.new_group([0], backend="nccl", group_desc="tp")
    assert isinstance(group, dist.ProcessGroup)
    mesh._groups["tp"] = group
    comm = Communicator(mesh)
    assert comm.symmetric_memory(HEADS, T * B * D * 8).numel() == T * B * D * 8
    x, weight = torch.randn(T, B, D, device="cuda"), torch.randn(D, D, device="cuda")
    whole, y, received, out = (torch.empty_like(x) for _ in range(4))
    gather = comm.bind_gather_products(HEADS, x, whole, [product_of("tbi,if->tbf", whole, weight, y)])
    scatter = comm.bind_product_scatter(HEADS, product_of("tbi,if->tbf", y, weight, received), x, received, out)

    def both() -> None:
        gather()
        scatter()

    both()
    torch.cuda.synchronize()
    wanted = x + (x @ weight) @ weight
    torch.testing.assert_close(out, wanted, rtol=1e-4, atol=1e-4)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        both()
    out.zero_()
    graph.replay()
    torch.testing.assert_close(out, wanted, rtol=1e-4, atol=1e-4)
    del graph
    mesh.close()
