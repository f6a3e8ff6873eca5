"""Rewrites that people accept, edit or reject, and the pairs that come of it: what a student is taught.

A folder holds ``rewrites.json``, what a teacher made of prompts; ``verdicts.jsonl``, which grows by a line a verdict,
where the last on a rewrite counts; and ``prompts.yaml``, the rewritten prompts as ``cinemesh sample`` takes them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np

from ...documents import exactly, mapping, parse_json, quoted, read_json
from ...errors import CinemeshError, did_you_mean
from ...files import atomic_file, check_output_folder
from ..bench import json_lines
from .guideline import ASSISTANT, SYSTEM, USER, Guideline, Message, Parts, message, read_guideline, read_parts
from .rewriter import Rewriter, Rewritten
from .rules import broken_rules, read_answer

REWRITES_FILE, VERDICTS_FILE, PROMPTS_FILE = "rewrites.json", "verdicts.jsonl", "prompts.yaml"
TRAIN_FILE, HELD_OUT_FILE = "train.jsonl", "held_out.jsonl"
REVIEW_FORM = "take the folder that rewrite make wrote"
VERDICT_FORM = "each line is a verdict with name, reviewer, verdict and, of an edit, parts"
CHAT_FORM = "each line holds messages of system, user and assistant, as rewrite export writes them"


class Decision(StrEnum):
    ACCEPT = "accept"
    EDIT = "edit"
    REJECT = "reject"


@dataclass(frozen=True)
class Proposal:
    """A teacher's rewrite of a prompt; no ``parts``, and the ``problem``, where there is none."""

    name: str
    prompt: str
    parts: Parts | None
    problem: str


@dataclass(frozen=True)
class ReviewVerdict:
    """``parts``: of an edit alone."""

    name: str
    reviewer: str
    verdict: Decision
    parts: Parts | None = None

    def line(self) -> str:
        """As the file of verdicts has it."""
        given = {key: value for key, value in asdict(self).items() if value is not None}
        return json.dumps(given, ensure_ascii=False) + "\n"


@dataclass(frozen=True)
class Review:
    """What a folder holds, but for verdicts."""

    model: str
    guideline: Guideline
    proposals: dict[str, Proposal]


@dataclass(frozen=True)
class TaughtPair:
    """A prompt, and the rewrite that a person let pass."""

    prompt: str
    parts: Parts


def check_review(folder: Path) -> None:
    """Raise CinemeshError where ``folder`` has verdicts: they are on other rewrites."""
    if (folder / VERDICTS_FILE).exists() and (folder / VERDICTS_FILE).stat().st_size:
        raise CinemeshError(f"{folder} holds verdicts on other rewrites", remedy="name a new folder")


