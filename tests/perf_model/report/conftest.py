"""A report of a small model on a small cluster: the searches are real, and quick."""

from dataclasses import replace
from pathlib import Path

import pytest

from cinemesh.model.config import preset
from cinemesh.perf_model.clusters.cluster import load
from cinemesh.perf_model.report import landscape, report
from cinemesh.perf_model.report.page import Story
from cinemesh.perf_model.search.planner import Search, search
from cinemesh.perf_model.search.request import LatentBucket, Request


@pytest.fixture(scope="session")
def request_and_search() -> tuple[Request, Search]:
    config = replace(preset("tiny"), layers=6)
    request = Request(config, (LatentBucket((2, 8, 8)),), load("grand-teton-h100"), 16, shown=3, fixed={"cp": 2})
    return request, search(request)


@pytest.fixture(scope="session")
def written(
    request_and_search: tuple[Request, Search], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[Story]]:
    """The folder of a report, and the story that its page was told."""
    folder = tmp_path_factory.mktemp("reports") / "new" / "report"
    stories: list[Story] = []
    render = report.render
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(landscape, "SIZES", (8, 32))
        patch.setattr(landscape, "DEALS", ((1, 1), (1, 2)))
        patch.setattr(report, "render", lambda story, pictures: (stories.append(story), render(story, pictures))[1])
        report.write(folder, *request_and_search)
    return folder, stories
