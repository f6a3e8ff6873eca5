"""What a step sends, against closed forms written down here from the model's shapes alone.

The program's own numbers are compared with what ran in every parity test; that both are what the split of the backbone
implies is seen only here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction

import pytest

from cinemesh.launch.proof.verify import small_case
from cinemesh.model.config import USUAL_LATENTS, ModelConfig, preset
from cinemesh.model.inputs import BatchShape
from cinemesh.model.step import build_step, unit_layout
from cinemesh.parallel.ir.collectives import COLLECTIVES
from cinemesh.parallel.ir.plan import Plan
from cinemesh.parallel.ir.program import Program
from cinemesh.parallel.ir.records import Op, Phase
from cinemesh.parallel.passes.pipeline import prepare
from cinemesh.parallel.runtime.ledger import Entry, by_lane, difference, expected

BYTES = {"bf16": 2, "float32": 4, "float64": 8}
STAT_BYTES = {"bf16": 4, "float32": 4, "float64": 8}


def sent(program: Program, wanted: Callable[[Op], bool]) -> dict[str, Fraction]:
    """Bytes that one rank sends, by lane: payload * (n - 1) / n, twice that for an all-reduce."""
    totals: dict[str, Fraction] = {}
    for op in program.ops:
        if op.kind in COLLECTIVES and wanted(op):
            ranks = program.plan.size(op.axes)
            rounds = 2 if op.kind == "all_reduce" else 1
            bytes_sent = Fraction(program.payload_bytes(op) * (ranks - 1) * rounds, ranks)
            assert program.wire_bytes(op) == pytest.approx(float(bytes_sent))
            totals[op.lane] = totals.get(op.lane, Fraction(0)) + bytes_sent
    return totals


def sent_by_block(program: Program, layer: int, part: str) -> dict[str, Fraction]:
    """Of one block's forward or backward; what backward makes again counts with it."""

    def wanted(op: Op) -> bool:
        backward = op.clone or op.place.phase is Phase.BACKWARD
        return op.place.block == layer and backward == (part == "backward")

    return sent(program, wanted)


