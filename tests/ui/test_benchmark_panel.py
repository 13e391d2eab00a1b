"""The benchmark panel measures for real, on the tiny model, and says what it cannot do."""

import base64
import io
import json
import re

import pandas as pd
import pytest

from bitnet_edu.errors import InputError
from bitnet_edu.ui import benchmark
from bitnet_edu.ui.benchmark import BenchmarkPanel, parse_contexts

PATIENCE = 120  # seconds


@pytest.fixture
def panel():
    panel = BenchmarkPanel("tiny")
    panel.repeats.value = 2
    panel.contexts.value = "16, 64"
    panel.prompt.value = 32
    return panel


def saved(page: str, name: str) -> str:
    return base64.b64decode(re.search(rf'download="{name}" href="[^,]*,([^"]+)"', page)[1]).decode()


def test_one_click_measures_and_offers_the_figures(panel):
    panel.sweep.value = True
    panel.start.click()
    assert panel.start.disabled
    panel.wait(PATIENCE)
    assert not panel.start.disabled
    page = panel.output.value
    assert "time to first token" in page
    assert '<img alt="Decode speed' in page
    table = pd.read_csv(io.StringIO(saved(page, "results.csv")))
    assert set(table["what"]) == {"decode, context 16", "decode, context 64", "prefill, 32 tokens"}
    assert (table["min"] <= table["median"]).all()
    assert (table["median"] <= table["max"]).all()
    results = json.loads(saved(page, "results.json"))
    assert [r["threads"] for r in results] == list(range(1, len(results) + 1))
    assert table["threads"].max() == len(results)


@pytest.mark.parametrize("text", [None, 64, [64], b"64"])
def test_contexts_of_a_wrong_type_are_refused(text):
    with pytest.raises(InputError, match="contexts must be"):
        parse_contexts(text)


class PanicException(BaseException):
    """What PyO3 makes of a panic in Rust."""


@pytest.mark.parametrize("error", [PanicException, KeyboardInterrupt, RuntimeError, MemoryError])
def test_whatever_ends_the_worker_can_be_read_and_started_again(panel, monkeypatch, error):
    def broken(*arguments, **options):
        raise error("index out of range")

    monkeypatch.setattr(benchmark, "benchmark", broken)
    panel.measure()
    panel.wait(PATIENCE)
    assert panel.status.value == f"{error.__name__}: index out of range"
    assert not panel.start.disabled


@pytest.mark.parametrize("text", ["", "many", "64, -1", "0", "9" * 5_000, "a\ud800"])
def test_contexts_that_are_none_are_refused(panel, text):
    with pytest.raises(InputError, match="contexts"):
        parse_contexts(text)
    panel.contexts.value = text
    panel.measure()
    panel.wait(PATIENCE)
    assert "contexts must be" in panel.status.value
    assert not panel.start.disabled


def test_too_little_memory_is_said_before_anything_is_allocated(panel, monkeypatch):
    monkeypatch.setitem(benchmark.NEEDED, "2b4t", 1e15)
    panel.shape.value = "2b4t"
    panel.measure()
    panel.wait(PATIENCE)
    assert "GB of free memory" in panel.status.value
    assert panel.results == []
