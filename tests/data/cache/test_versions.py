"""Versions: immutable, named by what they say, with rows added and withdrawn; and which steps of a run drew what."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from latent_caches import CLIPS, built, data_of, scenes_yaml, small_units

from cinemesh.data.batches import BatchHistory
from cinemesh.data.cache import index as indexing
from cinemesh.data.cache.drawn import Drawn, RunOrder
from cinemesh.data.cache.history import History
from cinemesh.data.cache.version import VersionChange, changes_of, version_names, withdraw
from cinemesh.errors import CinemeshError
from cinemesh.launch.training import seen as seeing

WINDOWS = [5 + 2 * n for n in range(CLIPS)]  # of a clip of 16 + 4 n frames: firsts 0, 2 ... 8 + 4 n


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    small_units(monkeypatch)
    return tmp_path / "cache"


def test_a_version_is_what_it_is_made_of_wherever_it_is_built(root: Path, tmp_path: Path) -> None:
    settings = data_of(tmp_path)
    cache = built(settings, root)
    (bucket,) = cache.buckets
    assert Counter(bucket.train.scenes) == {f"c{n}": WINDOWS[n] for n in range(CLIPS)}
    assert bucket.train.ids(range(len(bucket.train))) == list(range(sum(WINDOWS)))
    assert len(cache.version.shards) == 6  # three units: a tar of windows and one of captions each
    assert built(settings, tmp_path / "other").name == cache.name == built(settings, root).name
    (root / cache.version.file).write_text(cache.version.text.replace('"skipped": 0', '"skipped": 1'))
    with pytest.raises(CinemeshError, match=r"versions/.*\.json is not what its name says"):
        built(settings, root)
    with pytest.raises(CinemeshError, match=r"has no version 'nonsense'"):
        History.open(str(root), [VersionChange(0, "nonsense")])


def test_a_caption_that_is_written_anew_or_added_encodes_no_window(root: Path, tmp_path: Path) -> None:
    settings = data_of(tmp_path)
    first = built(settings, root)
    latents = {path: path.stat().st_mtime_ns for path in (root / "latents").rglob("*")}
    settings.captions.write_text(scenes_yaml(CLIPS, " Newly told"))
    second = built(settings, root)
    assert {path: path.stat().st_mtime_ns for path in (root / "latents").rglob("*")} == latents
    assert second.name != first.name and second.buckets[0].train[0].caption == "FPS-15 Grey 0. Newly told"
    assert first.buckets[0].train[0].caption == "FPS-15 Grey 0."  # it reads on as it was


def test_rows_that_are_added_keep_the_ids_of_the_others(root: Path, tmp_path: Path) -> None:
    settings = data_of(tmp_path)
    settings.captions.write_text(scenes_yaml(4))
    first = built(settings, root)
    ids = dict(zip(enumerate(first.buckets[0].train.scenes), range(100), strict=False))
    settings.captions.write_text(scenes_yaml(6))
    second = built(settings, root, after=first.name)
    train = second.buckets[0].train
    assert train.ids(range(len(ids))) == list(ids.values()) and second.version.after == first.name
    assert sorted(train.ids(range(len(train)))) == list(range(sum(WINDOWS)))


def test_a_withdrawn_clip_is_in_no_later_version_and_no_run_draws_it(root: Path, tmp_path: Path) -> None:
    settings = data_of(tmp_path)
    first = built(settings, root)
    made = withdraw(root, first.name, ["c1", "c4"])
    second = History.open(str(root), [VersionChange(0, made.name)]).at(0)
    kept = {f"c{n}": WINDOWS[n] for n in (0, 2, 3, 5)}
    assert Counter(second.buckets[0].train.scenes) == kept
    assert made.after == first.name and version_names(root)[-1] == made.name
    assert made.buckets[0].rates == {"15": sum(kept.values())}
    before = dict(zip(first.buckets[0].train.ids(range(sum(WINDOWS))), first.buckets[0].train.scenes, strict=True))
    train = second.buckets[0].train
    assert [before[i] for i in train.ids(range(len(train)))] == train.scenes  # ids stay
    again = built(settings, root)  # the recipe's own version lacks them from here on
    assert Counter(again.buckets[0].train.scenes) == kept and again.version.withdrawn == ("c1", "c4")
    with pytest.raises(CinemeshError, match="no row of clip c9"):
        withdraw(root, first.name, ["c9"])

    for changes, since, drawn in (
        ([VersionChange(0, first.name)], 0, True),
        ([VersionChange(0, first.name)], 7, True),
        ([VersionChange(0, first.name), VersionChange(6, made.name)], 5, True),
        ([VersionChange(0, first.name), VersionChange(6, made.name)], 6, False),
        ([VersionChange(0, made.name)], 0, False),
    ):
        history = History.open(str(root), changes)
        if drawn:
            with pytest.raises(CinemeshError, match=r"2 of its clips were withdrawn since: c1, c4; go on with .*0: "):
                history.check_withdrawn(since, 10)
        else:
            history.check_withdrawn(since, 10)
    History.open(str(root), [VersionChange(0, first.name)]).check_withdrawn(10, 10)  # it is done


def test_a_part_of_the_index_without_a_withdrawn_row_stays(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(indexing, "PART_ROWS", 10)
    first = built(data_of(tmp_path), root)
    made = withdraw(root, first.name, ["c5"])
    old, new = ([part.file for part in of.buckets[0].train] for of in (first.version, made))
    assert len(old) == 6 and set(old) & set(new) == {*old[:4]} and len(new) == 5


def test_a_run_s_samples_change_at_the_stated_step_and_are_told(root: Path, tmp_path: Path) -> None:
    settings = data_of(tmp_path)
    first = built(settings, root)
    second = withdraw(root, first.name, ["c2"]).name
    order = RunOrder(seed=3, steps=40, weights=(1.0,), batches=BatchHistory.always((12,)))
    plain = Drawn(order, History.open(str(root), [VersionChange(0, first.name)]))
    history = History.open(str(root), changes_of({"0": first.name, "17": second}))
    changed = Drawn(order, history)
    ids = [changed.at(step).train.ids(changed.indices(step)) for step in range(40)]
    assert ids[:17] == [plain.at(step).train.ids(plain.indices(step)) for step in range(17)]
    gone = set(plain.at(0).train.ids([i for i, c in enumerate(first.buckets[0].train.scenes) if c == "c2"]))
    assert gone & {i for step in ids[:17] for i in step} and not gone & {i for step in ids[17:] for i in step}
    rows = len(history.at(17).buckets[0].train)
    epoch = [i for step in ids[17:] for i in step][:rows]
    assert len(set(epoch)) == rows  # it begins with an epoch of its own
    assert epoch != [i for step in ids[:17] for i in step if i not in gone][:rows]

    # What `cinemesh data seen` inverts, against every step looked at.
    for wanted in (0, 20, sum(WINDOWS) - 1, *sorted(gone)[:1]):
        steps: list[int] = []
        for number, draws in enumerate(history.draws):
            train = draws.cache.buckets[0].train
            places = [i for i, of in enumerate(train.ids(range(len(train)))) if of == wanted]
            steps += changed.steps_of(number, 0, places, 33)
        assert steps == [step for step in range(33) for i in ids[step] if i == wanted]


def test_where_rows_are_repeated_each_is_told(root: Path, tmp_path: Path) -> None:
    cache = built(data_of(tmp_path), root, balance=1.0)
    history = History.open(str(root), [VersionChange(0, cache.name)])
    index = indexing.Index(cache.storage, cache.version.buckets[0].train)
    places, ids = seeing._rows(index, "c0", None)
    assert len(places) == 15 and Counter(ids) == dict.fromkeys(range(5), 3)
    drawn = Drawn(RunOrder(0, 30, (1.0,), BatchHistory.always((7,))), history)
    taken = [index for step in range(30) for index in drawn.indices(step)]
    assert len(drawn.steps_of(0, 0, places, 30)) == sum(place in places for place in taken)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"5": "a"}, r"begins at step 5; say which version the run begins with"),
        ({"0": "a", "x": "b"}, r"'x' is no step"),
        ({"0": "a", "-3": "b"}, r"'-3' is no step"),
        ({"0": "a", "00": "b"}, r"names a step twice"),
    ],
)
def test_a_history_that_cannot_be_meant_is_refused(given: dict[str, str], said: str) -> None:
    with pytest.raises(CinemeshError, match=said):
        changes_of(given)


def test_versions_of_other_buckets_are_of_no_one_run(root: Path, tmp_path: Path) -> None:
    settings = data_of(tmp_path)
    names = [built(settings, root).name, built(replace(settings, frames=16), root).name]
    with pytest.raises(CinemeshError, match="differ in their buckets, codec or encoders; only rows may be added"):
        History.open(str(root), [VersionChange(0, names[0]), VersionChange(4, names[1])])


def test_a_list_of_withdrawn_clips_that_is_damaged_is_told(root: Path, tmp_path: Path) -> None:
    built(data_of(tmp_path), root)
    (root / "withdrawn.json").write_text(json.dumps({"c1": 1}))
    with pytest.raises(CinemeshError, match="is no list of clips; restore it"):
        built(data_of(tmp_path), root)