def block_forms(config: ModelConfig, plan: Plan, batch: BatchShape) -> dict[str, dict[str, Fraction]]:
    """Bytes sent by one rank for one block that is neither the first nor the last: forward and backward, by lane.

    B samples of one data rank, S tokens, D width, e bytes of the compute dtype, g of the statistics dtype.

    Forward. tp: every one of self-attention, cross-attention and FFN gathers its input [S/cp, B, D] over tp and
    reduce-scatters its output: 6 collectives of payload x = B S/cp D e. cp: K and V together, [S, B, 2, D/tp]: one
    gather of payload k = 2 B S D/tp e. fsdp: the block's weights, P/tp elements padded to a multiple of the shards.

    Backward proper. The dual of every forward collective: 6 x over tp (gather dy where forward scattered, scatter dx
    where it gathered); one reduce-scatter of dK and dV over cp, k; one reduce-scatter of the unit's gradient over fsdp
    in the statistics dtype.

    Backward again, by what is kept. none: the weights' gather. selective: also the three gathers of inputs over tp
    (weight gradients read them whole) and K and V over cp; what the branches add to the stream is kept, so no scatter.
    full: also the three scatters, whose outputs the gates and the residual stream need.
    """
    plan_tp, plan_cp, shards = plan.tp, plan.cp, plan.dp_shard * plan.cp
    e, g = BYTES[plan.dtype], STAT_BYTES[plan.dtype]
    tokens, d = config.tokens(batch.latent), config.width
    x = Fraction(batch.samples * tokens * d * e * (plan_tp - 1), plan_cp * plan_tp)
    k = Fraction(2 * batch.samples * tokens * d * e * (plan_cp - 1), plan_tp * plan_cp)
    # q, k, v, o of two attentions, gate, up, down
    local = (8 * d * d + 3 * d * config.ffn) // plan_tp
    padded = -(-local // (shards * 128)) * shards * 128
    unit = Fraction(padded * (shards - 1), shards)
    gathers_again, scatters_again = {"none": (0, 0), "selective": (3, 0), "full": (3, 3)}[str(plan.recompute)]
    return {
        "forward": {"tp": 6 * x, "cp": k, "dp_shard*cp": unit * e},
        "backward": {
            "tp": (6 + gathers_again + scatters_again) * x,
            "cp": k * (2 if gathers_again else 1),
            "dp_shard*cp": unit * (e + g),
        },
    }


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize(
    "plan",
    [
        Plan(tp=2, cp=2, dp_shard=2, dtype="bf16"),
        Plan(tp=3, cp=2, dp_shard=1, dtype="float32"),
        Plan(tp=1, cp=3, dp_shard=5, dp_replicate=2, dtype="bf16"),
        Plan(tp=6, dtype="float64"),
        Plan(dp_shard=4, dtype="float32"),
    ],
    ids=lambda plan: f"{plan.equation()} {plan.dtype}",
)
def test_a_block_sends_what_the_closed_forms_say(plan: Plan, recompute: str) -> None:
    plan = replace(plan, recompute=recompute)
    case = small_case(plan, max_procs=plan.world_size)
    config = replace(case.config, layers=3)
    program = prepare(build_step(config, plan, case.batch), backend="nccl")
    forms = block_forms(config, plan, case.batch)
    for part, form in forms.items():
        assert sent_by_block(program, 1, part) == {lane: total for lane, total in form.items() if total}, part


# -- one dry rank of the 30B step at 6,144 ranks ----------------------------------------------------------------------

PLAN = Plan(tp=4, cp=2, dp_shard=768)
CONFIG = preset("movie-gen-30b")
LAYERS = 48
SHAPE = BatchShape(1, USUAL_LATENTS["movie-gen-30b"])


@pytest.fixture(scope="module")
def step() -> Program:
    assert PLAN.world_size == 6144
    return prepare(build_step(CONFIG, PLAN, SHAPE), backend="nccl")


def counts(entries: list[Entry]) -> Counter[tuple[str, int]]:
    return Counter((entry.kind, entry.payload_bytes) for entry in entries)


def test_the_30b_ledger_of_one_rank(step: Program) -> None:
    """Kind, axis and bytes of every collective, from the model's shapes: D 6144, F 16384, S 73,728, bf16."""
    lanes = by_lane(expected(step))
    assert set(lanes) == {"tp", "cp", "dp_shard*cp", "dp_shard*cp*tp", "dp_replicate*dp_shard*cp*tp"}
    mib = 1 << 20
    x = 73728 // 2 * 6144 * 2
    assert x == 432 * mib  # [S/cp, B, D] in bf16
    # A block: forward 3 gathers, 3 scatters; backward the same, and the 3 gathers again. Text: three projections,
    # all-reduced in both directions. Modulation: gathered once, its gradient scattered once, [6 D, B] in bf16.
    assert counts(lanes["tp"]) == Counter(
        {
            ("all_gather", x): LAYERS * (3 + 3 + 3),
            ("reduce_scatter", x): LAYERS * (3 + 3),
            ("all_reduce", 512 * 6144 * 2): 2,
            ("all_reduce", 256 * 6144 * 2): 2,
            ("all_reduce", 100 * 6144 * 2): 2,
            ("all_gather", 6 * 6144 * 2): 1,
            ("reduce_scatter", 6 * 6144 * 2): 1,
        }
    )
    # K and V of 12 heads: twice forward and again, once backward.
    kv = 73728 * 2 * (6144 // 4) * 2
    assert kv == 432 * mib
    assert counts(lanes["cp"]) == Counter({("all_gather", kv): 2 * LAYERS, ("reduce_scatter", kv): LAYERS})
    # A block's 603,979,776 weights over tp = 4, 1,536 shards of 98,304 elements each: no padding at all.
    block = 603_979_776 // 4
    assert block == 8 * 6144**2 // 4 + 3 * 6144 * 16384 // 4 == 1536 * 98_304
    conditioning = unit_layout(CONFIG, PLAN).by_name["conditioning"].elements
    assert 0 <= conditioning - (6 * 6144**2 + (4096 + 1280 + 1472) * 6144) // 4 < 1536 * 128
    assert counts(lanes["dp_shard*cp"]) == Counter(
        {
            ("all_gather", block * 2): 2 * LAYERS - 1,  # the last block's weights stay from forward to backward
            ("reduce_scatter", block * 4): LAYERS,
            ("all_gather", conditioning * 2): 2,
            ("reduce_scatter", conditioning * 4): 1,
        }
    )
    once = unit_layout(CONFIG, PLAN).by_name["replicated"].elements
    assert [(e.kind, e.payload_bytes) for e in lanes["dp_shard*cp*tp"]] == [
        ("all_gather", once * 2),
        ("reduce_scatter", once * 4),
        ("all_reduce", 4),  # sum of squares
    ]
    assert counts(lanes["dp_replicate*dp_shard*cp*tp"]) == Counter({("all_reduce", 4): 1})  # the loss


def test_the_30b_block_sends_what_the_closed_forms_say(step: Program) -> None:
    forms = block_forms(CONFIG, PLAN, SHAPE)
    for layer in (0, 20):
        assert {part: sent_by_block(step, layer, part) for part in forms} == forms


def test_micro_batches_reduce_each_block_and_gather_the_replicated_unit_once() -> None:
    case = small_case(Plan(tp=2, dp_shard=2, dp_replicate=2, micro_batches=3, dtype="float32"))
    lanes = by_lane(expected(prepare(build_step(case.config, case.plan, case.batch), backend="nccl")))
    kinds = {lane: Counter(entry.kind for entry in entries) for lane, entries in lanes.items()}
    assert kinds["dp_shard*cp"]["reduce_scatter"] == 3 * (2 + 1)  # blocks and conditioning
    assert kinds["dp_shard*cp*tp"] == Counter(all_gather=1, reduce_scatter=1, all_reduce=1)
    assert kinds["dp_replicate"] == Counter(all_reduce=1), "replicas are summed once a step"
    assert kinds["dp_replicate*dp_shard*cp*tp"] == Counter(all_reduce=1)


# -- the comparison ---------------------------------------------------------------------------------------------------

A, B, C = (Entry("all_gather", lane, lane, size) for lane, size in (("tp", 8), ("tp", 16), ("cp", 8)))


@pytest.mark.parametrize(
    ("ran", "planned", "said"),
    [
        ([A, C, B], [C, A, B], None),  # order counts within a lane only
        (
            [B, A],
            [A, B],
            "lane tp, collective 0: ran all_gather on tp, 16 B; the program has all_gather on tp, 8 B",
        ),
        ([A], [A, B], "lane tp: ran 1 collectives; the program has 2"),
        ([A, C], [A], "lane cp: ran 1 collectives; the program has 0"),
        ([replace(A, kind="all_reduce")], [A], "lane tp, collective 0: ran all_reduce"),
        ([replace(A, communicator="tp:other")], [A], "lane tp, collective 0: ran all_gather on tp:other, 8 B"),
    ],
)
def test_difference_names_the_first(ran: list[Entry], planned: list[Entry], said: str | None) -> None:
    found = difference(ran, planned)
    assert found == said if said is None else found is not None and found.startswith(said)
