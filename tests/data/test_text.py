"""Text encoders: order and length of bytes, and real weights through transformers."""

import importlib.util
from pathlib import Path

import pytest
import torch
from text_models import minilm, save_with_byte_tokenizer
from torch import Tensor

from cinemesh.data.text import ByteEncoder, EncoderSettings, HuggingFaceEncoder, TextEncoder, build_encoders
from cinemesh.errors import CinemeshError

needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None,
    reason="needs the package transformers: pip install 'cinemesh[text]'",
)


def read_back(encoder: ByteEncoder, embeddings: Tensor, tokens: int) -> bytes:
    """The first ``tokens`` bytes: at each position the ASCII character of the nearest embedding."""
    out = bytearray()
    for index in range(tokens):
        here = [encoder.encode("a" * index + chr(c))[0][index] for c in range(128)]
        out.append(int((torch.stack(here) - embeddings[index]).abs().sum(1).argmin()))
    return bytes(out)


def test_a_byte_caption_can_be_read_back_from_its_embeddings() -> None:
    """No two bytes share a vector, and each stands at its own position."""
    encoder = ByteEncoder(12, 24)
    embeddings, mask = encoder.encode("A grey rabbit.")
    assert embeddings.shape == (24, 12) and embeddings.dtype == torch.float32
    assert mask.tolist() == [True] * 15 + [False] * 9
    assert embeddings[15:].abs().max() == 0
    assert read_back(encoder, embeddings, 14) == b"A grey rabbit."


def test_order_matters_even_to_a_reader_that_ignores_it() -> None:
    """Attention sees a set of keys: without position features these two sets are equal."""
    encoder = ByteEncoder(16, 8)
    ab, ba = (sorted(encoder.encode(text)[0].tolist()) for text in ("ab", "ba"))
    assert ab != ba


def test_utf8_truncation_and_the_empty_caption() -> None:
    encoder = ByteEncoder(8, 4)
    assert encoder.encode("é")[1].tolist() == [True, True, True, False]  # two bytes and the end
    long, mask = encoder.encode("abcdef")
    assert mask.all()
    assert torch.equal(long[:3], encoder.encode("abcxyz")[0][:3])
    assert torch.equal(long, encoder.encode("abc")[0])  # the end token stays
    assert encoder.encode("")[1].tolist() == [True, False, False, False]  # attention needs a key


def test_the_byte_table_is_the_same_on_every_machine() -> None:
    """A recorded digest: another table would silently spoil every earlier checkpoint."""
    encoder = ByteEncoder(64, 64)
    assert encoder.fingerprint == "utf8-64x64-2f8bd52a65ee34d1"
    assert encoder.fingerprint == ByteEncoder(64, 64).fingerprint
    assert len({ByteEncoder(w, t).fingerprint for w, t in ((64, 64), (64, 65), (65, 64))}) == 3
    vectors = ByteEncoder(255, 8)._table
    assert vectors.mean().abs() < 5 / (257 * 255) ** 0.5
    assert vectors.var() == pytest.approx(1, abs=0.02)


def test_encoders_of_a_recipe_are_checked() -> None:
    two = [EncoderSettings("a", 8, 4), EncoderSettings("b", 9, 5)]
    assert [(e.name, e.tokens, e.width) for e in build_encoders(two)] == [("a", 8, 4), ("b", 9, 5)]
    with pytest.raises(CinemeshError, match="no two of one name"):
        build_encoders([two[0], two[0]])
    with pytest.raises(CinemeshError, match="at least one"):
        build_encoders([])
    with pytest.raises(CinemeshError, match="a byte encoder needs a width"):
        build_encoders([EncoderSettings("a", 8, None)])
    with pytest.raises(CinemeshError, match=r"tokens\(0\)"):
        ByteEncoder(8, 0)
    with pytest.raises(CinemeshError, match=r"width\(0\)"):
        ByteEncoder(0, 8)
    assert ByteEncoder(1, 1).encode("a")[0].shape == (1, 1), "the least is legal"


def test_a_directory_that_is_no_encoder_is_named(tmp_path: Path) -> None:
    with pytest.raises(CinemeshError, match=r"has no config\.json"):
        HuggingFaceEncoder(tmp_path / "none", 8)


@needs_transformers
def test_a_damaged_encoder_directory_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    with pytest.raises(CinemeshError, match="no pickle is read"):
        HuggingFaceEncoder(tmp_path, 8).place("cpu")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CinemeshError, match="cannot read"):
        HuggingFaceEncoder(tmp_path, 8)


