"""The page on which people accept, edit or reject rewrites, served to this machine alone."""

from __future__ import annotations

from dataclasses import asdict
from http import HTTPStatus
from pathlib import Path

from ...errors import CinemeshError
from ..journal import LastAnswers
from ..local_page import LocalHandler, LocalServer, rendered
from .guideline import PART_NAMES
from .review import VERDICTS_FILE, read_review, read_verdicts, verdict_of

MOST_BYTES_OF_A_VERDICT = 30_000  # a name and five parts


class ReviewServer(LocalServer):
    """Serves the rewrites of a folder; ``port`` 0 takes a free one. Raises CinemeshError where it cannot."""

    def __init__(self, folder: Path, port: int) -> None:
        review = read_review(folder)
        shown = [{**asdict(each), "parts": asdict(each.parts) if each.parts else None}
                 for each in review.proposals.values()]  # fmt: skip
        page = rendered(
            "review.html", given={"rewrites": shown, "parts": PART_NAMES}, parts=asdict(review.guideline.parts),
            instruction=review.guideline.instruction, words=review.guideline.words,
        )  # fmt: skip
        self._review = review
        self.verdicts = LastAnswers(folder / VERDICTS_FILE, lambda: read_verdicts(folder, review))
        try:
            super().__init__(page, port, ReviewHandler)
        except CinemeshError:
            self.verdicts.close()
            raise

    def add(self, row: object) -> None:
        """Write a verdict as JSON has it, and wait for the disk. Raises CinemeshError as ``verdict_of``."""
        verdict = verdict_of(row, "the verdict", self._review)
        self.verdicts.add(verdict.name, verdict)

    def server_close(self) -> None:
        super().server_close()
        self.verdicts.close()


class ReviewHandler(LocalHandler):
    server: ReviewServer  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_GET(self) -> None:
        """The page, or the verdicts so far."""
        if not self.is_local():
            return
        if self.path == "/":
            self.send_page()
        elif self.path == "/state":
            self.send_json({name: asdict(verdict) for name, verdict in self.server.verdicts.given().items()})
        else:
            self.refuse(HTTPStatus.NOT_FOUND, "there is no such page")

    def do_POST(self) -> None:
        """A verdict."""
        self.save("/verdict", "the verdict", MOST_BYTES_OF_A_VERDICT, self.server.add)
