"""The TRL recipe of docs/prompts.md, run as it stands there: it reads our chats, its loss falls, its student is scored.

    python -m venv trl && trl/bin/pip install trl
    python tests/benchmarks/trl_recipe.py --trl trl/bin/python [--score] [--work runs/trl] [--json results.json]

TRL is no dependency, and has an environment of its own. Nobody teaches here: the pairs are made by a template, and the
base is a Llama of two layers with random weights, whose tokenizer is trained on the pairs. So this shows that the
files, the recipe and ``cinemesh rewrite score`` fit together, and nothing of how well a student rewrites.

The recipe runs with ``use_cpu=True`` here. Its learning rate is for a model that can write already;
``--random-weights`` adds a run with one for random weights, and more epochs: every other word of the recipe stays.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
from datetime import date
from itertools import product
from pathlib import Path
from typing import Any

from cinemesh.evaluation.rewriting.guideline import Parts, read_guideline
from cinemesh.evaluation.rewriting.review import HELD_OUT_FILE, TRAIN_FILE, TaughtPair, export_pairs

PAGE = Path(__file__).parents[2] / "docs" / "prompts.md"
GUIDELINE = "short"
THINGS = ("cat", "dog", "bus", "taxi", "horse", "bicycle", "train", "heron", "tractor", "boat", "crow", "truck")
LOOKS = ("red", "grey", "small", "old", "white", "black")
PLACES = ("beach", "street", "meadow", "bridge", "village", "square", "harbour", "hill")
ON_A_CPU = {'save_strategy="no"': 'save_strategy="no", use_cpu=True'}  # TRL asks for bf16 on a GPU, unless told
FOR_RANDOM_WEIGHTS = ON_A_CPU | {"learning_rate=2e-5": "learning_rate=3e-3", "num_train_epochs=3": "num_train_epochs=6"}

BASE = """
import json, sys
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

texts = [m["content"] for line in open(sys.argv[1]) for m in json.loads(line)["messages"]]
words = Tokenizer(models.BPE())
words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
words.decoder = decoders.ByteLevel()
special = ["<s>", "<a>", "</s>"]
words.train_from_iterator(texts, trainers.BpeTrainer(
    vocab_size=600, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
template = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}<a>"
    "{% generation %}{{ m['content'] }}</s>{% endgeneration %}{% else %}<s>{{ m['content'] }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}")
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=words, bos_token="<s>", eos_token="</s>", pad_token="</s>", chat_template=template)
torch.manual_seed(0)
LlamaForCausalLM(LlamaConfig(
    vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=1024, bos_token_id=0, eos_token_id=2, pad_token_id=2)).save_pretrained(sys.argv[2])
tokenizer.save_pretrained(sys.argv[2])
"""
RUN = """
import json, runpy
from importlib.metadata import version
trainer = runpy.run_path("sft.py")["trainer"]
rows = trainer.train_dataset
masks = [sum(row["assistant_masks"]) for row in rows] if "assistant_masks" in rows.column_names else []
told = {"rows": len(rows), "steps": trainer.state.global_step, "log": trainer.state.log_history,
        "answer_tokens": [min(masks), max(masks)] if masks else None,
        "versions": {name: version(name) for name in ("trl", "transformers", "torch", "datasets")}}
