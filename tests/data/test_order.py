"""The bucket of a step and the samples it takes: drawn as written, each sample once an epoch, nothing but the step."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from harness import Pool

from cinemesh.data.cache.samples import LATENT, Sample, collate
from cinemesh.data.order import (
    AT_ONCE,
    AT_ONCE_LEAST,
    BEGIN_PURPOSE,
    BUCKET_PURPOSE,
    ORDER_PURPOSE,
    Stream,
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
    stream = Stream(5, 0, 10, lanes=3)
    ids = [index for start in range(0, 30 * count, count) for index in stream.take(start, count)]
    epochs = [tuple(ids[i : i + 10]) for i in range(0, len(ids) - 9, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len(set(epochs)) == len(epochs)  # epochs differ (10! orders)


def test_the_order_is_of_the_stream_not_of_its_cutting() -> None:
    """Starting at a later step meets the same samples."""
    whole = Stream(7, 0, 11, 2, 3).take(0, 72)
    assert [index for start in range(0, 72, 6) for index in Stream(7, 0, 11, 2, 3).take(start, 6)] == whole
    assert Stream(7, 0, 11, 2, 3).take(30, 42) == whole[30:]  # what a resumed process sees
    for size, at_once in ((3001, AT_ONCE_LEAST), (7001, 7001), (40_001, AT_ONCE)):  # places that are computed together
        stream = Stream(7, 0, size, 5, 12)
        for border in (at_once, 3 * at_once):
            places = range(border - 9, border + 9)
            apart = [sample for place in places for sample in stream.samples(torch.tensor([place]))]
            assert stream.take(border - 9, 18) == apart
    assert Stream(8, 0, 11, 2, 3).take(0, 72) != whole
    assert Stream(7, 1, 11, 2, 3).take(0, 72) != whole  # buckets of one size do not walk in step
    assert Stream(7, 0, 11, 2, 3, first_epoch=2).take(0, 50) == whole[22:]
    assert Stream(0, 0, 8).take(0, 8) == FIRST


FIRST = [3, 0, 6, 1, 4, 7, 2, 5]


@pytest.mark.parametrize("size", [1, 2, 63, 64, 65, 127, 129, 1000])
@pytest.mark.parametrize("block", [1, 2, 7, 100])
@pytest.mark.parametrize("lanes", [1, 3, 64])
def test_an_epoch_of_any_size_block_and_lanes_is_a_bijection_that_is_undone(size: int, block: int, lanes: int) -> None:
    """Sizes about powers of two, where the network's halves change; the last block and the last group are short."""
    stream = Stream(5, 2, size, block, lanes, first_epoch=3)
    taken = stream.take(0, 3 * size)
    for epoch in range(3):
        assert sorted(taken[epoch * size : (epoch + 1) * size]) == list(range(size))
    for sample in {0, size // 3, size - 1}:
        places = [place for place, index in enumerate(taken) if index == sample]
        assert stream.places(sample, 3 * size) == places
        assert stream.places(sample, places[-1]) == places[:-1]


@pytest.mark.parametrize("ranks", [1, 3, 4, 12])
def test_a_rank_reads_whole_blocks_that_it_alone_needs(ranks: int) -> None:
    """Whatever their number: its lanes stay with their blocks until they have taken all of them."""
    size, block, lanes = 40_000, 16, 12
    stream = Stream(1, 0, size, block, lanes)
    share = lanes // ranks
    held: list[set[int]] = [set() for _ in range(ranks)]
    read = 0
    mixed = 0
    for turn in range(size // lanes):  # the first epoch
        taken = [index // block for index in stream.take(turn * lanes, lanes)]
        mixed += len(set(taken)) == lanes  # a sample each of as many blocks
        for rank in range(ranks):
            mine = {*taken[rank * share : (rank + 1) * share]}
            read += len(mine - held[rank])
            held[rank] = mine
    # Each once, but where an epoch wraps, where its last blocks are fewer than lanes, where a batch is of two groups.
    assert read <= 1.1 * size / block + 2 * lanes * block
    assert mixed > size // lanes - 3 * block


def test_samples_of_a_block_and_blocks_are_mixed() -> None:
    size, block, lanes = 40_000, 16, 12
    taken = Stream(1, 0, size, block, lanes).take(0, size)
    assert sum(b - a == 1 for a, b in pairwise(taken)) < size // 1000
    lane = taken[: block * lanes * 20 : lanes]
    assert sum(b - a == 1 for a, b in pairwise(lane)) < len(lane) // 6  # within a block: 1 in 16 by chance
    blocks = [index // block for index in taken[:lanes]]
    assert blocks != sorted(blocks) and max(blocks) - min(blocks) > size // block // 3


def test_the_place_of_a_sample_in_a_hundred_million_is_found_without_a_table() -> None:
    """Against the network in plain integers, for one place far inside; a table of them would take gigabytes."""
    size, block, lanes, place = 10**8 + 7, 128, 1536, 31_415_926
    taken = Stream(6, 1, size, block, lanes).take(2 * size + place, 1)
    assert taken == [plain_index(6, 1, size, block, lanes, 2, place)]


def plain_index(seed: int, bucket: int, size: int, block: int, lanes: int, epoch: int, place: int) -> int:
    def words(purpose: int, sample: int, block_word: int, at: int) -> list[int]:
        c, key = [block_word, sample, epoch, purpose + 256 * at], [seed & 0xFFFFFFFF, seed >> 32]
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
                left, right = right, left ^ (words(ORDER_PURPOSE, which, right, 8 * bucket + number)[0] % 2**half)
            value = left * 2**half + right
            if value < count:
                return value

    first, second, *_ = words(BEGIN_PURPOSE, bucket, 0, 0)
    place = (place + (first * 2**30 + second // 4) % size) % size
    group, within = divmod(place, lanes * block)
    assert (group + 1) * lanes <= size // block  # far from the end
    turn, lane = divmod(within, lanes)
    found = permuted(0, group * lanes + lane, size // block)
    return found * block + permuted(1 + found, turn, block)


@pytest.mark.parametrize("ranks", [(1, 2, 4, 3), (4, 3, 2, 1)])
def test_another_number_of_data_ranks_meets_the_same_global_batches(ranks: tuple[int, ...]) -> None:
    """A run that goes on with more ranks, or with fewer: the shares of all ranks together are the one batch."""
    samples = [sample_of(number) for number in range(50)]
    stream, size = Stream(2, 0, 50, 3, 12), 12
    for step, count in enumerate(ranks):
        chosen = [samples[index] for index in stream.take(step * size, size)]
        shares = [collate(chosen, rank, count) for rank in range(count)]
        assert torch.cat([share[IDS] for share in shares]).tolist() == stream.take(step * size, size)
        assert torch.cat([share[PLACES] for share in shares]).tolist() == list(range(size))


def sample_of(number: int) -> Sample:
    texts = {"e": (np.zeros((1, 1), np.float32), np.ones(1, np.bool_))}
    return Sample({"id": number}, {}, {LATENT: np.zeros((1, 1, 1, 1), np.float32)}, texts)


def test_each_place_of_an_epoch_gets_every_sample_equally() -> None:
    """Of 800 epochs of 5 each pair (place, sample) expects 160; six binomial std are 68."""
    ids = Stream(3, 0, 5).take(0, 800 * 5)
    counts = Counter((place % 5, index) for place, index in enumerate(ids))
    assert len(counts) == 25
    assert all(abs(count - 160) < 68 for count in counts.values())


def test_a_block_is_of_four_megabytes_at_least() -> None:
    assert [samples_of_a_read(size) for size in (32 * 2**10, 2**22, 2**22 + 1, 3 * 2**20)] == [128, 1, 1, 2]
