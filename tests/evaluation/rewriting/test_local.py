"""A rewriter in a directory: a tiny model that says one rewrite by heart, and what is wrong with others."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from chat_server import parts_of

from cinemesh.errors import CinemeshError
from cinemesh.evaluation.rewriting.guideline import read_guideline
from cinemesh.evaluation.rewriting.local import LocalModel
from cinemesh.evaluation.rewriting.rewriter import Rewriter
from cinemesh.evaluation.rewriting.settings import RewriterSettings

PROMPT = "a red car"
TEMPLATE = (
    "{% for m in messages if m['role'] == 'user' %}<s>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)
POSITIONS = 192


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bytes as tokens; two layers; the answer to PROMPT by heart."""
    # Here, not above: they load Triton, and whether it interprets kernels is decided when tests/kernels is collected.
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("student")
    special = ["<s>", "<a>", "</s>"]
    signs = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytes_alone = Tokenizer(models.BPE(vocab={s: i for i, s in enumerate([*special, *signs])}, merges=[]))
    bytes_alone.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_alone.decoder = decoders.ByteLevel()
    bytes_alone.add_special_tokens(special)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bytes_alone, bos_token="<s>", eos_token="</s>", pad_token="</s>", chat_template=TEMPLATE
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=POSITIONS, bos_token_id=0, eos_token_id=2, pad_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    text = f"<s>{PROMPT}<a>{parts_of(PROMPT).answer()}</s>"
    ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(250):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def settings(directory: Path, cache: Path, **changed: object) -> RewriterSettings:
    given = {"model": "student", "directory": str(directory), "guideline": "short", "cache": str(cache), "examples": 0}
    given |= {"answer_tokens": 180, "tries": 1, "timeout_s": 60.0}
    return RewriterSettings(**(given | changed))  # pyright: ignore[reportArgumentType]


def test_a_model_in_a_directory_rewrites_and_is_kept(directory: Path, tmp_path: Path) -> None:
    """A copy elsewhere is the same model; one byte more in its directory is another one."""
    done = Rewriter(settings(directory, tmp_path / "kept")).rewrite(PROMPT)
    assert done.parts == parts_of(PROMPT), done.problem
    other = Path(shutil.copytree(directory, tmp_path / "copy"))
    assert Rewriter(settings(other, tmp_path / "kept")).rewrite(PROMPT).cached
    (other / "more.txt").write_text("x")
    assert not Rewriter(settings(other, tmp_path / "kept")).rewrite(PROMPT).cached


def test_what_it_does_not_know_is_left_as_it_is(directory: Path, tmp_path: Path) -> None:
    done = Rewriter(settings(directory, tmp_path)).rewrite("seven dogs and a lighthouse")
    assert done.parts is None and done.text == "seven dogs and a lighthouse" and "\n" not in done.problem
    cut = Rewriter(settings(directory, tmp_path, answer_tokens=20)).rewrite(PROMPT)
    assert cut.problem.startswith("no answer: the answer is cut after 20 tokens of at most 20")
    long = Rewriter(settings(directory, tmp_path)).rewrite("a red car " * 6 + "beside a green and yellow house " * 4)
    assert "has" in long.problem and long.parts is None


def test_a_prompt_that_fills_the_model_is_told(directory: Path, tmp_path: Path) -> None:
    model = LocalModel(settings(directory, tmp_path), directory)
    with pytest.raises(CinemeshError, match=rf"\d+ tokens, and the model in .* takes {POSITIONS}; show fewer examples"):
        model.ask(read_guideline("short").messages("x" * 300, 0))


def test_a_directory_that_is_no_model_is_refused(directory: Path, tmp_path: Path) -> None:
    """No pickle is read: weights of another format are none."""
    broken = Path(shutil.copytree(directory, tmp_path / "broken"))
    (broken / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0no safetensors.")
    done = Rewriter(settings(broken, tmp_path / "kept")).rewrite(PROMPT)
    assert "transformers (AutoModelForCausalLM) cannot read the rewriter in" in done.problem and done.parts is None
    (broken / "model.safetensors").rename(broken / "pytorch_model.bin")
    with pytest.raises(CinemeshError, match=r"holds no \*\.safetensors and no \*\.gguf"):
        Rewriter(settings(broken, tmp_path))
    if not torch.cuda.is_available():
        done = Rewriter(settings(directory, tmp_path / "cuda", device="cuda")).rewrite(PROMPT)
        assert "cannot be moved to cuda" in done.problem and done.problem.endswith("write device: cpu")
