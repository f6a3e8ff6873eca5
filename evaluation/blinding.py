"""Pairs that do not say which system is which: sides and order drawn, files under names of their own.

A folder of them holds ``pairs.json`` and ``clips/``, which the page shows, ``key.json``, which it never sees, and the
votes. Sides are drawn so that each system stands left in half of its pairs with each other one.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from pathlib import Path

import numpy as np

from ..documents import exactly, read_json
from ..errors import CinemeshError
from ..files import atomic_file, check_output_folder, file_name
from .axes import Axis, Media, axes_of
from .bench import BenchPrompt
from .clip_files import Form, common_form, content_digest, find_files, fit, form_of
from .votes import KEY_FILE, VOTES_FILE, Judgement, ShownPair

PAIRS_FILE, CLIPS = "pairs.json", "clips"
SIDES = ("left", "right")
PAIRS_FORM = "take the folder that judge make wrote"


@dataclass(frozen=True, kw_only=True)
class Draw:
    """What is drawn of the pairs. ``identical``, ``repeated``: checks on raters, as a share of the pairs."""

    seed: int = 0
    identical: float = 0.05
    repeated: float = 0.05


@dataclass(frozen=True)
class BlindPair:
    """What the page knows of a pair: its name, the prompt's text, and the two files below ``clips/``."""

    name: str
    prompt: str
    left: str
    right: str


@dataclass(frozen=True)
class BlindPairs:
    """What the page shows. ``rate``: the most frames/s of a clip, 0 of images."""

    media: Media
    axes: list[Axis]
    pairs: list[BlindPair]
    rate: float


