"""Other batches and fewer GPUs are shown where they are better: against a search for every one of them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cinemesh.errors import CinemeshError
from cinemesh.model.config import preset
from cinemesh.perf_model.clusters.cluster import load
from cinemesh.perf_model.search.nearby import SERVERS
from cinemesh.perf_model.search.planner import NEAR, nearby, search
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
