"""docs/extend.md is true: each chapter's code is applied to a copy of the package, and its last block runs there."""

from __future__ import annotations

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from test_house import FOLDERS, ROOT, sources

PAGE = (ROOT / "docs" / "extend.md").read_text()
BLOCK = re.compile(r"^```(\w+)(?: ([^\n]*))?\n(.*?)^```$", re.M | re.S)
EDIT = re.compile(r"(\S+) (before|instead of): ?(.*)")
CINEMESH = [sys.executable, "-c", "from cinemesh.launch.cli import main; main()"]


@dataclass(frozen=True)
class Chapter:
    """``blocks``: (language, what its first line says, text)."""

    title: str
    files: list[str]
    blocks: list[tuple[str, str, str]]


def chapters() -> list[Chapter]:
    found: list[Chapter] = []
    for text in PAGE.split("\n## ")[1:]:
        title, _, body = text.partition("\n")
        said = re.search(r"^Files: (.*?)\n\n", body, re.M | re.S)
        files = re.findall(r"`([^`]+)`", said[1]) if said else []
        found.append(Chapter(title, files, BLOCK.findall(body)))
    return found


CHAPTERS = [chapter for chapter in chapters() if chapter.blocks]


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package: its files alone, as they stand here."""
    root = tmp_path_factory.mktemp("copy") / "cinemesh"
    for folder in (*FOLDERS, "configs"):
        shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for path in ROOT.glob("*.py"):
        shutil.copy(path, root / path.name)
    return root


def apply(root: Path, file: str, how: str, line: str, text: str) -> None:
    """Put ``text`` in front of, or in place of, the first line that begins with ``line``, whatever its indent."""
    path = root / file
    lines = path.read_text().splitlines(keepends=True)
    at = next((i for i, other in enumerate(lines) if other.strip().startswith(line.strip())), None)
    assert at is not None, f"{file} has no line {line!r} any more"
    lines[at : at + (how == "instead of")] = [text]
    path.write_text("".join(lines))


def run(root: Path, *command: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(root.parent)}
    return subprocess.run(command, cwd=root.parent, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda chapter: chapter.title)
def test_a_chapter_does_what_it_says(chapter: Chapter, package: Path, tmp_path: Path) -> None:
    root = tmp_path / "cinemesh"
    shutil.copytree(package, root)
    touched: list[str] = []
    for language, said, text in chapter.blocks:
        edit = EDIT.fullmatch(said)
        if language == "sh":
            for line in text.splitlines():
                program, *arguments = shlex.split(line)
                assert program == "cinemesh"
                done = run(root, *CINEMESH, *arguments)
                assert done.returncode == 0, done.stdout + done.stderr
        elif said == "check":
            done = run(root, sys.executable, "-c", text)
            assert done.returncode == 0, done.stdout + done.stderr
        elif edit is not None:
            apply(root, edit[1], edit[2], edit[3], text)
            touched.append(edit[1])
        else:
            assert not (root / said).exists(), f"{said} is there already"
            (root / said).write_text(text)
            touched.append(said)
    assert list(dict.fromkeys(touched)) == chapter.files, "the files that a chapter names are those that it changes"
    assert chapter.blocks[-1][0] == "sh" or chapter.blocks[-1][1] == "check", "a chapter ends with its proof"


def test_without_its_code_a_proof_fails(package: Path) -> None:
    """A proof that held before would prove nothing."""
    for chapter in CHAPTERS:
        language, _, text = chapter.blocks[-1]
        if any(toy in text for toy in ("--model tiny-", "toy", "kv_parts", "import low_rank", "widths")):
            line = text.splitlines()[0]
            command = [*CINEMESH, *shlex.split(line)[1:]] if language == "sh" else [sys.executable, "-c", text]
            assert run(package, *command).returncode != 0, chapter.title


AXES = {"tp", "cp", "dp_shard", "dp_replicate"}


def names_an_axis(path: Path) -> bool:
    """In code: as a text, a field or a keyword."""
    nodes = ast.walk(ast.parse(path.read_text()))
    named = (getattr(node, what, None) for node in nodes for what in ("value", "attr", "arg"))
    return any(isinstance(name, str) and name in AXES for name in named)


def test_the_chapter_on_axes_lists_where_they_are_named() -> None:
    """Nobody can replay a fifth axis on a toy, but where the four stand can be counted."""
    chapter = next(text for text in PAGE.split("\n## ") if text.startswith("An axis"))
    listed = set(re.findall(r"`([a-z_/]+\.py)`", chapter))
    assert listed == {str(path.relative_to(ROOT)) for path in sources(ROOT) if names_an_axis(path)}
