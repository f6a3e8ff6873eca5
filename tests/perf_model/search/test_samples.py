"""How many samples a data rank takes where nobody says: against a whole search for every number of them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cinemesh.errors import CinemeshError
from cinemesh.model.config import preset
from cinemesh.perf_model.clusters.cluster import load
from cinemesh.perf_model.search import samples as rule
from cinemesh.perf_model.search.planner import search, survey
from cinemesh.perf_model.search.request import LatentBucket, Request
from cinemesh.perf_model.search.samples import WITHIN, search_samples

CLUSTER = load("grand-teton-h100")
BIG = replace(preset("movie-gen-30b"), layers=3)
SHORT = Request(BIG, (LatentBucket((4, 32, 32)),), CLUSTER, 16, fixed={"recompute": "none"}, shown=1)
LONG = Request(BIG, (LatentBucket((32, 96, 96)),), CLUSTER, 16, fixed={"recompute": "selective"}, shown=1)


@pytest.mark.parametrize("request_", [SHORT, LONG], ids=["short", "long"])
def test_the_fewest_within_two_percent_of_the_best(request_: Request) -> None:
    """A whole search for each number: degrees that suit one sample must not hide what others make of many."""
    rates: dict[int, float] = {}
    for n in (2**k for k in range(9)):
        choices = survey(replace(request_, samples=n, shown=1)).choices
        if not choices:
            break
        rates[n] = choices[0].samples_per_s
    chosen, found, tried = search_samples(request_)
    best = max(rates.values())
    assert rates[chosen.samples] >= best / (1.0 + WITHIN) * (1.0 - 0.005)
    assert all(rate < best / (1.0 + WITHIN) * 1.005 for n, rate in rates.items() if n < chosen.samples)
    assert found.best.samples == chosen.samples and found.best.samples_per_s == rates[chosen.samples]
    assert [one.samples for one in tried] == [2**k for k in range(len(tried))]


def test_more_slack_takes_fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = search_samples(SHORT)[0].samples
    monkeypatch.setattr(rule, "WITHIN", 0.5)
    assert 1 < search_samples(SHORT)[0].samples < taken


def test_where_one_sample_does_not_fit_nothing_does() -> None:
    with pytest.raises(CinemeshError) as one:
        search(replace(LONG, gpus=1))
    with pytest.raises(CinemeshError) as chosen:
        search_samples(replace(LONG, gpus=1))
    assert str(chosen.value) == str(one.value)
