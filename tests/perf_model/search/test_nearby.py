"""Other batches and fewer GPUs are shown where they are better: against a search for every one of them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cinemesh.errors import CinemeshError
from cinemesh.model.config import preset
from cinemesh.perf_model.clusters.cluster import load
from cinemesh.perf_model.search.dealing import MOST_MICRO_BATCHES, TOO_MANY
from cinemesh.perf_model.search.nearby import SERVERS
from cinemesh.perf_model.search.planner import NEAR, nearby, search, survey
from cinemesh.perf_model.search.refusals import RefusalKind
from cinemesh.perf_model.search.request import LatentBucket, Request

CLUSTER = load("grand-teton-h100")
BIG = preset("movie-gen-30b")
SMALL = replace(BIG, layers=3)
REQUEST = Request(SMALL, (LatentBucket((4, 32, 32)),), CLUSTER, 12, fixed={"recompute": "selective"}, shown=1)


def rate(request: Request) -> float:
    return search(request).best.samples_per_s


def test_the_batch_that_splits_is_shown_with_its_gain() -> None:
    """9 samples are 9 micro-batches of all ranks together, 8 are one on each: one table does not tell."""
    asked = replace(REQUEST, gpus=8, global_batch=9)
    [other] = nearby(asked, search(asked))
    assert (other.gpus, other.best.global_batch) == (8, 8)
    assert other.gain == pytest.approx(rate(replace(asked, global_batch=8)) / rate(asked) - 1.0) and other.gain > NEAR


def test_a_batch_that_no_plan_has_gets_one_close_by() -> None:
    with pytest.raises(CinemeshError, match="or 12 GPUs and a global batch of 12 would do, with tp="):
        search(replace(REQUEST, global_batch=13))


def test_more_micro_batches_than_a_step_is_written_out_for_are_taken_by_hand_alone() -> None:
    """67 samples on one data rank are one micro-batch or 67: the first does not fit, and the other has a reason."""
    degrees = {"tp": 2, "cp": 4}
    asked = replace(REQUEST, gpus=8, global_batch=67, cluster=CLUSTER.with_(memory_bytes=13.5e9))
    asked = replace(asked, fixed=asked.fixed | degrees)
    assert MOST_MICRO_BATCHES < 67
    with pytest.raises(CinemeshError) as refused:
        search(asked)
    assert f"micro_batches(67) > {MOST_MICRO_BATCHES}: {TOO_MANY}" in refused.value.problem
    assert "8 GPUs and a global batch of 64 would do" in str(refused.value.remedy)
    assert search(replace(asked, fixed=asked.fixed | {"micro_batches": 67})).best.plan.micro_batches == 67
    too_many = [r for r in survey(replace(asked, global_batch=192)).refused if r.kind is RefusalKind.MICRO_BATCHES]
    assert {r.family.micro_batches for r in too_many} == {96}, "of each tp and cp the first one, where it may fit"


def test_fewer_gpus_are_shown_where_they_do_more() -> None:
    """1,025 are slower than 1,024: a table for one number of GPUs never says so."""
    asked = replace(REQUEST, config=BIG, fixed={}, buckets=(LatentBucket((32, 96, 96)),), gpus=1025)
    others = nearby(asked, search(asked))
    assert others and others[0].gpus == 1024
    assert others[0].gain == pytest.approx(rate(replace(asked, gpus=1024)) / rate(asked) - 1.0)
    for other in others:
        assert other.gpus % CLUSTER.gpus_per_server == 0 and asked.gpus - other.gpus <= 8 * SERVERS
        assert other.gain > NEAR


@pytest.mark.parametrize("batch", [None, 12])
def test_what_splits_well_has_nobody_beside_it(batch: int | None) -> None:
    asked = replace(REQUEST, global_batch=batch)
    assert nearby(asked, search(asked)) == []