def make_pairs(
    folders: Sequence[Path], prompts: Sequence[BenchPrompt], out: Path, axes: Sequence[str], best_of: Mapping[str, int],
    draw: Draw, *, fitted: bool
) -> Judgement:  # fmt: skip
    """Write the pairs of two or more systems' folders into ``out``; a system is called after its folder.

    ``best_of``: system -> of how many clips each of its was picked. ``fitted``: files of a pair that differ in form are
    brought to one, else refused. Raises CinemeshError for folders that do not hold what the prompts want, for files
    that are the same on both sides or differ, and where ``out`` is in use.
    """
    systems = _systems(folders, best_of)
    if (out / KEY_FILE).exists() or (out / VOTES_FILE).exists():
        raise CinemeshError(f"--out {out} holds another judgement", remedy="name a new folder")
    check_output_folder(out, "--out")
    found = {name: find_files(folder, [prompt.name for prompt in prompts]) for name, folder in systems.items()}
    if len({media for media, _ in found.values()}) > 1:
        raise CinemeshError("some folders have videos and others images", remedy="compare each kind by itself")
    media = next(iter(found.values()))[0]
    asked = axes_of(media, axes)
    files = {name: paths for name, (_, paths) in found.items()}
    forms = {path: form_of(path) for paths in files.values() for path in paths.values()}
    named = {prompt.name: prompt for prompt in prompts}
    _check_different(files, named)
    pairs = draw_pairs([*systems], prompts, draw)
    wanted = {pair.name: _form(pair, files, forms, fitted) for pair in pairs}
    blind = [BlindPair(pair.name, named[pair.prompt].prompt, *_write_clips(pair, files, forms, wanted[pair.name], out))
             for pair in pairs]  # fmt: skip
    rate = max(float(form.rate) for form in wanted.values())
    judgement = Judgement(
        media, asked, {name: best_of.get(name, 1) for name in systems}, {pair.name: pair for pair in pairs}
    )
    judgement.write(out / KEY_FILE)
    shown = {"media": media, "axes": [axis.name for axis in asked], "rate": rate, "pairs": [asdict(b) for b in blind]}
    with atomic_file(out / PAIRS_FILE) as part:
        part.write_text(json.dumps(shown, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return judgement


def read_pairs(folder: Path) -> BlindPairs:
    """What ``make_pairs`` wrote for the page. Raises CinemeshError where it did not."""
    path = folder / PAIRS_FILE
    kinds = {"media": str, "axes": list, "rate": int | float, "pairs": list}
    values = exactly(read_json(path, "the pairs", PAIRS_FORM), str(path), kinds, remedy=PAIRS_FORM)
    fields = dict.fromkeys(BlindPair.__dataclass_fields__, str)
    pairs = [
        BlindPair(**exactly(row, f"pair {n} of {path}", fields, remedy=PAIRS_FORM))
        for n, row in enumerate(values["pairs"], 1)
    ]
    for pair in pairs:
        for name in (pair.left, pair.right):
            if not (folder / CLIPS / file_name(name, f"pair {pair.name} of {path}")).is_file():
                raise CinemeshError(f"pair {pair.name} of {path}: {CLIPS}/{name} is not there", remedy=PAIRS_FORM)
    if values["media"] not in [*Media] or not pairs:
        raise CinemeshError(f"{path} holds no pairs of videos or images", remedy=PAIRS_FORM)
    media = Media(values["media"])
    return BlindPairs(media, axes_of(media, map(str, values["axes"])), pairs, values["rate"])


def draw_pairs(systems: Sequence[str], prompts: Sequence[BenchPrompt], draw: Draw) -> list[ShownPair]:
    """Every two systems on every prompt and the checks, in the order in which they are shown.

    A repeated pair has its sides changed, and comes after the pair that it repeats.
    """
    random = np.random.Generator(np.random.Philox(key=draw.seed))
    pairs: list[ShownPair] = []
    for one, other in combinations(systems, 2):
        left = random.permutation(len(prompts)) < (len(prompts) + int(random.integers(2))) // 2
        for prompt, first in zip(prompts, left, strict=True):
            sides = (one, other) if first else (other, one)
            pairs.append(ShownPair("", prompt.name, prompt.concept, prompt.motion, *sides))
    again = random.choice(len(pairs), _count(draw.repeated, pairs), replace=False)
    same = random.choice(len(pairs), _count(draw.identical, pairs), replace=False)
    identical = [replace(pairs[i], left=system, right=system) for i in same for system in [pairs[i].left]]
    shown = [*pairs, *identical]
    shown = [shown[i] for i in random.permutation(len(shown))]
    repeats: list[tuple[ShownPair, ShownPair]] = []
    for first in (pairs[i] for i in again):
        at = shown.index(first)
        repeated = replace(first, left=first.right, right=first.left, repeats="later")
        shown.insert(int(random.integers(at + 1, len(shown) + 1)), repeated)
        repeats.append((repeated, first))
    names = {id(pair): f"p{number:04}" for number, pair in enumerate(shown, 1)}
    of = {id(repeated): names[id(first)] for repeated, first in repeats}
    return [replace(pair, name=names[id(pair)], repeats=of.get(id(pair), "")) for pair in shown]


def _count(share: float, pairs: Sequence[ShownPair]) -> int:
    return round(share * len(pairs))


def _systems(folders: Sequence[Path], best_of: Mapping[str, int]) -> dict[str, Path]:
    systems: dict[str, Path] = {}
    for folder in folders:
        name = folder.resolve().name
        if name in systems:
            raise CinemeshError(
                f"{systems[name]} and {folder} are both called {name!r}, and a system is called after its folder",
                remedy="rename one, or name another: a system is not compared with itself",
            )
        systems[name] = folder
    if len(systems) < 2:
        raise CinemeshError(f"{len(systems)} system is compared with nothing", remedy="name two folders or more")
    for name in best_of:
        if name not in systems:
            raise CinemeshError(f"--best-of {name}: no folder is called so", remedy=f"known: {', '.join(systems)}")
    return systems


def _check_different(files: Mapping[str, Mapping[str, Path]], prompts: Mapping[str, BenchPrompt]) -> None:
    """No prompt has the same file of two systems: there would be nothing to choose."""
    for prompt in prompts:
        seen: dict[str, Path] = {}
        for paths in files.values():
            path = paths[prompt]
            if (other := seen.setdefault(content_digest(path), path)) != path:
                raise CinemeshError(
                    f"{other} and {path} are the same file, and nobody can prefer one",
                    remedy="replace one, or take the prompt out",
                )


def _form(
    pair: ShownPair, files: Mapping[str, Mapping[str, Path]], forms: Mapping[Path, Form], fitted: bool
) -> Form:  # fmt: skip
    left, right = files[pair.left][pair.prompt], files[pair.right][pair.prompt]
    if forms[left] == forms[right]:
        return forms[left]
    if not fitted:
        raise CinemeshError(
            f"{left} is {forms[left]} and {right} is {forms[right]}, and a pair has one size, length and rate",
            remedy="make them alike, or add --fit: both are cropped, cut and slowed to what they share",
        )
    return common_form(forms[left], forms[right])


def _write_clips(
    pair: ShownPair, files: Mapping[str, Mapping[str, Path]], forms: Mapping[Path, Form], form: Form, out: Path
) -> Iterator[str]:  # fmt: skip
    """The names of the pair's files. One that has its form already is copied as it is."""
    (out / CLIPS).mkdir(parents=True, exist_ok=True)
    for side, system in zip(SIDES, (pair.left, pair.right), strict=True):
        source = files[system][pair.prompt]
        as_it_is = forms[source] == form
        suffix = source.suffix.lower() if as_it_is else ".mp4" if form.rate else ".png"
        name = f"{pair.name}-{side}{suffix}"
        if as_it_is:
            with atomic_file(out / CLIPS / name) as part:
                shutil.copyfile(source, part)
        else:
            fit(source, out / CLIPS / name, form)
        yield name
