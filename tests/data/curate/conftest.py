"""Runs of curation for the tests of this folder."""

from pathlib import Path
from typing import Any

import pytest
from planted_clips import curate, write_planted

from cinemesh.data.curate.pipeline import Outcome


@pytest.fixture(scope="session")
def planted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, tuple[str, ...]]]:
    """The folder of planted clips, and by file what must drop its clips."""
    folder = tmp_path_factory.mktemp("planted") / "clips"
    return folder, write_planted(folder)


@pytest.fixture(scope="session")
def curated(planted: tuple[Path, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    """Them, curated: the folder with the tables, and what the run came to."""
    out = tmp_path_factory.mktemp("curated")
    return out, curate({"sources": [str(planted[0])]}, out)


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP of 16 channels with random weights, and a tokenizer of whole words."""
    import torch
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.CLIPConfig(
        text_config={**size, "vocab_size": 64, "max_position_embeddings": 16, "eos_token_id": 2, "bos_token_id": 1},
        vision_config={**size, "image_size": 32, "patch_size": 8},
        projection_dim=8,
    )
    folder = tmp_path_factory.mktemp("clip")
    transformers.CLIPModel(config).save_pretrained(folder)
    words = {word: number for number, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", "a", "photo", "slide"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", bos_token="<s>", unk_token="<unk>"
    ).save_pretrained(folder)
    return folder
