"""Where a run's reports go beside the log: Prometheus' text, the account of its time, alarms, and its GPUs."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training import start

from cinemesh.errors import CinemeshError
from cinemesh.launch.cluster.cards import CardFacts
from cinemesh.launch.training import card_watch
from cinemesh.launch.training.card_watch import CardWatch
from cinemesh.launch.training.drift import Drift
from cinemesh.launch.training.goodput import GOODPUT_FILE, GoodputAccount, LossCause
from cinemesh.launch.training.prometheus import EDGES_S, PROM_FILE, PrometheusFile
from cinemesh.launch.training.telemetry import read_metrics

pytestmark = pytest.mark.usefixtures("one_process")
SAMPLE = re.compile(r"(?P<name>[a-zA-Z_:][a-zA-Z0-9_:]*)\{(?P<labels>[^{}]*)\} (?P<value>\S+)")
LABEL = re.compile(r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\]|\\.)*)"')


def exposed(path: Path) -> dict[tuple[str, str], float]:
    """By name and what else labels it, as the text format's grammar has them; each family has its type before it."""
    found: dict[tuple[str, str], float] = {}
    typed: dict[str, str] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("# TYPE "):
            _, _, name, kind = line.split()
            assert name not in typed, "a family stands in one piece"
            typed[name] = kind
        elif not line.startswith("#"):
            matched = SAMPLE.fullmatch(line)
            assert matched, line
            labels = dict(LABEL.findall(matched["labels"]))
            assert labels.pop("run")
            family = re.sub("_(bucket|sum|count)$", "", matched["name"])
            assert (family if typed.get(family) == "histogram" else matched["name"]) in typed
            found[matched["name"], ",".join(labels.values())] = float(matched["value"])
    return found


def test_a_run_is_exposed_and_its_time_accounted_for(values: dict[str, Any], tmp_path: Path) -> None:
    """The last report's numbers, every step in the histograms, and causes that sum, with the steps, to the wall."""
    values["logging"] |= {"every": 2, "validate_every": 3, "checkpoint_every": 3}
    assert start(values, tmp_path) == 0
    run = tmp_path / "run"
    rows = [row for row in read_metrics(run) if "loss" in row]
    found = exposed(run / PROM_FILE)
    assert found["cinemesh_steps_total", ""] == 6
    assert found["cinemesh_loss", ""] == rows[-1]["loss"] and found["cinemesh_step_seconds", ""] == rows[-1]["step_s"]
    assert found["cinemesh_goodput_ratio", ""] == rows[-1]["goodput"]
    counts = [found["cinemesh_step_duration_seconds_bucket", repr(edge)] for edge in EDGES_S]
    assert counts == sorted(counts) and found["cinemesh_step_duration_seconds_bucket", "+Inf"] == 6
    total_s = sum(2 * row["step_s"] for row in rows)
    assert found["cinemesh_step_duration_seconds_sum", ""] == pytest.approx(total_s)
    saved = json.loads((run / GOODPUT_FILE).read_text())
    assert saved["step"] == saved["steps"] == 6
    assert {"start", "loading", "validation", "checkpoint"} <= saved["lost_s"].keys()
    assert saved["useful_s"] + sum(saved["lost_s"].values()) == pytest.approx(saved["until"] - saved["begun"], rel=1e-6)
    (events,) = (run / "tensorboard").glob("events*")
    histograms = EventAccumulator(str(events), size_guidance={"histograms": 0}).Reload().Histograms("step_s/of each")
    assert [(one.step, one.histogram_value.num) for one in histograms] == [(2, 2), (4, 2), (6, 2)]


def test_a_start_accounts_for_what_the_one_before_lost(tmp_path: Path) -> None:
    """By hand: 4 steps of 10 s, saved after 1; a start 500 s after the last report takes 3 of them again."""
    account = GoodputAccount.of(tmp_path, 0, 1000.0)
    for _ in range(4):
        account.add_step(10.0, counts=True)
    account.add_step(7.0, counts=False)
    account.lose(LossCause.LOADING, 3.0)
    assert account.settle(1100.0) == pytest.approx(0.4) and account.lost_s[LossCause.OTHER] == pytest.approx(50.0)
    account.write(1100.0)
    again = GoodputAccount.of(tmp_path, 2, 1600.0)
    assert (again.steps, again.useful_s) == (1, 10.0), "steps 3 to 5 are taken again"
    assert again.lost_s[LossCause.REDONE] == pytest.approx(30.0) and again.lost_s[LossCause.DOWN] == 500.0
    assert again.lost_s[LossCause.SKIPPED] == 7.0 and again.settle(1600.0) == pytest.approx(10.0 / 600.0)
    (tmp_path / GOODPUT_FILE).write_text('{"begun": -1}')
    with pytest.raises(CinemeshError, match="the account"):
        GoodputAccount.of(tmp_path, 0, 0.0)


