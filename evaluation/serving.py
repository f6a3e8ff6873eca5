"""The page on which people judge, served to this machine alone.

It gives out the page, the files that ``pairs.json`` names, and a rater's own votes: nothing else has an address, so
that no path leaves the folder, and no key is seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from http import HTTPStatus
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from ..errors import CinemeshError
from .ballot_box import BallotBox
from .blinding import CLIPS, BlindPairs, read_pairs
from .examples import FOLDER_NAME, AxisExample, read_examples
from .local_page import LocalHandler, LocalServer, rendered

MOST_BYTES_OF_A_VOTE = 10_000  # a name and four words


def page_of(shown: BlindPairs, examples: Sequence[AxisExample] = ()) -> bytes:
    """One file: style, script and guidelines inside it; pairs and votes come by request."""
    axes = [
        {"name": axis.name, "question": axis.question, "guideline": axis.guideline,
         "reasons": [{"name": name, "text": text} for name, text in axis.reasons.items()]}
        for axis in shown.axes
    ]  # fmt: skip
    pairs = {pair.name: {"prompt": pair.prompt, "left": pair.left, "right": pair.right} for pair in shown.pairs}
    given = {"media": shown.media, "rate": shown.rate, "axes": axes, "pairs": pairs}
    by_axis = {axis.name: [each for each in examples if each.axis == axis.name] for axis in shown.axes}
    return rendered("judge.html", given=given, axes=shown.axes, media=shown.media, examples=by_axis)


class JudgeServer(LocalServer):
    """Serves the pairs of a folder; ``port`` 0 takes a free one. Raises CinemeshError where it cannot."""

    def __init__(self, folder: Path, port: int) -> None:
        shown, examples = read_pairs(folder), read_examples(folder)
        names = [name for each in examples for name in (each.better, each.worse)]
        self.examples = {name: folder / FOLDER_NAME / name for name in names}
        self.files = {name: folder / CLIPS / name for pair in shown.pairs for name in (pair.left, pair.right)}
        self.box = BallotBox(folder, shown)
        try:
            super().__init__(page_of(shown, examples), port, JudgeHandler)
        except CinemeshError:
            self.box.close()
            raise

    def server_close(self) -> None:
        super().server_close()
        self.box.close()


class JudgeHandler(LocalHandler):
    server: JudgeServer  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_GET(self) -> None:
        """The page, a file of a pair, or where a rater stands."""
        if not self.is_local():
            return
        asked = urlsplit(self.path)
        if asked.path == "/":
            self.send_page()
        elif asked.path == "/state":
            rater = parse_qs(asked.query).get("rater", [""])[0]
            voted = {pair: {axis: [vote.answer, vote.reason] for axis, vote in votes.items()}
                     for pair, votes in self.server.box.of(rater).items()}  # fmt: skip
            self.send_json({"open": self.server.box.open_to(rater), "voted": voted})
        elif (file := self._file(asked.path)) is not None:
            self.send_file(file)
        else:
            self.refuse(HTTPStatus.NOT_FOUND, "there is no such page")

    def _file(self, path: str) -> Path | None:
        """Of a pair, or an example."""
        clip, example = path.removeprefix(f"/{CLIPS}/"), path.removeprefix(f"/{FOLDER_NAME}/")
        return self.server.files.get(clip) or self.server.examples.get(example)

    def do_POST(self) -> None:
        """A vote."""
        self.save("/vote", "the vote", MOST_BYTES_OF_A_VOTE, self.server.box.add)
