"""The size study: its runs, its logs, and the committed ones of chapter 14."""

import csv
import json
from pathlib import Path

import pytest

from bitnet_edu.training import study, village

LOGS = Path(study.__file__).parents[1] / "data" / "size_study"


@pytest.fixture
def short(monkeypatch) -> study.Run:
    for name, value in {"STEPS": 4, "EACH": 2, "WARMUP": 1, "DOCUMENTS": 60}.items():
        monkeypatch.setattr(study, name, value)
    return study.Run(32, "ternary", 8e-3, 0)


def rows_of(file: Path) -> list[dict[str, float]]:
    with file.open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    return [{key: float(value) for key, value in row.items() if value} for row in rows]


def test_a_log_is_written_once(short: study.Run, tmp_path: Path) -> None:
    assert "held-out loss" in study.write_log(short, tmp_path)
    (file,) = tmp_path.iterdir()
    rows = rows_of(file)
    assert [row["step"] for row in rows] == [2, 4]
    assert rows[-1]["tokens"] == 4 * study.ROWS * study.LENGTH
    before = file.read_bytes()
    study.write_log(short, tmp_path)
    assert file.read_bytes() == before


def test_runs_differ_by_what_they_say(short: study.Run) -> None:
    rows = {}
    for run in (short, study.Run(32, "full", 8e-3, 0), study.Run(32, "ternary", 8e-3, 1)):
        rows[run.name] = study.follow(run)[-1][5]
    assert len({round(loss, 6) for loss in rows.values()}) == 3
    assert study.follow(short)[-1][5] == pytest.approx(rows[short.name], rel=1e-4)


def test_the_three_texts_differ() -> None:
    seeds = (study.TRAINING, study.TUNING, study.HELD_OUT)
    texts = [{village.document(seed, index) for index in range(200)} for seed in seeds]
    assert all(len(a & b) < 100 for a in texts for b in texts if a is not b)


def test_bytes_follow_from_the_shape() -> None:
    size = study.count(32)
    assert size["linear"] == 2 * 12 * 32**2
    assert size["embedding"] == len(village.WORDS) * 32
    norms = 2 * (3 * 32 + 96) + 32
    rest = 2 * (size["embedding"] + norms)
    assert size["bytes_full"] == 2 * size["linear"] + rest
    assert size["bytes_2_bits"] == size["linear"] // 4 + 14 * 2 + rest
    assert size["bytes_2_bits"] - size["bytes_1.6_bits"] == size["linear"] // 4 - -(
        -size["linear"] // 5
    )


def test_the_committed_logs_are_those_of_this_script() -> None:
    told, wanted = json.loads((LOGS / "study.json").read_text()), study.description()
    for key in ("sizes", "compared", "sweep", "tokens", "warmup", "weight_decay", "vocabulary"):
        assert told[key] == wanted[key], key
    names = {*told["compared"], *told["sweep"]}
    assert {file.stem for file in LOGS.glob("*.csv")} == names
    for name in names:
        rows = rows_of(LOGS / f"{name}.csv")
        assert list(rows[-1]) == list(study.FIELDS)
        assert [row["step"] for row in rows] == [*range(study.EACH, study.STEPS + 1, study.EACH)]
        assert rows[-1]["tokens"] == told["tokens"]
    assert sum(file.stat().st_size for file in LOGS.iterdir()) < 300_000


@pytest.mark.parametrize("hidden", study.SWEEP)
@pytest.mark.parametrize("kind", study.KINDS)
def test_the_rates_are_near_the_best_of_the_sweep(kind: str, hidden: int) -> None:
    losses = {
        run.rate: rows_of(LOGS / f"{run.name}.csv")[-1]["tuning"]
        for run in study.sweep()
        if run.kind == kind and run.hidden == hidden
    }
    above = losses[study.rate_of(kind, hidden)] - min(losses.values())
    assert above == 0 if hidden == min(study.SWEEP) else above < 0.005
