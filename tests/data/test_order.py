"""The bucket of a step and the samples it takes: drawn as written, each sample once an epoch, nothing but the step."""

from collections import Counter
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
import torch
from harness import Pool

from cinemesh.data.cache import Sample, collate
from cinemesh.data.order import (
    BUCKET_PURPOSE,
    GROUP,
    ORDER_PURPOSE,
    SHIFT_PURPOSE,
    Stream,
    balanced,
    drawn_buckets,
    samples_of_a_read,
)
from cinemesh.model.inputs import IDS, PLACES


def philox_word(seed: int, purpose: int, step: int) -> int:
    """Word 0 of Philox 4x32-10 at counter (0, 0, step, purpose), in Python's integers."""
    c, key = [0, 0, step, purpose], [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(b >> 32) ^ c[1] ^ key[0], b & 0xFFFFFFFF, (a >> 32) ^ c[3] ^ key[1], a & 0xFFFFFFFF]
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c[0]


@pytest.mark.parametrize(("seed", "weights"), [(0, [1.0, 2.0]), (5, [0.5, 0.1, 0.4]), (1 << 40, [3.0, 3.0, 1.0])])
def test_the_bucket_of_a_step_is_where_its_number_falls_among_the_shares(seed: int, weights: list[float]) -> None:
    buckets = drawn_buckets(seed, 40, weights)
    borders = np.cumsum(weights) / np.sum(weights)
    numbers = [(philox_word(seed, BUCKET_PURPOSE, step) + 0.5) / 2**32 for step in range(40)]
    assert buckets.tolist() == [int(np.sum(number >= borders)) for number in numbers]


def test_the_first_buckets_of_a_run_stay_what_they_are() -> None:
    """Another draw would send a resumed run other samples."""
    assert drawn_buckets(0, 12, [1.0, 2.0]).tolist() == [1, 1, 1, 1, 1, 1, 0, 1, 0, 1, 1, 0]


def test_a_run_that_was_planned_shorter_goes_on_as_one_planned_longer() -> None:
    buckets = drawn_buckets(3, 200, [1.0, 2.0, 0.5])
    assert torch.equal(drawn_buckets(3, 60, [1.0, 2.0, 0.5]), buckets[:60]) and len(set(buckets.tolist())) == 3
    assert not drawn_buckets(3, 50, [0.3]).any()


def test_buckets_get_their_shares_of_the_steps() -> None:
    """Six binomial standard deviations, sqrt(n p (1 - p)): at most 210 of 6000 steps."""
    steps, weights = 6000, [3.0, 1.0, 2.0]
    counts = Counter(drawn_buckets(11, steps, weights).tolist())
    for bucket, weight in enumerate(weights):
        p = weight / sum(weights)
        assert abs(counts[bucket] - steps * p) < 6 * (steps * p * (1 - p)) ** 0.5


def drawn_here() -> list[int]:
    return drawn_buckets(9, 300, [0.1, 0.7, 0.2]).tolist()


def test_every_rank_draws_the_same(pool: Pool) -> None:
    here = drawn_here()
    assert pool.run(4, drawn_here) == [here] * 4


