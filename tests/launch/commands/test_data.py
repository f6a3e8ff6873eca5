"""``cinemesh data``: a run of two versions, what it drew, and what is damaged, withdrawn and refused."""

import json
from pathlib import Path
from typing import Any

import pytest
from training import recipe

from cinemesh.data.cache.version import version_names
from cinemesh.errors import CinemeshError
from cinemesh.launch.commands import data_versions
from cinemesh.launch.training import loop
from cinemesh.launch.training.feed import Feed
from cinemesh.launch.training.recipe import check_config


def trained(values: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> dict[int, list[int]]:
    """Ids by step, from 1, that a run loads."""
    loaded: dict[int, list[int]] = {}
    load = Feed.load

    def watched(self: Feed, step: int, runner: Any) -> None:
        load(self, step, runner)
        loaded[step + 1] = self.ids(step)

    with monkeypatch.context() as patch:
        patch.setattr(Feed, "load", watched)
        loop.train(check_config(values, "test"))
    return loaded


def test_a_run_changes_its_version_and_tells_what_it_drew(
    clips: Path, tmp_path: Path, one_process: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    values = recipe(clips, tmp_path)
    values["sample"] = None
    values["schedule"]["steps"] = 4
    cache, run = tmp_path / "cache", tmp_path / "run"
    seen = trained(values, monkeypatch)
    (first,) = version_names(cache)
    data_versions.run_withdraw(cache=cache, clips=["right"], version=None)
    second = version_names(cache)[-1]
    values["schedule"]["steps"] = 7
    with pytest.raises(CinemeshError, match=rf"data\.contents: 0: {first} -> 0: "):
        loop.train(check_config(values, "test"))  # what the recipe makes now is another
    values["data"]["versions"] = {"0": first}
    with pytest.raises(
        CinemeshError, match=rf"withdrawn since: right; .*data\.versions={{0: {first}, 4: [0-9a-f]{{16}}}}"
    ):
        loop.train(check_config(values, "test"))
    values["data"]["versions"] = {"0": first, "4": second}
    seen |= trained(values, monkeypatch)
    assert sorted(seen) == list(range(1, 8))

    capsys.readouterr()
    data_versions.run_seen(run=run, clip="right", sample_id=None, as_json=True)
    told = json.loads(capsys.readouterr().out)
    (where,) = told["seen"]
    assert told["until"] == 7 and where["version"] == first
    ids = {*where["ids"]}
    assert where["steps"] == [step for step in range(1, 8) for i in seen[step] if i in ids]
    assert where["steps"] and max(where["steps"]) <= 4
    data_versions.run_seen(run=run, clip=None, sample_id=0, as_json=True)
    found = json.loads(capsys.readouterr().out)["seen"]
    assert [one["version"] for one in found] == [first, second]
    assert [step for one in found for step in one["steps"]] == [step for step in seen for i in seen[step] if i == 0]
    data_versions.run_seen(run=run, clip="left", sample_id=None, as_json=False)
    assert f"version {second}, bucket 8x32x32: " in capsys.readouterr().out
    with pytest.raises(CinemeshError, match="has a training row of clip 'nobody'"):
        data_versions.run_seen(run=run, clip="nobody", sample_id=None, as_json=False)
    with pytest.raises(CinemeshError, match="takes --clip or --id"):
        data_versions.run_seen(run=run, clip=None, sample_id=None, as_json=False)

    data_versions.run_show(cache=cache, as_json=True)
    listed = json.loads(capsys.readouterr().out)
    assert next(one for one in listed if one["version"] == second)["withdrawn"] == 1
    assert data_versions.run_check(cache=cache, version=first) == 0
    (tar,) = (cache / "latents").glob("*/8x32x32.train.tar")
    data = tar.read_bytes()
    tar.write_bytes(data[:700] + bytes([data[700] ^ 1]) + data[701:])
    assert data_versions.run_check(cache=cache, version=first) == 1
    assert f"{tar} is damaged at offset 512: " in capsys.readouterr().out
    with pytest.raises(CinemeshError, match="holds no version of a latent cache"):
        data_versions.run_show(cache=tmp_path / "nowhere", as_json=False)
