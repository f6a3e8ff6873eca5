"""What software is taken to do where nobody described it: its day's kernels, by chip and by how the plan shards."""

import copy
import itertools
from dataclasses import replace
from typing import Any

import pytest

from cinemesh.perf_model.clusters.cluster import load
from cinemesh.perf_model.published import rows, stacks, validate
from cinemesh.perf_model.published.peer_step import Schedule
from cinemesh.perf_model.published.rows import case_of
from cinemesh.perf_model.published.stacks import default_stack, vintages

PUBLISHED = {row["id"]: row for row in rows.read(validate.ROWS)}
A100, H100 = "sm_80", "sm_90"


@pytest.mark.parametrize(
    ("day", "sharded", "device", "attention"),
    [
        ("2022-05-26", False, A100, "unfused"),
        ("2022-05-27", False, A100, "flash1"),
        ("2023-07-17", False, H100, "fa2"),
        ("2024-06-12", False, H100, "fa2"),
        ("2024-06-13", False, H100, "cudnn"),
        ("2024-06-13", False, A100, "fa2"),  # cuDNN's is preferred on Hopper alone
        ("2023-07-17", True, H100, "flash1"),  # PyTorch's own came half a year later
        ("2024-01-29", True, H100, "flash1"),
        ("2024-01-30", True, H100, "fa2"),
        (stacks.NOT_TOLD, True, H100, "fa2"),
        (stacks.NOT_TOLD, False, H100, "cudnn"),
        ("1999-01-01", True, A100, "unfused"),
    ],
)
def test_a_days_kernel(day: str, sharded: bool, device: str, attention: str) -> None:
    """The day before a release has the kernel before it. An order or a comparison turned round shows nowhere else."""
    assert default_stack(since=day, sharded=sharded, device=device).attention == attention


def test_vintages_come_one_after_the_other_and_their_kernels_have_prices() -> None:
    """The last that holds is taken: an entry out of order would never be, or hide a later one."""
    for sharded in (False, True):
        of = [v for v in vintages() if v.sharded == sharded]
        assert [v.since for v in of] == sorted({v.since for v in of})
        assert not of[0].since and not of[0].devices  # some entry holds for every row
    for name in ("dgx-a100-hdr200", "dgx-h100-ib400"):
        assert {v.stack.attention for v in vintages()} - {"unfused"} <= load(name).attention.keys()


def aged(name: str, day: str | None) -> dict[str, Any]:
    row = copy.deepcopy(PUBLISHED[name])
    row["source"]["date"] = day
    return row


@pytest.mark.parametrize("name", ["mosaic-a10080gb-7b-s32768-8g", "mosaic-h10080gb-7b-s32768-8g"])
def test_a_newer_default_is_faster(name: str) -> None:
    """Where attention is most of the step: each generation of kernels, by the prices of the row's own chip."""
    days = ("2022-01-01", "2023-06-01", "2024-06-01")
    times = [validate.Predictor().seconds(case_of(aged(name, day), described=False)) for day in days]
    assert times[0] > 1.3 * times[1] and times[1] > 1.3 * times[2]


def test_only_what_is_not_described_has_a_vintage() -> None:
    """A source's own description stands whatever its day; without a day a row runs what is newest."""
    name = "mosaic-h10080gb-7b-s2048-8g"
    old, new = (case_of(aged(name, day)).run for day in ("2020-01-01", "2025-06-01"))
    assert old == new and not old.stack.assumed
    unknown = case_of(aged(name, None), described=False).run.stack
    assert unknown.assumed and unknown.attention == "fa2"


def test_every_row_has_a_day_and_says_what_its_gradients_are() -> None:
    """Without its day a row of 2022 would be predicted with the kernels of today; fp32 sums are twice the bytes."""
    assert all(row["source"].get("date") for row in PUBLISHED.values())
    said = case_of(PUBLISHED["titan2412-8b-8g-eager"], described=False).run.stack
    assert said.reduce_bytes == 4
    assert case_of(PUBLISHED["mbridge2509-8b-h100-8g"], described=False).run.stack.reduce_bytes == 2


def test_the_first_flash_attention_is_as_much_slower_as_its_successor_says() -> None:
    """arXiv 2307.08691, 4.1: FlashAttention 2 is 1.3 to 1.5 times as fast as the first in Triton, backward twice."""
    for name in ("dgx-a100-hdr200", "dgx-h100-ib400"):
        first, second = load(name).attention["flash1"], load(name).attention["fa2"]
        for dim, speed in first.forward.speed.items():
            assert 1.3 < second.forward.speed[dim] / speed < 1.5
            assert second.backward.speed[dim] / first.backward.speed[dim] == pytest.approx(2.0, rel=0.01)


# -- context parallelism of PyTorch -----------------------------------------------------------------------------------


@pytest.mark.parametrize("passes", [True, False])
def test_torch_passes_the_gradients_of_keys_on_after_every_step(passes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """cp exchanges of one rank's dK and dV in fp32 where the other way has one reduction of all of them."""
    case = case_of(PUBLISHED["titan2412-8b-8g-cp8-seq256k"])
    assert case.run.stack.cp_passes_gradients
    run = case.run if passes else replace(case.run, stack=replace(case.run.stack, cp_passes_gradients=False))
    _, compute, network = validate.Predictor().prices(case.cluster, "sustained")
    blocks = Schedule(run, compute, network, case.cluster, 1)
    issued: list[tuple[str, float]] = []
    issue = blocks.r.issue
    monkeypatch.setattr(
        blocks.r, "issue", lambda kind, size, axis: (issued.append((kind, size)), issue(kind, size, axis))[1]
    )
    blocks.core("forward")
    local = 2 * run.tokens * run.model.heads * run.model.head_dim  # K and V, copied to all query heads
    assert issued == [("all_gather", 8 * local * 2)]
    issued.clear()
    blocks.core("backward")
    sums = [("send_recv", local * 4)] * 8 if passes else [("reduce_scatter", 8 * local * 4)]
    assert issued == [("all_gather", 8 * local * 2), *sums]


def test_training_metrics_read_all_logits_again() -> None:
    """Each casts them to fp32 and takes their log-softmax: 2 + 4 and 4 + 4 bytes a logit, in every micro-batch."""
    case = case_of(PUBLISHED["mosaic-h10080gb-1b-s2048-512g"])
    assert case.run.stack.metrics == 2
    _, compute, network = validate.Predictor().prices(case.cluster, "sustained")
    times = []
    for metrics in (0, 2):
        run = replace(case.run, stack=replace(case.run.stack, metrics=metrics))
        blocks = Schedule(run, compute, network, case.cluster, 1)
        blocks.head()
        times.append(blocks.r.compute_s)
    assert times[1] - times[0] == pytest.approx(2 * compute.stream_s(14 * 12 * 2048 * 50368))


def test_dropout_belongs_to_the_model() -> None:
    """Masks are written and kept whoever runs it: what is known of the software or not."""
    row = PUBLISHED["korth22-t4-22b-baseline-no-recompute"]
    plain = copy.deepcopy(row)
    plain["model"]["dropout"] = False
    for described, other in itertools.product((True, False), repeat=2):
        assert case_of(row, described=described).run.model == case_of(row, described=other).run.model
        times = [validate.Predictor().seconds(case_of(r, described=described)) for r in (plain, row)]
        assert times[0] < times[1]
