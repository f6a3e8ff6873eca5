"""The page on which people accept, edit or reject rewrites, served to this machine alone."""

from __future__ import annotations

from dataclasses import asdict
from http import HTTPStatus
from pathlib import Path

from ...errors import CinemeshError
from ..journal import Journal
from ..local_page import LocalHandler, LocalServer, rendered
from .guideline import PART_NAMES
from .review import VERDICTS_FILE, Review, ReviewVerdict, read_review, read_verdicts, verdict_of

MOST_BYTES_OF_A_VERDICT = 30_000  # a name and five parts


class Verdicts:
    """Those of a folder, and where they are written."""

    def __init__(self, folder: Path, review: Review) -> None:
        self._review = review
        self._journal = Journal(folder / VERDICTS_FILE)
        self._given = read_verdicts(folder, review)

    def close(self) -> None:
        self._journal.close()

    def add(self, row: object) -> None:
        """Write one as JSON has it, and wait for the disk. Raises CinemeshError as ``verdict_of``."""
        verdict = verdict_of(row, "the verdict", self._review)
        with self._journal.lock:
            self._journal.add(verdict.line())
            self._given[verdict.name] = verdict

    def given(self) -> dict[str, ReviewVerdict]:
        """The last on each rewrite, by name."""
        with self._journal.lock:
            return dict(self._given)


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
        self.verdicts = Verdicts(folder, review)
        try:
            super().__init__(page, port, ReviewHandler)
        except CinemeshError:
            self.verdicts.close()
            raise

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
        if not self.is_local():
            return
        try:
            self.server.verdicts.add(self.posted("/verdict", "the verdict", MOST_BYTES_OF_A_VERDICT))
        except CinemeshError as error:
            return self.refuse(HTTPStatus.BAD_REQUEST, str(error))
        except OSError as error:
            return self.refuse(HTTPStatus.INSUFFICIENT_STORAGE, f"the verdict is not saved: {error.strerror}")
        self.send_json({"saved": True})
