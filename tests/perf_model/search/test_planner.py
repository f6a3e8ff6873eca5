"""The planner: the best plan is brute force's, refusals carry their number, knobs and resources act the right way."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cinemesh.errors import CinemeshError
from cinemesh.model.config import ModelConfig, preset
from cinemesh.model.inputs import BatchShape
from cinemesh.perf_model.clusters.cluster import load
from cinemesh.perf_model.prices.encoders import LoopEncoders
from cinemesh.perf_model.prices.played import play_step
from cinemesh.perf_model.published.paper import STAGES
from cinemesh.perf_model.report.explain import sample_flops, why_lost
from cinemesh.perf_model.search.planner import search, survey
from cinemesh.perf_model.search.refusals import FamilyKey, Refusal, RefusalKind
from cinemesh.perf_model.search.request import LatentBucket, Request
from cinemesh.perf_model.search.tune import tune

CLUSTER = load("grand-teton-h100")
BIG = preset("movie-gen-30b")
MIDDLE = preset("movie-gen-5b")


def ask(**changes: object) -> Request:
    base = Request(config=BIG, buckets=(LatentBucket((32, 96, 96)),), cluster=CLUSTER, gpus=6144, shown=3)
    return replace(base, **changes)  # type: ignore[arg-type]


SMALLER = [
    ask(config=MIDDLE, buckets=(LatentBucket((16, 24, 44)),), gpus=16),
    ask(config=MIDDLE, buckets=(LatentBucket((16, 24, 44)),), gpus=8, global_batch=8),
    ask(config=MIDDLE, buckets=(LatentBucket((16, 24, 44), 0.7), LatentBucket((8, 24, 44), 0.3)), gpus=8, samples=2),
    ask(gpus=64, buckets=(LatentBucket((16, 96, 96)),), fixed={"tp": 4}),
]


@pytest.mark.parametrize("request_", SMALLER, ids=["5b-16", "5b-8-batch", "5b-buckets", "30b-64"])
def test_pruning_finds_the_plan_of_brute_force(request_: Request) -> None:
    pruned, brute = search(request_), search(replace(request_, prune=False))
    assert pruned.best.plan == brute.best.plan
    assert pruned.best.step_s == brute.best.step_s
    assert [c.plan for c in pruned.choices] == [c.plan for c in brute.choices]
    assert pruned.played < brute.played


ODD = replace(MIDDLE, name="odd", layers=9, heads=15, width=1920, ffn=4608 + 384)  # two ranks share no heads


@settings(max_examples=6, deadline=None)
@given(
    st.sampled_from((ODD, replace(ODD, heads=9, width=1152), replace(ODD, ffn=4605, heads=16, width=2048))),
    st.sampled_from(((4, 32, 32), (3, 18, 10), (1, 6, 6), (5, 14, 30))),
    st.sampled_from((6, 8, 9, 15, 16)),
    st.sampled_from(({}, {"tp_slices": 3}, {"grad_units": 1, "prefetch": 0})),
)
def test_models_that_two_ranks_do_not_divide_are_planned(
    config: ModelConfig, latent: tuple[int, int, int], gpus: int, fixed: dict[str, object]
) -> None:
    """What serves many plans must not stand on degrees that this model forbids: tp=2 of 15 heads, cp=2 of 9 tokens."""
    asked = ask(config=config, buckets=(LatentBucket(latent),), gpus=gpus, fixed=fixed)
    pruned, brute = survey(asked), survey(replace(asked, prune=False))
    assert [c.plan for c in pruned.choices] == [c.plan for c in brute.choices]
    if not fixed:
        assert pruned.choices  # data parallel alone always divides


@pytest.mark.parametrize(
    ("fixed", "rule"),
    [({"tp": 5}, r"gpus\(64\) % tp\(5\) = 4"), ({"tp": 4, "cp": 3}, r"gpus\(64\) % \(tp\(4\) \* cp\(3\) = 12\) = 4")],
)
def test_fixed_degrees_that_do_not_divide_the_gpus_break_a_rule(fixed: dict[str, object], rule: str) -> None:
    with pytest.raises(CinemeshError, match=rule + "; fix degrees whose product divides the GPUs"):
        search(ask(gpus=64, fixed=fixed))


def test_a_recompute_that_is_fixed_is_what_does_not_fit() -> None:
    """Full recompute would fit: the remedy is to free it, not other GPUs."""
    with pytest.raises(CinemeshError) as caught:
        search(ask(gpus=64, fixed={"tp": 1, "cp": 4, "recompute": "none"}))
    assert "with recompute=none, which is fixed" in caught.value.problem
    assert caught.value.remedy == "free recompute: the planner chooses what to keep"
    assert search(ask(gpus=64, fixed={"tp": 1, "cp": 4})).best.plan.recompute != "none"


def test_an_offload_that_is_fixed_stands_where_it_can() -> None:
    """Host memory keeps families out, each with its numbers; what is kept must be fixed with what of it goes."""
    fixed = {"recompute": "selective", "offload": ("gate", "up"), "tp": 2}
    request = ask(gpus=64, buckets=(LatentBucket((16, 96, 96)),), fixed=fixed)
    found = search(request)
    assert found.best.plan.offload == ("gate", "up")
    small = search(replace(request, cluster=request.cluster.with_(**{"host.memory_bytes": 20e9})))
    refused = {refusal.family.cp: refusal for refusal in small.refused if refusal.kind is RefusalKind.HOST}
    assert refused and max(refused) < small.best.plan.cp
    assert all("GB a GPU into host memory" in refusal.reason for refusal in refused.values())
    with pytest.raises(CinemeshError, match="offload is fixed, and recompute is not"):
        search(replace(request, fixed={"offload": ("gate",)}))


def test_numbers_of_refusals_read_as_what_they_are() -> None:
    family = FamilyKey(1, 1)
    slow = Refusal(RefusalKind.SLOWER, family, slower=239.324, at_least=True)
    assert slow.reason == "takes at least 240.3 times as long for a sample as the last plan shown"
    assert "12.5% slower" in Refusal(RefusalKind.SLOWER, family, slower=0.125).reason
    big = Refusal(RefusalKind.MEMORY, family, needs_bytes=89e9, free_bytes=80e9, fixed="none", full_bytes=23.4e9)
    assert "89.0 GB with recompute=none, which is fixed, 23.4 GB with full recompute; 80.0 GB are free" in big.reason
    assert "even with full recompute" in Refusal(RefusalKind.MEMORY, family, needs_bytes=89e9, free_bytes=80e9).reason


@pytest.mark.slow
def test_pruning_finds_the_plan_of_brute_force_at_6144_gpus() -> None:
    pruned, brute = search(ask()), search(ask(prune=False))
    assert pruned.best.plan == brute.best.plan
    assert pruned.best.step_s == brute.best.step_s


def test_planning_6144_gpus_loads_no_torch_and_fits_in_200_mb() -> None:
    """Peak resident size of the whole command, as the kernel counts it; torch alone would take more."""
    script = (
        "import sys; sys.argv = ['cinemesh', 'plan', '--gpus', '6144', '--json']\n"
        "from cinemesh.launch import cli\n"
        "try: cli.main()\n"
        "except SystemExit: pass\n"
        "peak = next(line for line in open('/proc/self/status') if line.startswith('VmHWM'))\n"
        "print(peak.split()[1], 'torch' in sys.modules, file=sys.stderr)"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    resident, torch = ran.stderr.split()
    assert torch == "False"
    assert int(resident) * 1024 <= 200e6
    found = json.loads(ran.stdout)
    assert found["predicted"] is True
    assert found["plans"][0]["plan"]["dtype"] == "bf16"


def test_derived_flops_agree_with_the_papers_shapes() -> None:
    """10.23 PFLOP forward and 30.7 PFLOP a step and sample at 73,728 tokens: 48 layers of 6144, from Table 1."""
    assert sample_flops(BIG, (32, 96, 96)) == pytest.approx(30.7e15, rel=0.005)


@pytest.mark.parametrize("stage", STAGES, ids=lambda s: f"tp{s.tp}cp{s.cp}x{s.gpus}-{s.samples}")
def test_the_papers_own_plans_are_feasible(stage: object) -> None:
    """Table 3: every stage's degrees fit with the recompute that they need, and give the paper's global batch."""
    found = search(
        ask(
            buckets=(LatentBucket(stage.latent),),  # type: ignore[attr-defined]
            gpus=stage.gpus,  # type: ignore[attr-defined]
            samples=stage.samples,  # type: ignore[attr-defined]
            fixed=stage.fixed,  # type: ignore[attr-defined]
        )
    )
    assert found.best.global_batch == stage.global_batch  # type: ignore[attr-defined]
    assert found.best.peak_bytes <= CLUSTER.memory.usable_bytes


@settings(max_examples=3, deadline=None)
@given(st.sampled_from((4, 8, 12)), st.floats(1.0, 4.0), st.floats(1.0, 2.0))
def test_more_resources_never_hurt(gpus: int, faster: float, more: float) -> None:
    """More bandwidth never slows the best plan, more memory never removes one.

    A percent of slack: a collective that ends sooner lets the next one start sooner and share its link elsewhere.
    """
    request = ask(config=MIDDLE, buckets=(LatentBucket((16, 24, 44)),), gpus=gpus, shown=40)
    base = search(request)
    wide = search(replace(request, cluster=CLUSTER.with_(nic_scale=faster, nvlink_scale=faster)))
    assert wide.best.samples_per_s >= base.best.samples_per_s * 0.99
    roomy = search(replace(request, cluster=CLUSTER.with_(memory_bytes=CLUSTER.gpu.memory_bytes * more)))
    assert {c.family for c in base.choices} <= {c.family for c in roomy.choices}
    assert roomy.best.samples_per_s >= base.best.samples_per_s * (1 - 1e-9)


def test_tuning_only_shortens_the_step_and_still_fits() -> None:
    request = ask(shown=1, config=replace(BIG, layers=12), fixed={"tp": 4, "cp": 3})
    best = search(request).best
    tuned = tune(request, best)
    assert tuned.step_s < best.step_s
    assert tuned.plan.tp_slices > 1 or tuned.plan.kv_slices > 1
    assert tuned.peak_bytes <= CLUSTER.memory.usable_bytes


def test_encoders_in_the_loop_take_memory_and_time() -> None:
    fixed = {"tp": 4, "cp": 2}
    plain, loop = search(ask(fixed=fixed)), search(ask(fixed=fixed, encoders=LoopEncoders.of_paper(BIG)))
    assert loop.best.frozen is not None
    assert loop.best.step_s > plain.best.step_s
    assert loop.best.samples_per_s < plain.best.samples_per_s


def test_the_runner_up_lost_by_what_its_terms_say() -> None:
    found = search(ask(gpus=96))
    first, second = (play_step(BIG, c.plan, BatchShape(1, (32, 96, 96)), CLUSTER) for c in found.choices[:2])
    lines = why_lost(first, second)
    shares = [float(line.rpartition("(")[2].partition("%")[0]) for line in lines]
    assert sum(shares) == pytest.approx(100.0, abs=2.0)  # rounded to whole percents, small terms left out


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"gpus": 1}, "GPUs fit"),
        ({"fixed": {"tp": 4, "cp": 5}}, "product divides the GPUs"),
        ({"buckets": (LatentBucket((64, 96, 96)),)}, "positions"),
        ({"global_batch": 7, "fixed": {"tp": 4, "cp": 2}}, "no plan"),
    ],
)
def test_what_cannot_be_planned_is_one_message(changes: dict[str, object], says: str) -> None:
    with pytest.raises(CinemeshError, match=says):
        search(ask(**changes))
