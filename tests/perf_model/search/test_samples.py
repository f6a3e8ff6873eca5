"""How many samples a data rank takes where nobody says: against a whole search for every number of them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cinemesh.errors import CinemeshError
from cinemesh.model.config import preset
from cinemesh.model.inputs import BatchShape
from cinemesh.parallel.ir.flops import model_flops
from cinemesh.perf_model.clusters.cluster import load
from cinemesh.perf_model.prices.models import PriceModels
from cinemesh.perf_model.prices.played import play_step
from cinemesh.perf_model.report.explain import mean_sample_flops, mfu_of
from cinemesh.perf_model.search import samples as rule
from cinemesh.perf_model.search.evaluator import Evaluator
from cinemesh.perf_model.search.planner import search, survey
from cinemesh.perf_model.search.request import LatentBucket, Request, buckets_of_batches
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


# -- a mixture --------------------------------------------------------------------------------------------------------

VIDEO, IMAGE = LatentBucket((32, 96, 96), 0.7), LatentBucket((1, 96, 96), 0.3)
MIXTURE = replace(LONG, buckets=(IMAGE, VIDEO))


def test_each_bucket_of_a_mixture_has_samples_that_fill_its_own_step() -> None:
    """Against whole plays of the chosen plan with every number of images; many make a third more than one."""
    request, found, tried = search_samples(MIXTURE)
    image, video = request.batches(request.samples)
    assert (image.latent, video.latent, video.samples) == (IMAGE.latent, VIDEO.latent, 1)
    plan, alone = found.best.plan, Evaluator(replace(MIXTURE, buckets=(IMAGE,)))
    rates: dict[int, float] = {}
    for n in (2**k for k in range(9)):
        (step,) = alone.play(plan, n)
        if step.footprint.peak_bytes > step.footprint.limit_bytes:
            break
        rates[n] = n / step.step_s
    best = max(rates.values())
    assert rates[image.samples] >= best / (1.0 + WITHIN) * 0.995 > 1.3 * rates[1]
    assert all(rate < best / (1.0 + WITHIN) * 1.005 for n, rate in rates.items() if n < image.samples)
    images = [one.samples for one in tried if one.latent == "1x96x96"]
    assert images == [2**k for k in range(len(images))] and image.samples in images
    assert found.best.peak_bytes <= CLUSTER.memory.usable_bytes


def test_steps_and_samples_of_a_mixture_are_those_of_its_buckets() -> None:
    """By whole plays: a mean over the wrong samples would rank nothing wrong, and print a wrong rate."""
    buckets, batch = buckets_of_batches([IMAGE.latent, VIDEO.latent], [3, 1], [96, 16])
    assert batch == 16 and [bucket.times for bucket in buckets] == [6, 1]
    request = replace(LONG, buckets=buckets, global_batch=batch, fixed=LONG.fixed | {"tp": 4, "cp": 2})
    best = search(request).best
    plan = best.plan
    steps = [
        play_step(BIG, plan, BatchShape(plan.local_batch(n), bucket.latent), PriceModels.of(CLUSTER), graphs=2)
        for n, bucket in zip((96, 16), buckets, strict=True)
    ]
    assert best.bucket_s == pytest.approx([step.step_s for step in steps], rel=1e-3)
    assert best.step_s == pytest.approx((3 * best.bucket_s[0] + best.bucket_s[1]) / 4)
    assert best.samples_per_s == pytest.approx((3 * 96 + 16) / 4 / best.step_s)
    assert best.peak_bytes == max(step.footprint.peak_bytes for step in steps)
    flops = 3 * model_flops(steps[0].program) + model_flops(steps[1].program)
    could = 4 * best.step_s * 16 * CLUSTER.gpu.peak_flops["bfloat16"]
    assert mfu_of(request, best, mean_sample_flops(request)) == pytest.approx(flops / could)


def test_batches_without_a_common_divisor_are_dealt_one_by_one() -> None:
    buckets, batch = buckets_of_batches([IMAGE.latent, VIDEO.latent], [1, 1], [9, 4])
    assert batch == 1 and [bucket.times for bucket in buckets] == [9, 4]
