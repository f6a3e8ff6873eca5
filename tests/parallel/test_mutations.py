"""Mutation tests of a two-layer step: what the typed build refuses, and that parity catches what typing cannot see.

Every collective in turn is dropped, doubled or moved, every sum loses a term; the build must refuse. Doubled terms,
swapped operands and wrong scales build well: there the numbers must differ from the autograd model's. Only this tells
how much the typing is worth, and that no record of the step is one that nothing depends on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor

from cinemesh.kernels.ops import OPS
from cinemesh.kernels.reference import Kernel
from cinemesh.kernels.registry import kernels_for
from cinemesh.launch.proof.bounds import FLOAT64_BOUND, QUANTITIES, worst_of
from cinemesh.launch.proof.parity import OPTIMIZER, run_rank
from cinemesh.launch.proof.verify import small_case
from cinemesh.model.runner import StepRunner
from cinemesh.model.step import build_step
from cinemesh.parallel.ir.builder import Builder
from cinemesh.parallel.ir.collectives import COLLECTIVES
from cinemesh.parallel.ir.layout import FSDP, REPLICATED_AXES, WORLD, Axes, PlacementError
from cinemesh.parallel.ir.plan import Plan
from cinemesh.parallel.ir.program import Program
from cinemesh.parallel.ir.records import Buffer, Op
from cinemesh.parallel.ir.records import Collective as Sent
from cinemesh.parallel.passes.pipeline import prepare

ONE_RANK = small_case(Plan(micro_batches=2, dtype="float64"), steps=2)
# Typing must not lean on a degree of 1, nor on one above it.
PLANS = {
    "degrees above 1": Plan(tp=2, cp=2, dp_shard=2, dp_replicate=2, micro_batches=2, dtype="float64"),
    "degree 1": ONE_RANK.plan,
    "chunks": Plan(tp=2, cp=2, dp_shard=2, kv_chunks=3, micro_batches=2, dtype="float64"),
    "slices": Plan(tp=2, cp=2, dp_shard=2, kv_slices=3, tp_slices=3, dtype="float64"),
}
AXES: tuple[Axes, ...] = (("tp",), ("cp",), ("dp_shard",), ("dp_replicate",), FSDP, REPLICATED_AXES, WORLD)

# Refused with anything else, a mutation would only have tripped over an accident of the builder.
REFUSAL = PlacementError


def build(plan: Plan) -> Program:
    return build_step(ONE_RANK.config, plan, ONE_RANK.batch, OPTIMIZER, seed=ONE_RANK.seed)


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_the_step_as_it_is_builds(plan: Plan) -> None:
    """Else every mutation would be "refused"."""
    assert not is_refused(plan)


def is_refused(plan: Plan) -> bool:
    try:
        build(plan)
    except REFUSAL:
        return True
    return False


# -- collectives ------------------------------------------------------------------------------------------------------

Collective = Callable[..., Buffer]
Mutate = Callable[[Collective, Builder, str, Buffer, Axes, int, str, dict[str, Any]], Buffer]


def drop(issue: Collective, b: Builder, kind: str, x: Buffer, axes: Axes, dim: int, name: str, more: Any) -> Buffer:
    return x


def double(issue: Collective, b: Builder, kind: str, x: Buffer, axes: Axes, dim: int, name: str, more: Any) -> Buffer:
    once = issue(b, kind, x, axes, dim, name, **more)
    return issue(b, kind, once, axes, dim, f"{name}.again")


def moved_to(kind: str | None = None, axes: Axes | None = None, dim: int | None = None) -> Mutate:
    def mutate(issue: Collective, b: Builder, k: str, x: Buffer, a: Axes, d: int, name: str, more: Any) -> Buffer:
        return issue(b, kind or k, x, axes or a, d if dim is None else dim, name, **more)

    return mutate


def mutations(op: Op, dims: int) -> Iterator[tuple[str, Mutate]]:
    yield "dropped", drop
    yield "doubled", double
    for axes in AXES:
        if axes != op.axes:
            yield f"over {axes}", moved_to(axes=axes)
    for kind in COLLECTIVES:
        if kind != op.kind:
            yield f"as {kind}", moved_to(kind=kind)
    if op.kind != "all_reduce":  # which has no dim
        assert isinstance(op.comm, Sent)
        for dim in range(dims):
            if dim != op.comm.dim:
                yield f"of dim {dim}", moved_to(dim=dim)


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_mutated_collectives_are_refused(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    genuine = Builder.collective
    program = build(plan)
    collectives = [op for op in program.ops if op.kind in COLLECTIVES]
    assert len(collectives) > 60
    tried, survivors = 0, []
    for target, op in enumerate(collectives):
        for what, mutate in mutations(op, len(program.buffers[op.inputs[0]].shape)):
            count = iter(range(len(collectives) + 1))

            def collective(  # noqa: PLR0913  stands in for Builder.collective
                b: Builder,
                kind: str,
                x: Buffer,
                axes: Axes,
                dim: int,
                name: str,
                *,
                count: Iterator[int] = count,
                target: int = target,
                mutate: Mutate = mutate,
                **more: Any,
            ) -> Buffer:
                if next(count) == target:
                    return mutate(genuine, b, kind, x, axes, dim, name, more)
                return genuine(b, kind, x, axes, dim, name, **more)

            monkeypatch.setattr(Builder, "collective", collective)
            refused = is_refused(plan)
            assert next(count) > target, "the mutated collective was never reached"
            tried += 1
            if not refused:
                survivors.append(f"{op.name} {what}")
    print(f"{tried - len(survivors)} of {tried} refused; survivors: {survivors}")
    assert tried > 600
    assert survivors == []


# -- terms of sums ----------------------------------------------------------------------------------------------------


def count_calls(method: str, plan: Plan, wanted: Callable[..., bool], monkeypatch: pytest.MonkeyPatch) -> int:
    genuine, calls = getattr(Builder, method), 0

    def spy(b: Builder, *args: Any, **more: Any) -> Any:
        nonlocal calls
        calls += wanted(*args, **more)
        return genuine(b, *args, **more)

    with monkeypatch.context() as patch:
        patch.setattr(Builder, method, spy)
        build(plan)
    return calls


def survivors_of(
    method: str,
    plan: Plan,
    wanted: Callable[..., bool],
    mutate: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> tuple[int, list[int]]:
    """How many calls of a builder's method qualify, and which of them can be mutated without a refusal."""
    calls = count_calls(method, plan, wanted, monkeypatch)
    genuine = getattr(Builder, method)
    survivors = []
    for target in range(calls):
        seen = -1

        def mutated(b: Builder, *args: Any, target: int = target, **more: Any) -> Any:
            nonlocal seen
            seen += wanted(*args, **more)
            if seen == target and wanted(*args, **more):
                return mutate(genuine, b, *args, **more)
            return genuine(b, *args, **more)

        with monkeypatch.context() as patch:
            patch.setattr(Builder, method, mutated)
            if not is_refused(plan):
                survivors.append(target)
    return calls, survivors