@pytest.mark.parametrize("count", [1, 6, 10, 75])
def test_every_epoch_holds_every_sample_once(count: int) -> None:
    """Batches larger than an epoch and ones that do not divide it included."""
    stream = Stream(5, 0, range(10))
    ids = [index for start in range(0, 30 * count, count) for index in stream.take(start, count)]
    epochs = [tuple(ids[i : i + 10]) for i in range(0, len(ids) - 9, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len(set(epochs)) == len(epochs)  # epochs differ (10! orders)


def test_the_order_is_of_the_stream_not_of_its_cutting() -> None:
    """Larger batches, or starting at a later step, meet the same samples."""
    whole = Stream(7, 0, range(11)).take(0, 72)
    assert [index for start in range(0, 72, 6) for index in Stream(7, 0, range(11)).take(start, 6)] == whole
    assert Stream(7, 0, range(11)).take(30, 42) == whole[30:]  # what a resumed process sees
    assert Stream(8, 0, range(11)).take(0, 72) != whole
    assert Stream(7, 1, range(11)).take(0, 72) != whole  # buckets of one size do not walk in step
    assert Stream(0, 0, range(8)).take(0, 8) == [4, 7, 3, 5, 2, 1, 0, 6]
    assert Stream(0, 0, "abcdefgh").take(0, 8) == list("ehdfcbag")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("size", [1, 2, 63, 64, 65, 127, 128, 129, 1000])
@pytest.mark.parametrize("block", [1, 2, 3, 7, 100])
def test_an_epoch_of_any_size_and_block_is_a_bijection(size: int, block: int) -> None:
    """Sizes about powers of two, where the network's halves change; the last block and the last group are short."""
    stream = Stream(5, 2, range(size), block)
    for epoch in range(3):
        assert sorted(stream.take(epoch * size, size)) == list(range(size))


def test_samples_of_a_few_blocks_are_mixed_and_read_together() -> None:
    """A reader of any part of an epoch needs GROUP blocks and the next GROUP, whatever the number of blocks."""
    size, block = 40_000, 16
    stream = Stream(1, 0, range(size), block)
    (shift,) = {(index % block) for index in boundaries(stream, size, block)}
    group = GROUP * block
    for start in range(0, size - group, group):
        taken = stream.take(start, group)
        blocks = {(index - shift) % size // block for index in taken}
        assert len(blocks) == GROUP
        assert sum(b - a == 1 for a, b in pairwise(taken)) < group // 50  # neighbours of a block come apart
        assert sum(b + 1 in blocks for b in blocks) < GROUP // 4  # and so do neighbouring blocks
        assert taken != sorted(taken)


def boundaries(stream: Stream, size: int, block: int) -> list[int]:
    """Where blocks of the first epoch begin: the first sample of each run of the samples of its first group."""
    found = sorted(stream.take(0, GROUP * block))
    return [
        index
        for before, index in zip([-2, *found], found, strict=False)
        if index != before + 1 and index + block - 1 in found
    ]


def test_the_place_of_a_sample_in_a_hundred_million_is_found_without_a_table() -> None:
    """Against the network in plain integers, for one place far inside; a table of them would take gigabytes."""
    size, block, place = 10**8 + 7, 128, 31_415_926
    group = GROUP * block
    assert Stream(6, 1, range(size), block).take(2 * size + place, 1) == [
        plain_index(6, 1, size, block, 2, place, group)
    ]


def plain_index(seed: int, bucket: int, size: int, block: int, epoch: int, place: int, group: int) -> int:
    def words(purpose: int, at: int, block_word: int) -> list[int]:
        c, key = [block_word, bucket, epoch, purpose + 256 * at], [seed & 0xFFFFFFFF, seed >> 32]
        for _ in range(10):
            a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
            c = [(b >> 32) ^ c[1] ^ key[0], b & 0xFFFFFFFF, (a >> 32) ^ c[3] ^ key[1], a & 0xFFFFFFFF]
            key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
        return c

    def permuted(which: int, value: int, count: int) -> int:
        half = next(h for h in range(1, 40) if 4**h >= count)
        while True:
            left, right = divmod(value, 2**half)
            for number in range(8):
                left, right = right, left ^ (words(ORDER_PURPOSE, 8 * which + number, right)[0] % 2**half)
            value = left * 2**half + right
            if value < count:
                return value

    number = place // group
    slot, offset = divmod(permuted(number + 1, place % group, min(group, size - number * group)), block)
    slot += number * GROUP
    blocks = size // block
    first, second, *_ = words(SHIFT_PURPOSE, 0, 0)
    shift = (first * 2**30 + second // 4) % size
    return ((permuted(0, slot, blocks) if slot < blocks else slot) * block + offset + shift) % size


@pytest.mark.parametrize("ranks", [(1, 2, 4, 3), (4, 3, 2, 1)])
def test_another_number_of_data_ranks_meets_the_same_global_batches(ranks: tuple[int, ...]) -> None:
    """A run that goes on with more ranks, or with fewer: the shares of all ranks together are the one batch."""
    samples = [sample_of(number) for number in range(50)]
    stream, size = Stream(2, 0, range(50), 3), 12
    for step, count in enumerate(ranks):
        chosen = [samples[index] for index in stream.take(step * size, size)]
        shares = [collate(chosen, rank, count) for rank in range(count)]
        assert torch.cat([share[IDS] for share in shares]).tolist() == stream.take(step * size, size)
        assert torch.cat([share[PLACES] for share in shares]).tolist() == list(range(size))


def sample_of(number: int) -> Sample:
    zero = torch.zeros(1)
    return Sample(number, "a", 0, "", zero.view(1, 1, 1, 1), {"e": zero.view(1, 1)}, {"e": zero.bool()}, Fraction(24))


def test_each_place_of_an_epoch_gets_every_sample_equally() -> None:
    """Of 800 epochs of 5 each pair (place, sample) expects 160; six binomial std are 68."""
    ids = Stream(3, 0, range(5)).take(0, 800 * 5)
    counts = Counter((place % 5, index) for place, index in enumerate(ids))
    assert len(counts) == 25
    assert all(abs(count - 160) < 68 for count in counts.values())


def test_balance_repeats_the_samples_of_short_scenes_evenly() -> None:
    scenes = ["a"] * 4 + ["b"] * 2 + ["c"]
    assert balanced(scenes, 0) == list(range(7))
    assert Counter(balanced(scenes, 1)) == {0: 1, 1: 1, 2: 1, 3: 1, 4: 2, 5: 2, 6: 4}
    half = Counter(scenes[index] for index in balanced(scenes, 0.5))
    assert half == {"a": 4, "b": 3, "c": 2}  # 4 * sqrt(2/4) = 2.83, 4 * sqrt(1/4) = 2
    for balance in (0.1, 0.7):
        assert set(balanced(scenes, balance)) == set(range(7))  # no sample is left out


def test_a_block_is_of_four_megabytes_at_least() -> None:
    assert [samples_of_a_read(size) for size in (32 * 2**10, 2**22, 2**22 + 1, 3 * 2**20)] == [128, 1, 1, 2]