@needs_transformers
def test_of_an_encoder_decoder_only_the_encoder_runs(tmp_path: Path) -> None:
    """A T5 with random weights; the paper's UL2 and ByT5 are of this kind."""
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(vocab_size=384, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    model = T5ForConditionalGeneration(config).eval()
    save_with_byte_tokenizer(model, tmp_path)
    encoder = HuggingFaceEncoder(tmp_path, 10, "t5")
    assert (encoder.name, encoder.width, encoder.tokens) == ("t5", 16, 10)
    embeddings, mask = encoder.encode("cat")
    ids = torch.tensor([[c + 3 for c in b"cat"] + [1]])  # ByT5: three special ids, 1 is the end
    with torch.no_grad():
        expected = model.get_encoder()(input_ids=ids).last_hidden_state[0]
    assert mask.tolist() == [True] * 4 + [False] * 6
    assert torch.allclose(embeddings[:4], expected, atol=1e-6)
    assert embeddings[4:].abs().max() == 0
    assert encoder.encode("a longer caption")[1].all()
    tower = encoder._tower
    assert tower is not None and not hasattr(tower.model, "decoder")
    assert HuggingFaceEncoder(tmp_path, 1).tokens == 1, "the least is legal"
    with pytest.raises(CinemeshError, match=r"tokens\(0\)"):
        HuggingFaceEncoder(tmp_path, 0)


@needs_transformers
def test_of_two_towers_only_the_text_tower_runs(tmp_path: Path) -> None:
    """A CLIP with random weights; the paper's MetaCLIP is of this kind."""
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    text = {**small, "num_attention_heads": 2, "vocab_size": 384, "max_position_embeddings": 12}
    vision = {**small, "num_attention_heads": 2, "image_size": 8, "patch_size": 4}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision)).eval()
    save_with_byte_tokenizer(model, tmp_path)
    embeddings, mask = HuggingFaceEncoder(tmp_path, 12).encode("cat")
    ids = torch.tensor([[c + 3 for c in b"cat"] + [1]])
    with torch.no_grad():
        expected = model.text_model(input_ids=ids).last_hidden_state[0]
    assert int(mask.sum()) == 4 and torch.allclose(embeddings[:4], expected, atol=1e-6)
    with pytest.raises(CinemeshError, match=r"tokens\(13\) > 12 positions"):
        HuggingFaceEncoder(tmp_path, 13)


@needs_transformers
def test_real_weights_know_what_captions_mean() -> None:
    """all-MiniLM-L6-v2: paraphrases are near, others far. Weights that were not loaded fail."""
    [encoder] = build_encoders([EncoderSettings("minilm", 32, None, minilm())])
    assert (encoder.width, encoder.tokens) == (384, 32)

    def mean(caption: str) -> Tensor:
        embeddings, mask = encoder.encode(caption)
        assert embeddings.isfinite().all() and embeddings[~mask].abs().sum() == 0
        return torch.nn.functional.normalize(embeddings[mask].mean(0), dim=0)

    rabbit, hare, bus = map(
        mean,
        ("A big grey rabbit stretches.", "A large hare is stretching.", "A bus drives in a city."),
    )
    assert rabbit @ hare > 0.6 > 0.3 > rabbit @ bus
    assert torch.equal(rabbit, mean("A big grey rabbit stretches."))
    with pytest.raises(CinemeshError, match=r"width\(64\) != 384"):
        build_encoders([EncoderSettings("minilm", 32, 64, minilm())])
    with pytest.raises(CinemeshError, match=r"tokens\(513\) > 512"):
        HuggingFaceEncoder(minilm(), 513)


@needs_transformers
def test_a_fingerprint_follows_the_files_and_the_length(tmp_path: Path) -> None:
    """A changed weight of equal size must not meet embeddings of the old one."""
    from transformers import T5Config, T5EncoderModel

    config = T5Config(vocab_size=384, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    save_with_byte_tokenizer(T5EncoderModel(config), tmp_path)
    first: TextEncoder = HuggingFaceEncoder(tmp_path, 8)
    before = first.fingerprint
    assert before == HuggingFaceEncoder(tmp_path, 8).fingerprint
    assert before != HuggingFaceEncoder(tmp_path, 9).fingerprint
    weights = tmp_path / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(bytes(content))
    assert HuggingFaceEncoder(tmp_path, 8).fingerprint != before


def test_a_caption_is_never_cut_inside_a_character() -> None:
    """Of every length: a cut one has the embeddings of its longest beginning of whole characters."""
    caption = "aé€🚗z"  # 1, 2, 3, 4 and 1 bytes
    for tokens in range(1, 14):
        encoder = ByteEncoder(8, tokens)
        assert encoder.length(caption) == 12
        fits = max((caption[:end] for end in range(6) if len(caption[:end].encode()) < tokens), key=len)
        assert torch.equal(encoder.encode(caption)[0], encoder.encode(fits)[0])
        assert encoder.encode(caption)[1].sum() == len(fits.encode()) + 1


@needs_transformers
def test_nor_does_a_tokenizer_of_bytes(tmp_path: Path) -> None:
    """ByT5's token is a byte: truncating by tokens alone would leave half a sign."""
    from transformers import T5Config, T5EncoderModel

    config = T5Config(vocab_size=384, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    save_with_byte_tokenizer(T5EncoderModel(config).eval(), tmp_path)
    encoder = HuggingFaceEncoder(tmp_path, 6)
    assert encoder.length("a€€") == 8  # 7 bytes and the end
    cut, mask = encoder.encode("a€€")
    assert mask.sum() == 5  # a, one sign of three bytes, the end
    assert torch.equal(cut, encoder.encode("a€")[0])