def write_review(folder: Path, rewriter: Rewriter, found: Mapping[str, Rewritten]) -> None:
    """The rewrites of a review."""
    rows = [
        {"name": name, "prompt": one.prompt, "parts": asdict(one.parts) if one.parts else None, "problem": one.problem}
        for name, one in found.items()
    ]
    told = {"model": rewriter.settings.model, "guideline": rewriter.settings.guideline, "rewrites": rows}
    with atomic_file(folder / REWRITES_FILE) as unfinished:
        unfinished.write_text(json.dumps(told, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_review(folder: Path) -> Review:
    """What ``write_review`` wrote. Raises CinemeshError where it did not."""
    path = folder / REWRITES_FILE
    kinds = {"model": str, "guideline": str, "rewrites": list}
    values = exactly(read_json(path, "the rewrites", REVIEW_FORM), str(path), kinds, remedy=REVIEW_FORM)
    proposals: dict[str, Proposal] = {}
    for number, row in enumerate(values["rewrites"], 1):
        where = f"rewrite {number} of {path}"
        of = {"name": str, "prompt": str, "parts": dict | None, "problem": str}
        given = exactly(row, where, of, remedy=REVIEW_FORM)
        if given["name"] in proposals:
            raise CinemeshError(f"{where}: {quoted(given['name'])} is there twice", remedy=REVIEW_FORM)
        parts = None if given["parts"] is None else read_parts(given["parts"], where, REVIEW_FORM)
        proposals[given["name"]] = Proposal(given["name"], given["prompt"], parts, given["problem"])
    if not proposals:
        raise CinemeshError(f"{path} holds no rewrite", remedy=REVIEW_FORM)
    return Review(values["model"], read_guideline(values["guideline"]), proposals)


def verdict_of(row: object, where: str, review: Review) -> ReviewVerdict:
    """A verdict as JSON has it. Raises CinemeshError for one on no rewrite, or of parts that break the rules."""
    given = mapping(row, where, ("name", "reviewer", "verdict", "parts"), required=("name", "reviewer", "verdict"))
    for key in ("name", "reviewer", "verdict"):
        if not isinstance(given[key], str) or not given[key].strip():
            raise CinemeshError(f"{where}: {key} is {quoted(given[key])}", remedy="it must be a text")
    if given["verdict"] not in [*Decision]:
        raise CinemeshError(
            f"{where}: verdict is {quoted(given['verdict'])}", remedy=did_you_mean(given["verdict"], Decision)
        )
    if (proposal := review.proposals.get(given["name"])) is None:
        raise CinemeshError(f"{where}: {quoted(given['name'])} is no rewrite here", remedy="take its own folder")
    decision = Decision(given["verdict"])
    if (decision is Decision.EDIT) != (given.get("parts") is not None):
        raise CinemeshError(f"{where}: parts are of an edit, and an edit has them", remedy=VERDICT_FORM)
    if decision is Decision.ACCEPT and proposal.parts is None:
        raise CinemeshError(f"{where}: there is nothing to accept", remedy="edit it, or reject it")
    parts = read_parts(given["parts"], where, VERDICT_FORM) if decision is Decision.EDIT else None
    if parts is not None:
        read_answer(parts.answer(), review.guideline)
        if broken := broken_rules(proposal.prompt, parts, review.guideline):
            raise CinemeshError(f"{where}: {', '.join(broken.values())}", remedy="edit it further")
    return ReviewVerdict(given["name"], given["reviewer"], decision, parts)


def read_verdicts(folder: Path, review: Review) -> dict[str, ReviewVerdict]:
    """The last verdict on each rewrite, by name; none where there is no file. Raises CinemeshError."""
    path = folder / VERDICTS_FILE
    if not path.exists():
        return {}
    lines = json_lines(path, "the verdicts", VERDICT_FORM, grows=True)
    return {verdict.name: verdict for verdict in (verdict_of(row, where, review) for row, where in lines)}


def passed_pairs(review: Review, verdicts: Mapping[str, ReviewVerdict]) -> list[TaughtPair]:
    """Accepted and edited, in the order of the prompts."""
    pairs = []
    for name, proposal in review.proposals.items():
        verdict = verdicts.get(name)
        parts = verdict and (verdict.parts or proposal.parts)
        if verdict and parts and verdict.verdict is not Decision.REJECT:
            pairs.append(TaughtPair(proposal.prompt, parts))
    return pairs


def export_pairs(
    out: Path, pairs: Sequence[TaughtPair], guideline: Guideline, held_out: float, seed: int
) -> tuple[int, int]:
    """Write ``train.jsonl`` and ``held_out.jsonl``, chats of a student without examples; how many are in each.

    ``held_out``: the share that is never trained on, at least one, drawn by the ``seed``. Raises CinemeshError for
    fewer than two pairs, and where the folder holds some.
    """
    check_output_folder(out, "--out")
    if len(pairs) < 2:
        raise CinemeshError(
            f"{len(pairs)} rewrites were accepted or edited, and one is held out", remedy="let people look at more"
        )
    for name in (TRAIN_FILE, HELD_OUT_FILE):
        if (out / name).exists():
            raise CinemeshError(f"{out / name} is there", remedy="name a new folder")
    count = min(max(1, round(held_out * len(pairs))), len(pairs) - 1)
    order = np.random.Generator(np.random.Philox(key=seed)).permutation(len(pairs))
    apart = set(order[:count].tolist())
    files = {TRAIN_FILE: [p for i, p in enumerate(pairs) if i not in apart]}
    files[HELD_OUT_FILE] = [p for i, p in enumerate(pairs) if i in apart]
    for name, chosen in files.items():
        with atomic_file(out / name) as unfinished:
            lines = (json.dumps({"messages": chat_of(pair, guideline)}, ensure_ascii=False) + "\n" for pair in chosen)
            unfinished.write_text("".join(lines), encoding="utf-8")
    return len(pairs) - count, count


def chat_of(pair: TaughtPair, guideline: Guideline) -> list[Message]:
    """A pair as a student is taught it: instruction, prompt, answer."""
    return [*guideline.messages(pair.prompt, 0), message(ASSISTANT, pair.parts.answer())]


def read_pairs_of(path: Path, guideline: Guideline) -> list[TaughtPair]:
    """The pairs of a file as ``export_pairs`` writes it. Raises CinemeshError."""
    pairs = [
        _pair(row, where, guideline) for row, where in json_lines(path, "the pairs of prompts", CHAT_FORM)
    ]  # fmt: skip
    if not pairs:
        raise CinemeshError(f"{path} holds no pair", remedy=CHAT_FORM)
    return pairs


def _pair(row: Any, where: str, guideline: Guideline) -> TaughtPair:
    match row:
        case {"messages": [{"role": "system"}, {"role": "user", "content": str(prompt)}, {"role": "assistant",
              "content": str(answer)}]}:  # fmt: skip
            parse_json(answer, f"{where}: the answer", CHAT_FORM)
            return TaughtPair(prompt, read_answer(answer, guideline))
    raise CinemeshError(f"{where} holds no messages of {SYSTEM}, {USER} and {ASSISTANT}", remedy=CHAT_FORM)