json.dump(told, open("told.json", "w"))
"""


def recipe_of_the_page() -> str:
    """``sft.py``, as the page has it."""
    found = re.search(r"^    # sft\.py\n(?:    .*\n|\n)+?(?=\S)", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert found, f"{PAGE} has no sft.py"
    return "".join(line.removeprefix("    ") for line in found[0].splitlines(keepends=True))


def made_pairs() -> list[TaughtPair]:
    """By a template, in an order that mixes them."""
    pairs = [
        TaughtPair(
            f"a {look} {thing}, {place}",
            Parts(
                subject=f"A {look} {thing}", action=f"moves slowly past the {place} at noon", background="", light="",
                camera="",
            ),
        )
        for look, thing, place in product(LOOKS, THINGS, PLACES)
    ]  # fmt: skip
    return sorted(pairs, key=lambda pair: pair.prompt[::-1])


def scored(folder: Path, directory: str) -> dict[str, Any]:
    """What ``rewrite score`` says of a model on the held-out pairs."""
    settings = {"model": "student", "directory": directory, "examples": 0, "guideline": GUIDELINE, "tries": 1,
                "cache": "kept", "answer_tokens": 160, "timeout_s": 120.0}  # fmt: skip
    (folder / "student.yaml").write_text(json.dumps(settings), encoding="utf-8")
    command = [sys.executable, "-m", "cinemesh.launch", "rewrite", "score", "student.yaml", f"pairs/{HELD_OUT_FILE}"]
    done = subprocess.run([*command, "--json"], cwd=folder, check=True, capture_output=True, text=True)
    found = json.loads(done.stdout)
    return {name: found[name] for name in ("prompts", "schema", "passed", "facts_kept", "words_kept", "overlap")}


def run(trl: Path, folder: Path, changed: dict[str, str], *, score: bool) -> dict[str, Any]:
    """The recipe, but for what is ``changed``; the student before and after. Not run again where it was run."""
    if (folder / "told.json").exists():
        return result(folder, changed, score=score)
    folder.mkdir(parents=True, exist_ok=True)
    export_pairs(folder / "pairs", made_pairs(), read_guideline(GUIDELINE), 0.05, seed=0)
    recipe = recipe_of_the_page()
    for old, new in changed.items():
        assert recipe.count(old) == 1, old
        recipe = recipe.replace(old, new)
    for name, text in (("sft.py", recipe), ("base.py", BASE), ("run.py", RUN)):
        (folder / name).write_text(text, encoding="utf-8")
    # Nothing is downloaded, and none of what this process has of an environment is the other's.
    clean = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    clean |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "datasets"), "CUDA_VISIBLE_DEVICES": ""}
    for script in (["base.py", f"pairs/{TRAIN_FILE}", "models/base"], ["run.py"]):
        subprocess.run([str(trl), *script], cwd=folder, check=True, env=clean)
    return result(folder, changed, score=score)


def result(folder: Path, changed: dict[str, str], *, score: bool) -> dict[str, Any]:
    """Of a folder in which the recipe was run. Fails unless it read every chat and its loss fell."""
    told = json.loads((folder / "told.json").read_text(encoding="utf-8"))
    counts = [
        len((folder / "pairs" / name).read_text(encoding="utf-8").splitlines()) for name in (TRAIN_FILE, HELD_OUT_FILE)
    ]
    losses = [row["loss"] for row in told["log"] if "loss" in row]
    assert told["rows"] == counts[0] and len(losses) > 2 and losses[-1] < losses[0], (told, counts)
    return {
        "changed": changed,
        "pairs": {"train": counts[0], "held_out": counts[1]},
        "rows_that_trl_read": told["rows"],
        "steps": told["steps"],
        "losses": losses,
        "base_on_held_out": scored(folder, "models/base") if score else None,
        "student_on_held_out": scored(folder, "student") if score else None,
        "versions": told["versions"],
    }


def main() -> None:
    """Run both, print and write what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl", type=Path, required=True, help="python of an environment that has trl")
    parser.add_argument("--work", type=Path, default=Path("runs/trl"))
    parser.add_argument("--score", action="store_true", help="base and student on the held-out pairs too")
    parser.add_argument("--random-weights", action="store_true", help="the second run too: 414 steps")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    work, trl = asked.work.resolve(), asked.trl.absolute()
    told: dict[str, Any] = {
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, no GPU",
        "pairs": "made by a template: no teacher, no person",
        "base": "Llama, 2 layers of width 128, random weights",
        "as_documented": run(trl, work / "as-documented", ON_A_CPU, score=asked.score),
    }
    if asked.random_weights:
        told["for_random_weights"] = run(trl, work / "for-random-weights", FOR_RANDOM_WEIGHTS, score=asked.score)
    print(json.dumps(told, indent=1))
    if asked.json:
        asked.json.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