def test_what_is_lost_inside_is_its_cause_s_also_when_it_fails(tmp_path: Path) -> None:
    account = GoodputAccount.of(tmp_path, 0, 0.0)
    with pytest.raises(ValueError, match="disk"), account.losing(LossCause.CHECKPOINT):
        raise ValueError("disk")
    assert account.lost_s[LossCause.CHECKPOINT] > 0.0 and account.lost_s[LossCause.VALIDATION] == 0.0


def test_an_alarm_tells_of_a_drift_once_and_of_its_end() -> None:
    """Within a tenth nothing; the first report, which is slow, does not set what the others are held to."""
    drift = Drift()
    assert [drift.look(ratio) for ratio in (0.2, 0.8, 0.82, 0.8, 0.75, 0.85)] == [None] * 6
    said = drift.look(0.6)
    assert said is not None and "1.33 times as long" in said and "0.6, and was 0.8 at first" in said and drift.drifted
    assert drift.look(0.55) is None
    assert "as long as at first" in (drift.look(0.79) or "") and not drift.drifted


def test_labels_are_escaped_and_edges_belong_to_their_bucket(tmp_path: Path) -> None:
    """``le`` is less or equal; a folder's name may hold anything."""
    file = PrometheusFile(tmp_path / "a.prom", 'a"b\\c\nd')
    file.write(1, {"loss": 1.0, "unknown": 2.0}, [EDGES_S[3], EDGES_S[3] * 1.01, 1e9], {LossCause.DOWN: 2.5})
    found = exposed(tmp_path / "a.prom")
    at = [found["cinemesh_step_duration_seconds_bucket", repr(edge)] for edge in EDGES_S[2:5]]
    assert at == [0, 1, 2] and found["cinemesh_step_duration_seconds_count", ""] == 3
    assert found["cinemesh_lost_seconds_total", "down"] == 2.5 and 'run="a\\"b\\\\c\\nd"' in file.path.read_text()
    file.write(2, {"validation_loss": 3.0}, (), {})
    assert {exposed(file.path)[f"cinemesh_{name}", ""] for name in ("loss", "validation_loss")} == {1.0, 3.0}


class Store:
    """A job's store, in a dictionary; a key that is not there would be waited for."""

    def __init__(self) -> None:
        self.held: dict[str, bytes] = {}

    def set(self, key: str, text: str) -> None:
        self.held[key] = text.encode()

    def check(self, keys: list[str]) -> bool:
        return all(key in self.held for key in keys)

    def multi_get(self, keys: list[str]) -> list[bytes]:
        return [self.held[key] for key in keys]


def test_the_job_s_gpus_are_told_by_every_machine_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two machines of two ranks: the second rank of each says nothing; before both have spoken there is no report."""
    card = CardFacts(index=0, name="H100", memory_bytes=80, used_bytes=1, clock_mhz=1980, power_w=650.0,
                     temperature_c=60, ecc_errors=0)  # fmt: skip
    hot = replace(
        card, index=1, clock_mhz=1200, power_w=350.0, temperature_c=88, ecc_errors=2, slowed=("heat (software)",)
    )
    store: Any = Store()
    watches = [CardWatch(rank, 4, 2, store) for rank in range(4)]

    def told_on(rank: int, host: str, cards: list[CardFacts]) -> None:
        monkeypatch.setattr(card_watch, "cards_here", lambda: (cards, ""))
        monkeypatch.setattr(card_watch, "socket", SimpleNamespace(gethostname=lambda: host))
        watches[rank].tell()

    told_on(0, "n1", [card])
    told_on(1, "n1", [hot])
    assert watches[0].read() == {} and watches[0].values({}) == {}
    told_on(2, "n2", [card, hot])
    found = watches[0].read()
    assert found == {"n1": [card], "n2": [card, hot]}
    values = watches[0].values(found)
    assert (values["gpu_power_w"], values["gpu_clock_mhz"], values["gpu_temperature_c"]) == (550.0, 1200.0, 88.0)
    assert (values["gpu_ecc_errors"], values["gpus_slowed"]) == (2.0, 1.0)
    assert watches[0].news(found) == "WARNING: clocks are held down: GPU 1 of n2: heat (software)"
    assert watches[0].news(found) is None and "any more" in (watches[0].news({"n1": [card]}) or "")