def adds(*args: Any, add_to: Buffer | None = None, **more: Any) -> bool:
    return add_to is not None


def without_the_sum_so_far(genuine: Callable[..., Any], b: Builder, *args: Any, add_to: Buffer, **more: Any) -> Any:
    if args[0] == "add":  # has no form without it
        return genuine(b, "copy", *args[1:], signature="tbd->tbd", **more)
    return genuine(b, *args, **more)


def without_the_new_term(genuine: Callable[..., Any], b: Builder, *args: Any, add_to: Buffer, **more: Any) -> Any:
    """The sum so far, as if this record had never been written; its other outputs are still made."""
    spec = OPS[args[0]]
    if len(spec.signature.split("->")[1].split(",")) > 1 if spec.signature else False:
        made = genuine(b, *args, **more)
        b._unread.discard(made[0].name)
        return (add_to, *made[1:])
    return (add_to,)


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("mutate", [without_the_sum_so_far, without_the_new_term], ids=lambda f: f.__name__)
def test_a_sum_that_lost_a_term_is_refused(
    plan: Plan, mutate: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, survivors = survivors_of("op", plan, adds, mutate, monkeypatch)
    assert calls > 20
    assert survivors == []


def anything(*args: Any, **more: Any) -> bool:
    return True


def renamed_without_a_contribution(
    genuine: Callable[..., Any], b: Builder, gradient: Buffer, of: Op, names: dict[str, int]
) -> Any:
    return tuple(gradient for _ in names)


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_a_missing_pass_through_is_refused(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, survivors = survivors_of("pass_through", plan, anything, renamed_without_a_contribution, monkeypatch)
    assert calls > 8
    assert survivors == []


def test_a_branch_that_backward_forgot_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The residual stream alone, without what comes back through cross-attention: shapes and placements all fit."""
    genuine = Builder.op

    def forgetful(b: Builder, kind: str, inputs: Any, names: Any, **more: Any) -> Any:
        if kind == "add":
            return (more["add_to"],)
        return genuine(b, kind, inputs, names, **more)

    monkeypatch.setattr(Builder, "op", forgetful)
    with pytest.raises(PlacementError, match=r"not the whole gradient of .*missing uses"):
        build(ONE_RANK.plan)


# -- what typing cannot see: parity must ------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def program() -> Program:
    return prepare(build(ONE_RANK.plan), backend="gloo")


def errors(changed: Program | None = None, kernels: dict[str, Kernel] | None = None) -> dict[str, float]:
    runner = StepRunner(
        ONE_RANK.config,
        ONE_RANK.plan,
        ONE_RANK.batch,
        OPTIMIZER,
        None,
        seed=ONE_RANK.seed,
        program=changed or program(),
        kernels=kernels,
    )
    return worst_of(ONE_RANK, [run_rank(ONE_RANK, None, runner, watched=False)])[0].error


def is_seen(changed: Program | None = None, kernels: dict[str, Kernel] | None = None) -> bool:
    found = errors(changed, kernels)
    return any(not found[what] <= 10 * FLOAT64_BOUND for what in QUANTITIES)


def test_nothing_is_seen_where_nothing_is_wrong() -> None:
    assert max(errors().values()) < FLOAT64_BOUND / 100


def with_op(i: int, *ops: Op) -> Program:
    whole = program()
    return whole.with_ops([*whole.ops[:i], *ops, *whole.ops[i + 1 :]])


@pytest.mark.slow
def test_doubled_terms_are_seen() -> None:
    """Every record that adds onto a sum runs twice."""
    unseen, tried = [], 0
    for i, op in enumerate(program().ops):
        if op.kind in OPS and len(op.inputs) > len(program().label_signature(op).inputs):
            tried += 1
            if not is_seen(with_op(i, op, op)):
                unseen.append(op.name)
    assert tried > 30
    assert unseen == []


SWAPPED_INPUTS = {  # operands of one shape that are easily confused
    "modulate_norm": (2, 3),  # scale, shift
    "swiglu": (0, 1),  # gate, up
    "swiglu_backward": (1, 2),
    "attention_backward": (0, 3),  # do, o
    "gated_residual": (0, 1),  # x, y
    "gated_residual_backward": (0, 1),
    "interpolate": (0, 1),  # x1, x0
    "adamw": (1, 3),  # exp_avg, ema
}
SWAPPED_OUTPUTS = {"swiglu_backward": (0, 1), "modulate_norm_backward": (2, 3), "interpolate": (0, 1)}


def swapped(names: tuple[str, ...], pair: tuple[int, int]) -> tuple[str, ...]:
    swapped = list(names)
    swapped[pair[0]], swapped[pair[1]] = swapped[pair[1]], swapped[pair[0]]
    return tuple(swapped)


@pytest.mark.slow
def test_swapped_operands_are_seen() -> None:
    unseen, tried = [], 0
    for i, op in enumerate(program().ops):
        for table, side in ((SWAPPED_INPUTS, "inputs"), (SWAPPED_OUTPUTS, "outputs")):
            if op.kind in table:
                tried += 1
                changed = replace(op, **{side: swapped(getattr(op, side), table[op.kind])})
                if not is_seen(with_op(i, changed)):
                    unseen.append(f"{op.name}: {side}")
    assert tried > 60
    assert unseen == []


@pytest.mark.parametrize(
    "kinds",
    [("attention", "attention_backward"), ("cross_attention", "cross_attention_backward")],
    ids=lambda kinds: kinds[0],
)
def test_k_and_v_swapped_are_seen(kinds: tuple[str, str]) -> None:
    """In forward and backward alike, so that only the result can tell."""
    genuine = kernels_for("cpu")

    def forward(inputs: list[Tensor], outputs: list[Tensor]) -> None:
        genuine[kinds[0]]([inputs[0], inputs[1].flip(2), *inputs[2:]], outputs)

    def backward(inputs: list[Tensor], outputs: list[Tensor]) -> None:
        dkv = torch.empty_like(outputs[1])
        genuine[kinds[1]]([*inputs[:2], inputs[2].flip(2), *inputs[3:]], [outputs[0], dkv])
        outputs[1].copy_(dkv.flip(2))

    assert is_seen(kernels=genuine | {kinds[0]: forward, kinds[1]: backward})


@pytest.mark.slow
def test_wrong_scales_are_seen() -> None:
    """Every float output of every kind of op, 0.1 % too large. In-place outputs are left to the doubled terms."""
    genuine = kernels_for("cpu")
    used = {op.kind: op for op in program().ops if op.kind in OPS}
    read = {name for op in program().ops for name in op.inputs}
    unseen, tried = [], 0
    for kind, op in used.items():
        if kind in ("copy", "cast", "zero_gaps"):  # of what other kinds made: gaps hold no parameter
            continue
        for index, name in enumerate(op.outputs):
            if not program().buffers[name].dtype.startswith("float"):
                continue
            records = [other for other in program().ops if other.kind == kind]
            if index in OPS[kind].statistics and not any(other.outputs[index] in read for other in records):
                continue  # backward makes it again, by records of another kind

            def scaled(inputs: Any, outputs: Any, *, kind: str = kind, index: int = index, **attrs: Any) -> None:
                genuine[kind](inputs, outputs, **attrs)
                outputs[index].mul_(1.001)

            tried += 1
            if not is_seen(kernels=genuine | {kind: scaled}):
                unseen.append(f"{kind} output {index}")
    print(f"{tried} scales; unseen: {unseen}")
    assert tried > 40
    assert unseen == []


def test_the_step_has_two_layers_and_two_micro_batches() -> None:
    """Sums over layers and over micro-batches only exist then."""
    assert (ONE_RANK.config.layers, ONE_RANK.plan.micro_batches) == (2, 2)
