"""What a rewritten prompt must be like, rule by rule: each says what is wrong, or nothing (torch-free).

The rules are Movie Gen's (arXiv 2410.13720 v1, 3.4.1): one order of information, plain words, motion not overdone; and
what keeps a model that obeys nobody, or somebody else, from what is sampled: everything that the user said is kept,
in the length of training captions, in English, without talk, instructions or markup.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from dataclasses import asdict

from ...documents import parse_json, quoted
from ...errors import CinemeshError
from .facts import WORD, Facts
from .guideline import PART_NAMES, Guideline, Parts, english, read_parts

MOST_SIGNS = 10_000  # of an answer; a caption of 120 words has some 700
APART = 2  # words that may stand inside the name of a camera: "pans very slowly left"
CLAUSE = re.compile(r"[,;]|\b(?:and|then|while|as|before|after)\b")
FORM = "it must be one JSON object of subject, action, background, light and camera, each a text"

RewriteRule = Callable[[str, Parts, Guideline], str]


def read_answer(answer: str, guideline: Guideline) -> Parts:
    """The parts of a model's answer, which may stand between other words, as small models talk. Raises CinemeshError.

    Their order is that of the guideline: a model that writes another one has not thought in it.
    """
    if len(answer) > MOST_SIGNS:
        raise CinemeshError(f"the answer has {len(answer):,} signs, and at most {MOST_SIGNS:,} are read", remedy=FORM)
    begin, end = answer.find("{"), answer.rfind("}")
    if begin < 0 or end < begin:
        what = "is cut in the middle of its JSON" if begin >= 0 else "holds no JSON"
        raise CinemeshError(f"the answer {what}: {quoted(answer)}", remedy=FORM)
    values = parse_json(answer[begin : end + 1], "the answer", FORM)
    parts = read_parts(values, "the answer", FORM)
    if list(values) != [*PART_NAMES]:
        raise CinemeshError(f"the answer says {', '.join(values)}", remedy=f"the order is {', '.join(PART_NAMES)}")
    if lacking := [name for name in guideline.required if not asdict(parts)[name].strip()]:
        raise CinemeshError(f"the answer has nothing in {', '.join(lacking)}", remedy=FORM)
    return parts


def broken_rules(prompt: str, parts: Parts, guideline: Guideline) -> dict[str, str]:
    """Rule -> what is wrong with ``parts`` as a rewrite of ``prompt``; none where it may be sampled."""
    return {name: said for name, rule in RULES.items() if (said := rule(prompt, parts, guideline))}


def _has_length(prompt: str, parts: Parts, guideline: Guideline) -> str:
    count, (least, most) = len(parts.text.split()), guideline.words
    return "" if least <= count <= most else f"it has {count} words, not {least} to {most}"


def _keeps_facts(prompt: str, parts: Parts, guideline: Guideline) -> str:
    lost = Facts.of(prompt).lost_in(parts.text)
    return f"it has lost {', '.join(lost[:4])}" if lost else ""


def _keeps_words(prompt: str, parts: Parts, guideline: Guideline) -> str:
    share = Facts.of(prompt).kept_share(parts.text)
    return "" if share >= guideline.kept_words else f"it keeps {share:.0%} of the prompt's words"


def _has_order(prompt: str, parts: Parts, guideline: Guideline) -> str:
    """What the prompt is of comes first, and the camera is spoken of in its own part alone."""
    for name in ("subject", "action"):
        if re.search(r"\bcamera\b", getattr(parts, name), re.IGNORECASE) and "camera" not in prompt.lower():
            return f"it speaks of the camera in {name}"
    if (wanted := Facts.of(prompt).words) and not wanted & Facts.of(f"{parts.subject} {parts.action}").words:
        return "subject and action have no word of the prompt"
    return ""


def _names_a_camera(prompt: str, parts: Parts, guideline: Guideline) -> str:
    if not parts.camera.strip():
        return ""
    between = rf"\w*(?:\W+\w+){{0,{APART}}}?\W+"
    known = (between.join(map(re.escape, re.split(r"[\s-]+", camera))) for camera in english().cameras)
    return "" if re.search(rf"\b(?:{'|'.join(known)})", parts.camera, re.IGNORECASE) else "it names no known camera"


def _moves_little(prompt: str, parts: Parts, guideline: Guideline) -> str:
    clauses = sum(bool(piece.strip()) for piece in CLAUSE.split(parts.action))
    most = guideline.action_clauses
    return "" if clauses <= most else f"its action has {clauses} clauses, more than {most}"


def _is_plain(prompt: str, parts: Parts, guideline: Guideline) -> str:
    own = {word.lower() for word in WORD.findall(prompt)}
    for word in WORD.findall(parts.text):
        if word.lower() in own:
            continue
        if plain := english().plain.get(word.lower()):
            return f"it says {word!r} for {plain!r}"
        if any(len(piece) > english().most_letters for piece in word.split("-")):
            return f"{word!r:.60} is no plain word"
    return ""


def _is_english(prompt: str, parts: Parts, guideline: Guideline) -> str:
    kept = set(prompt)
    if strange := [
        sign
        for sign in parts.text
        if sign.isalpha() and sign not in kept and not unicodedata.name(sign, "").startswith("LATIN")
    ]:
        return f"it is not English: {strange[0]!r} is no Latin letter"
    words = [word.lower() for word in WORD.findall(parts.text)]
    share = sum(word in english().common for word in words) / max(1, len(words))
    return "" if share >= english().common_share else "it is not English"


def _says_nothing_else(prompt: str, parts: Parts, guideline: Guideline) -> str:
    """No talk to the user, no instructions, no markup, no signs that a terminal or page would act on."""
    whole = " ".join(asdict(parts).values())
    for sign in whole:
        if not sign.isprintable() and sign not in "\n\t" and sign not in prompt:
            return f"it holds the sign {sign!r}"
    low, own = " ".join(whole.split()).lower(), prompt.lower()
    said = next((phrase for phrase in english().never if phrase in low and phrase not in own), "")
    return f"it says {said!r}, which no caption does" if said else ""


RULES: dict[str, RewriteRule] = {
    "nothing else": _says_nothing_else,
    "English": _is_english,
    "length": _has_length,
    "facts": _keeps_facts,
    "words": _keeps_words,
    "order": _has_order,
    "camera": _names_a_camera,
    "motion": _moves_little,
    "plain": _is_plain,
}
