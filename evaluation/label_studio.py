"""Pairs for Label Studio, and the votes of its annotators.

A pair on an axis is a task. Its labelling interface has a ``<Pairwise>`` of two ``<Video>`` or ``<Image>``, a choice
for "neither", which a pairwise result cannot say, and one of the reasons of the task's axis. Exports are read in the
format "JSON" (https://labelstud.io/guide/task_format), not in JSON-MIN, which leaves out who annotated.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote
from xml.sax.saxutils import quoteattr  # nosec B406  it writes, and parses nothing

from ..documents import mapping, quoted, read_json
from ..errors import CinemeshError
from ..files import atomic_file, check_output_folder
from .axes import Axis, Media
from .blinding import CLIPS, BlindPairs
from .votes import Answer, Vote, vote_of

TASKS_FILE, INTERFACE_FILE = "tasks.json", "interface.xml"
PAIRWISE, NEITHER, REASON = "preference", "neither", "reason"  # control tags
NO_REASON = "no single reason"
NEITHER_VALUE = "neither"
EXPORT_FORM = "export the project as JSON, with its annotations"
LOCAL_FILES = "/data/local-files/?d="  # Label Studio serves a folder of its machine there


def interface(media: Media) -> str:
    """The labelling interface of a project, as its settings take it."""
    tag = "Video" if media is Media.VIDEO else "Image"
    sides = "\n".join(
        f'    <View style="width: 50%"><{tag} name="{side}" value="${side}"/></View>' for side in ("left", "right")
    )
    return f"""<View>
  <Header value="$question"/>
  <Text name="prompt" value="$prompt"/>
  <Text name="guideline" value="$guideline"/>
  <Pairwise name="{PAIRWISE}" toName="left,right" selectionStyle="border: 4px solid #1f77b4"/>
  <View style="display: flex">
{sides}
  </View>
  <Choices name="{NEITHER}" toName="prompt" choice="single">
    <Choice value={quoteattr(NEITHER_VALUE)} hotkey="0"/>
  </Choices>
  <Choices name="{REASON}" toName="prompt" choice="single" value="$reasons"/>
</View>
"""


def write_tasks(shown: BlindPairs, out: Path, clips_at: str) -> int:
    """Write ``tasks.json`` and ``interface.xml`` into ``out``; how many tasks. No name of a system is in them.

    ``clips_at``: what a clip's name is appended to, to be its address. Raises CinemeshError where they are there.
    """
    check_output_folder(out, "--out")
    for name in (TASKS_FILE, INTERFACE_FILE):
        if (out / name).exists():
            raise CinemeshError(f"{out / name} is there", remedy="name a new folder")
    tasks = [
        {"data": {
            "pair": pair.name, "axis": axis.name, "prompt": pair.prompt, "question": axis.question,
            "guideline": axis.guideline, "left": clips_at + quote(pair.left), "right": clips_at + quote(pair.right),
            "reasons": [{"value": name} for name in (*axis.reasons, NO_REASON)], "raters": axis.raters,
        }}
        for pair in shown.pairs for axis in shown.axes
    ]  # fmt: skip
    for name, text in ((TASKS_FILE, json.dumps(tasks, indent=1, ensure_ascii=False)), (INTERFACE_FILE, "")):
        with atomic_file(out / name) as part:
            part.write_text(text or interface(shown.media), encoding="utf-8")
    return len(tasks)


def clips_beside(folder: Path) -> str:
    """Where Label Studio finds the clips of ``folder`` if it serves the folder that holds it."""
    return f"{LOCAL_FILES}{quote(folder.resolve().name)}/{CLIPS}/"


@dataclass(frozen=True)
class ReadVotes:
    """Of an export. ``skipped``: why -> how many annotations are no vote."""

    votes: list[Vote]
    skipped: dict[str, int]


def read_export(path: Path, pairs: Mapping[str, Any], axes: Mapping[str, Axis]) -> ReadVotes:
    """The votes of a project's JSON export, on these pairs and axes by name.

    Skipped annotations and those without an answer are counted; where an annotator did a task twice, the later of the
    file counts. Raises CinemeshError for tasks that are not of these pairs, and for an answer that contradicts itself.
    """
    tasks = read_json(path, "the export", EXPORT_FORM)
    if not isinstance(tasks, list):
        raise CinemeshError(f"the export {path} is no list of tasks", remedy=EXPORT_FORM)
    votes: dict[tuple[str, str, str], Vote] = {}
    skipped: Counter[str] = Counter()
    for number, task in enumerate(tasks, 1):
        where = f"task {number} of {path}"
        data, annotations = _of_task(task, where)
        for i, annotation in enumerate(annotations, 1):
            at = f"annotation {i} of {where}"
            found = _answer(annotation, at)
            if isinstance(found, str):
                skipped[found] += 1
                continue
            answer, reason = found
            row = {"pair": data["pair"], "axis": data["axis"], "rater": _rater(annotation, at), "answer": answer}
            vote = vote_of(row | {"reason": reason}, at, pairs, dict(axes))
            votes[vote.pair, vote.axis, vote.rater] = vote
    return ReadVotes([*votes.values()], dict(skipped))


def _of_task(task: Any, where: str) -> tuple[dict[str, Any], list[Any]]:
    match task:
        case {"data": {"pair": str(), "axis": str()} as data, "annotations": list(annotations)}:
            return data, annotations
    raise CinemeshError(f"{where} has no data of a pair and an axis, or no annotations", remedy=EXPORT_FORM)


def _answer(annotation: Any, where: str) -> tuple[Answer, str] | str:
    """What an annotation says, and its reason; or why it says nothing."""
    match annotation:
        case {"was_cancelled": True}:
            return "skipped"
        case {"result": list(results)}:
            pass
        case _:
            raise CinemeshError(f"{where} has no result", remedy=EXPORT_FORM)
    answers: list[Answer] = []
    reason = ""
    for result in results:
        match result:
            case {"from_name": "preference", "value": {"selected": "left" | "right" as side}}:
                answers.append(Answer(side))
            case {"from_name": "preference", "value": {"selected": "none"}}:
                pass
            case {"from_name": "neither", "value": {"choices": [str()]}}:
                answers.append(Answer.TIE)
            case {"from_name": "reason", "value": {"choices": [str(given)]}}:
                reason = "" if given == NO_REASON else given
            case _:
                raise CinemeshError(
                    f"{where}: {quoted(result)} is none of this interface", remedy="take the project of interface.xml"
                )
    if not answers:
        return "without an answer"
    if len(answers) > 1:
        raise CinemeshError(
            f"{where} says {' and '.join(answers)}", remedy="have it annotated anew, or take the annotation out"
        )
    return answers[0], "" if answers[0] is Answer.TIE else reason


def _rater(annotation: dict[str, Any], where: str) -> str:
    """The annotator: an email, or a number of that Label Studio."""
    given = mapping(annotation, where, annotation.keys(), required=["completed_by"]) and annotation["completed_by"]
    match given:
        case {"email": str(email)} if email.strip():
            return email
        case int(number) | {"id": int(number)} if not isinstance(number, bool):
            return f"annotator {number}"
    raise CinemeshError(f"{where}: completed_by is {quoted(given)}", remedy=EXPORT_FORM)
