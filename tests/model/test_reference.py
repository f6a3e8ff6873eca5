"""Facts that the specification must meet on one device, each from a source other than our own code."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cinemesh.kernels.philox import Purpose, normal, normals, philox_words, uniform
from cinemesh.model import flow
from cinemesh.model.config import PRESETS, USUAL_LATENTS, ModelConfig, parameters
from cinemesh.model.inputs import IDS, LATENTS, MASK, PLACES, text_input
from cinemesh.model.reference import Reference, attention, patchify, rms_norm, time_features, training_loss, unpatchify

TINY = PRESETS["tiny"]
PLACE_0 = torch.tensor([0])


def noise(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


# --- layers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("patch", [(1, 2, 2), (2, 1, 3)])
def test_patchify_is_a_strided_convolution(patch: tuple[int, int, int]) -> None:
    latent, weight = noise(2, 3, 4, 6, 12), noise(5, 3, *patch, seed=1)
    tokens = patchify(latent, patch) @ weight.flatten(1).T  # [S, B, 5]
    expected = F.conv3d(latent, weight, stride=patch).flatten(2).permute(2, 0, 1)
    torch.testing.assert_close(tokens, expected, rtol=1e-12, atol=1e-12)


def test_unpatchify_inverts_patchify() -> None:
    latent, patch = noise(2, 4, 3, 4, 12), (1, 2, 2)
    assert torch.equal(unpatchify(patchify(latent, patch), 4, (3, 2, 6), patch), latent)


def test_attention_is_scaled_dot_product_attention() -> None:
    q, k, v = noise(7, 2, 3, 4), noise(5, 2, 3, 4, seed=1), noise(5, 2, 3, 4, seed=2)
    mask = torch.tensor([[True] * 5, [True, False, True, False, False]])
    for valid in (None, mask):
        expected = F.scaled_dot_product_attention(
            *(x.permute(1, 2, 0, 3) for x in (q, k, v)),
            attn_mask=None if valid is None else valid[:, None, None, :],
        )
        torch.testing.assert_close(attention(q, k, v, valid), expected.permute(2, 0, 1, 3))


def test_rms_norm_is_torchs() -> None:
    x, gain = noise(3, 2, 8), noise(8, seed=1)
    torch.testing.assert_close(rms_norm(x, gain, 1e-5), F.rms_norm(x, (8,), gain, 1e-5))


def test_time_features_are_those_of_dit() -> None:
    # DiT: cosines, then sines, of 1000 t * 10000**(-i / 128), i = 0..127
    features = time_features(torch.tensor([0.0, 0.25], dtype=torch.float64))
    assert features.shape == (2, 256)
    assert features[0].tolist() == [1.0] * 128 + [0.0] * 128
    assert features[1, 0].item() == pytest.approx(math.cos(250.0))
    assert features[1, 128 + 64].item() == pytest.approx(math.sin(250.0 / 100.0))


def test_padding_of_the_text_does_not_matter_and_video_tokens_do() -> None:
    model = filled(TINY)
    x, t, text = noise(2, 4, 3, 4, 12), torch.tensor([0.3, 0.8], dtype=torch.float64), captions()
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[:, 3:5] = False  # the MetaCLIP tokens
    given = {**text, MASK: mask}
    first = model(x, t, given)
    changed = {**given, text_input("metaclip"): text[text_input("metaclip")] + 1.0}
    assert torch.equal(model(x, t, changed), first)
    # Attention is not causal: the last video token reaches the first.
    moved = x.clone()
    moved[:, :, -1, -1, -1] += 1.0
    assert (model(moved, t, given) - first)[:, :, 0, 0, 0].abs().min() > 1e-9


def test_samples_do_not_mix() -> None:
    model, text = filled(TINY), captions()
    x, t, mask = noise(2, 4, 3, 4, 12), torch.tensor([0.3, 0.8]).double(), torch.ones(2, 7).bool()
    alone = model(x[1:], t[1:], {n: v[:, 1:] for n, v in text.items()} | {MASK: mask[1:]})
    torch.testing.assert_close(model(x, t, text | {MASK: mask})[1:], alone, rtol=1e-10, atol=1e-10)


def test_positions_are_added_in_every_block() -> None:
    # With zero gates and zero cross-attention a block is x + position: the stream ends as patches + layers * position.
    model = filled(TINY)
    weights = dict(model.named_parameters())
    with torch.no_grad():
        for name, weight in weights.items():
            if name == "adaln.weight" or (name.startswith("blocks.") and name.endswith(("table", "cross.o"))):
                weight.zero_()
    streams: list[Tensor] = []
    model.blocks[-1].register_forward_hook(lambda *arguments: streams.append(arguments[-1]))
    x = noise(1, 4, 3, 4, 12)
    model(x, torch.tensor([0.5]).double(), captions(1) | {MASK: torch.ones(1, 7).bool()})
    token = (2 * 2 + 1) * 6 + 3  # (t, h, w) = (2, 1, 3) of a 3 x 2 x 6 grid
    position = weights["position.t"][2] + weights["position.h"][1] + weights["position.w"][3]
    patch = x[0, :, 2, 2:4, 6:8].reshape(-1) @ weights["patchify.weight"]
    torch.testing.assert_close(streams[0][token, 0], patch + TINY.layers * position)


def filled(config: ModelConfig) -> Reference:
    """A float64 model with no zero parameter."""
    model = Reference(config).double()
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            parameter.copy_(0.2 * noise(*parameter.shape, seed=index))
    return model


def captions(samples: int = 2) -> dict[str, Tensor]:
    return {text_input(e.name): noise(e.tokens, samples, e.width, seed=9) for e in TINY.encoders}


# --- the flow path and the loss -------------------------------------------------------------------


def test_path_runs_from_noise_to_data() -> None:
    x1, x0 = noise(2, 3, 4), noise(2, 3, 4, seed=1)
    start, velocity = flow.interpolate(x1, x0, torch.zeros(2).double())
    end, _ = flow.interpolate(x1, x0, torch.ones(2).double())
    torch.testing.assert_close(start, x0, rtol=0, atol=0)
    torch.testing.assert_close(end, x1 + 1e-5 * x0, rtol=0, atol=1e-15)  # sigma_min of the noise stays
    torch.testing.assert_close(start + velocity, end, rtol=0, atol=1e-14)  # a straight line, walked in unit time


def test_each_sample_has_its_own_time() -> None:
    x1, x0 = noise(2, 3), noise(2, 3, seed=1)
    x_t, _ = flow.interpolate(x1, x0, torch.tensor([0.0, 1.0]).double())
    assert torch.equal(x_t[0], x0[0])
    assert (x_t[1] - x1[1]).abs().max() < 1e-4


def test_time_is_logit_normal() -> None:
    t = flow.draw_time(3, torch.tensor(0), torch.arange(20_000), PLACE_0)
    logits = torch.logit(t)
    # Standard errors at 20,000 draws: mean 0.007, variance 0.01; bounds are 5 of them.
    assert abs(logits.mean()) < 0.036
    assert abs(logits.var() - 1) < 0.05


def test_loss_of_a_silent_model_is_the_mean_square_velocity() -> None:
    # A zero head predicts 0, so the loss is the mean of V^2 over elements and samples.
    model = filled(TINY)
    with torch.no_grad():
        model.get_parameter("final.weight").zero_()
    latent, ids = noise(2, 4, 3, 4, 12), torch.tensor([5, 9])
    places = torch.tensor([0, 1])
    batch = captions() | {LATENTS: latent, IDS: ids, PLACES: places, MASK: torch.ones(2, 7).bool()}
    loss = training_loss(model, batch, seed=7, step=2)
    x0 = flow.draw_noise(7, torch.tensor(2), ids, places, (4, 3, 4, 12))
    assert loss.item() == pytest.approx((latent - (1 - 1e-5) * x0).square().mean().item(), rel=1e-12)


def test_dropped_caption_is_zeros_with_every_key_valid() -> None:
    text, mask = noise(3, 2, 4), torch.tensor([[True, True, False], [True, False, False]])
    dropped, valid = flow.drop_captions(text, mask, torch.tensor([True, False]))
    assert torch.equal(dropped[:, 0], text[:, 0])
    assert torch.equal(dropped[:, 1], torch.zeros(3, 4).double())
    assert valid.tolist() == [[True, True, False], [True, True, True]]


def test_with_every_caption_dropped_the_loss_ignores_the_text() -> None:
    model, latent, ids = filled(TINY), noise(2, 4, 3, 4, 12), torch.tensor([5, 9])
    mask = torch.zeros(2, 7).bool()  # not even an empty mask may leave a row without keys
    batch = {LATENTS: latent, IDS: ids, PLACES: torch.tensor([0, 1]), MASK: mask}
    first = training_loss(model, batch | captions(), 7, 0, 1.0)
    other = training_loss(model, batch | {n: v + 1 for n, v in captions().items()}, 7, 0, 1.0)
    assert first.isfinite()
    assert torch.equal(first, other)


def test_captions_are_dropped_at_the_given_rate() -> None:
    keep = flow.draw_keep_caption(3, torch.tensor(0), torch.arange(20_000), PLACE_0, 0.1)
    assert abs((~keep).double().mean().item() - 0.1) < 5 * math.sqrt(0.1 * 0.9 / 20_000)


# --- the parameter table --------------------------------------------------------------------------


def millions_by_part(name: str) -> dict[str, float]:
    parts: dict[str, float] = {}
    for row in parameters(PRESETS[name]):
        parts[row.part] = parts.get(row.part, 0.0) + row.elements / 1e6
    return parts


def test_parts_of_the_30b_model() -> None:
    parts = millions_by_part("movie-gen-30b")
    expected = {
        "self-attention": 48 * 150.995,  # 4 * 6144^2 a block
        "cross-attention": 48 * 150.995,  # 4 * 6144^2: keys and values come from text already 6144 wide
        "FFN": 48 * 301.990,  # 3 * 6144 * 16384
        "shared adaLN": 226.492,  # 6144 -> 6 * 6144
        "adaLN tables": 1.769,  # 48 * 6 * 6144
        "norm gains": 0.590,  # 48 * 2 * 6144
        "text projections": 42.111,  # (4096 + 1280 + 1472) * 6144, and 3 LayerNorms of 2 * 6144
        "time MLP": 39.322,  # 256 * 6144 + 6144^2
        "patchify": 0.393,  # 64 * 6144
        "final layer": 0.412,  # 64 * 6144 + a gain and a 2 x 6144 table
        "position tables": 1.376,  # (32 + 96 + 96) * 6144
    }
    assert parts == pytest.approx(expected, abs=6e-4 * 48)
    assert sum(parts.values()) == pytest.approx(29_303.5, abs=0.5)  # "30B"


def test_one_block_of_the_30b_model() -> None:
    block = [r for r in parameters(PRESETS["movie-gen-30b"]) if r.unit == "blocks.7"]
    assert sum(r.elements for r in block) == 603_979_776  # 8 * 6144^2 + 3 * 6144 * 16384
    assert all(r.tp_dim is not None for r in block)


def test_parameters_that_tp_replicates() -> None:
    rows = [r for r in parameters(PRESETS["movie-gen-30b"]) if r.tp_dim is None]
    # time MLP 39.32M, adaLN tables 1.77M, positions 1.38M, patchify and final 0.81M, gains 0.59M,
    # LayerNorms 0.04M
    assert sum(r.elements for r in rows) == pytest.approx(43.9e6, abs=0.05e6)
    assert {r.unit for r in rows} == {"replicated"}


def test_size_of_the_5b_model() -> None:
    # 32 blocks of 8 * 3072^2 + 3 * 3072 * 8192 = 150.99M, adaLN 56.6M, text 21.0M, time MLP 10.2M,
    # the rest 2.5M
    assert sum(millions_by_part("movie-gen-5b").values()) == pytest.approx(4_922, abs=1)


@pytest.mark.parametrize("name", ["tiny", "tiny-video"])
def test_model_and_table_name_the_same_parameters(name: str) -> None:
    model = Reference(PRESETS[name])
    table = {row.name: row.shape for row in parameters(PRESETS[name])}
    assert {n: tuple(p.shape) for n, p in model.named_parameters()} == table
    assert len(table) == len(parameters(PRESETS[name]))


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_table_is_in_the_order_that_units_rely_on(name: str) -> None:
    last: dict[str, bool] = {}
    for row in parameters(PRESETS[name]):
        assert last.get(row.unit, True) or not row.decay, f"{row.name} is decayed after one that is not"
        last[row.unit] = row.decay
    PRESETS[name].grid(USUAL_LATENTS[name])  # the usual latent of a preset fits its tables


# --- Philox ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # philox4x32-10 in Random123's kat_vectors
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter: tuple[int, ...], key: tuple[int, int], expected: tuple[int, ...]) -> None:
    block, sample, step = (torch.tensor(word) for word in counter[:3])
    purpose, place = counter[3] & 0xFF, torch.tensor(counter[3] >> 8)
    words = philox_words(key[0] | key[1] << 32, purpose, step, sample, block, place)
    assert tuple(word.item() for word in words) == expected


def test_normals_have_the_moments_of_normals() -> None:
    count = 100_000
    x = normal(1, Purpose.NOISE, torch.tensor(0), torch.tensor(0), torch.arange(count))
    # Standard errors: mean sqrt(1/n), variance sqrt(2/n), third moment sqrt(15/n), fourth
    # sqrt(96/n); 5 of each.
    for power, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(x.pow(power).mean().item() - mean) < 5 * math.sqrt(variance / count), power
    # The four elements of one counter, and neighbouring samples and steps, are uncorrelated.
    lanes = torch.corrcoef(x.view(-1, 4).T) - torch.eye(4)
    other = [
        normal(1, Purpose.NOISE, torch.tensor(step), torch.tensor(sample), torch.arange(count))
        for step, sample in ((0, 1), (1, 0))
    ]
    assert lanes.abs().max() < 5 / math.sqrt(count / 4)
    assert (torch.corrcoef(torch.stack([x, *other])) - torch.eye(3)).abs().max() < 5 / math.sqrt(count)


def test_uniforms_are_uniform() -> None:
    count = 100_000
    u = uniform(1, Purpose.CAPTION, torch.tensor(0), torch.tensor(0), torch.arange(count))
    assert u.min() > 0
    assert u.max() < 1
    # Kolmogorov-Smirnov: sqrt(n) * distance is above 2 once in 1500 trials.
    distance = (u.sort().values - torch.arange(count) / count).abs().max()
    assert distance * math.sqrt(count) < 2


def test_a_slice_is_drawn_without_the_rest() -> None:
    step, ids = torch.tensor(4), torch.tensor([11, 2**31 + 5])
    places = torch.tensor([6, 2])
    whole = flow.draw_noise(7, step, ids, places, (3, 2, 5))
    # elements 7..12 of the second sample, starting inside a block of four
    part = normal(7, Purpose.NOISE, step, ids[1], torch.arange(7, 13), places[1])
    assert torch.equal(part, whole[1].flatten()[7:13])
    assert torch.equal(flow.draw_noise(7, step, ids[1:], places[1:], (3, 2, 5)), whole[1:])


def test_the_normals_of_whole_blocks_are_those_of_their_elements() -> None:
    """Bit by bit; and a block may be drawn alone."""
    step, sample, place = (torch.tensor(word) for word in (3, 99, 7))
    blocks = torch.cat((torch.arange(5_000), torch.tensor([(1 << 34) + 1])))
    whole = normals(5, Purpose.NOISE, step, sample, blocks, place)
    element = 4 * blocks[:, None] + torch.arange(4)
    assert torch.equal(whole, normal(5, Purpose.NOISE, step, sample, element, place))
    assert torch.equal(normals(5, Purpose.NOISE, step, sample, blocks[4321:4322], place), whole[4321:4322])


def test_seed_step_sample_place_and_purpose_all_matter() -> None:
    def draw(seed: int, purpose: Purpose, *counters: int) -> float:
        step, sample, place = (torch.tensor(word) for word in counters)
        return normal(seed, purpose, step, sample, torch.tensor(0), place).item()

    words = itertools.product((0, 1), (0, 1), (0, 1, 1 << 23))
    draws = {draw(seed, purpose, *w) for w in words for seed in (0, 1, 1 << 32) for purpose in Purpose}
    assert len(draws) == 3 * len(Purpose) * 2 * 2 * 3
    with pytest.raises(AssertionError, match="purpose 256"):
        philox_words(0, 256, *[torch.tensor(0)] * 3)


# --- a sample that occurs twice in a step ---------------------------------------------------------

TWICE = torch.tensor([5, 5])


def test_a_sample_in_two_places_is_drawn_for_twice() -> None:
    """Time, noise and caption; what is drawn in no batch has place 0."""
    step, places = torch.tensor(4), torch.tensor([0, 3])
    t, x0 = flow.draw_time(7, step, TWICE, places), flow.draw_noise(7, step, TWICE, places, (4, 2, 4))
    assert t[0] != t[1] and not (x0[0] == x0[1]).any()
    assert t[0] == torch.sigmoid(normal(7, Purpose.TIME, step, TWICE[0], torch.tensor(0)))
    many = torch.arange(20_000)
    keep = flow.draw_keep_caption(7, step, torch.full_like(many, 5), many, 0.1)
    assert abs((~keep).double().mean().item() - 0.1) < 5 * math.sqrt(0.1 * 0.9 / 20_000)


def test_copies_of_a_sample_have_other_gradients_than_one() -> None:
    """Of two copies that were drawn for alike, the mean loss and its gradient are those of one, to the last digit."""
    model, latent, text = filled(TINY), noise(1, 4, 3, 4, 12), captions()
    one = {name: value[:, :1] for name, value in text.items()}
    one |= {LATENTS: latent, IDS: TWICE[:1], PLACES: PLACE_0, MASK: torch.ones(1, 7).bool()}
    two = {name: value.expand(-1, 2, -1) if name in text else torch.cat([value] * 2) for name, value in one.items()}

    def gradient(batch: dict[str, Tensor]) -> Tensor:
        model.zero_grad()
        training_loss(model, batch, 7, 0).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    alike, alone = gradient(two), gradient(one)
    torch.testing.assert_close(alike, alone, rtol=1e-12, atol=1e-12)  # in one place
    apart = gradient(two | {PLACES: torch.tensor([0, 1])})
    assert (apart - alone).norm() > 0.1 * alone.norm()
