"""Sentences about times say what the times say."""

import psutil
import pytest

from bitnet_edu.book.timing import bystanders, compared


@pytest.mark.parametrize(
    ("ours", "theirs", "verb"),
    [
        ([1, 1, 1], [2, 2, 2], "is 2.0 times as fast as"),
        ([3, 3, 3], [1, 1, 1], "takes 3.0 times as long as"),
        ([1.0], [1.05], "takes about as long as"),
        ([1.05], [1.0], "takes about as long as"),
        ([1, 2, 9, 9], [2, 2, 3, 3], "takes about as long as"),  # scattered: the halves overlap
        ([2.5], [1.0], "takes 2.5 times as long as"),
        ([1234.0], [1.0], "takes 1,234 times as long as"),
        ([1.0, 1.0, 50.0], [4.0, 4.0, 4.0], "takes about as long as"),
        ([1.0] * 9 + [50.0], [4.0] * 10, "is 4.0 times as fast as"),  # one disturbed call
    ],
)
def test_compared(ours, theirs, verb):
    assert compared(ours, theirs) == verb


def test_bystanders(monkeypatch):
    for percent, word in ((3, "little stands in the way"), (40, "trust no single time")):
        monkeypatch.setattr(psutil, "cpu_percent", lambda seconds, percent=percent: percent)
        assert f"{percent}%" in bystanders()
        assert word in bystanders()
