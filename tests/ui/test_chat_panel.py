"""The chat panel's kernel side, without a page: messages in, traits out."""

import threading
import time

import pytest

from bitnet_edu.errors import BitNetError
from bitnet_edu.ui.chat import HUB_MODEL, ChatPanel

PATIENCE = 60  # seconds; a compiled kernel may have to be made first


@pytest.fixture
def panel():
    panel = ChatPanel("tiny")
    panel.wait(PATIENCE)
    assert not panel.busy
    assert not panel.notice
    return panel


def say(panel, name, value=None):
    panel.receive({"do": name, "value": value})
    panel.wait(PATIENCE)


def test_an_answer_appears_as_a_message(panel):
    say(panel, "send", "Hello!")
    assert [m["role"] for m in panel.messages] == ["user", "assistant"]
    assert panel.messages[1]["content"]
    assert panel.stats["context_used"] > 0
    assert panel.stats["first_token_seconds"] > 0
    assert panel.partial == ""
    assert not panel.busy


def test_stop_ends_the_answer_midway(panel, monkeypatch):
    forward, started = panel.session.model.forward, threading.Event()

    def slow_forward(ids, cache):
        time.sleep(0.05)
        return forward(ids, cache)

    monkeypatch.setattr(panel.session.model, "forward", slow_forward)
    panel.observe(lambda change: started.set() if change.new else None, "partial")
    panel.receive({"do": "send", "value": "Tell me a story about a fox."})
    assert started.wait(PATIENCE)
    panel.receive({"do": "stop"})
    panel.wait(PATIENCE)
    stopped = panel.messages[-1]["content"]
    monkeypatch.undo()
    say(panel, "again")
    whole = panel.messages[-1]["content"]
    assert len(panel.messages) == 2
    assert whole.startswith(stopped)
    assert len(stopped) < len(whole)


def test_greedy_again_gives_the_same_answer(panel):
    say(panel, "send", "What is a ternary weight?")
    first = panel.messages
    say(panel, "again")
    assert panel.messages == first


def test_turns_share_the_cache(panel):
    say(panel, "send", "Hello!")
    used = panel.session.context_used
    before = panel.session.cache.keys[:, :, :used].copy()
    say(panel, "send", "What is your name?")
    assert panel.session.context_used > used
    assert (panel.session.cache.keys[:, :, :used] == before).all()


@pytest.mark.parametrize(
    "text", ["<script>alert(1)</script>", "**bold**", "שלום", "🙂" * 20, "  spaces  ", "a\nb"]
)
def test_any_text_stays_text(panel, text):
    say(panel, "send", text)
    assert panel.messages[0] == {"role": "user", "content": text}
    assert not panel.notice


def test_a_message_that_does_not_fit_is_refused_and_the_conversation_stays(panel):
    say(panel, "send", "Hello!")
    before = panel.messages
    say(panel, "send", "word " * 2_000)  # 10,000 characters
    assert "context" in panel.notice
    assert panel.messages == before
    say(panel, "send", "Hello!")
    assert len(panel.messages) == 4


def test_a_full_context_offers_to_forget_the_oldest(panel):
    limit = panel.session.cache.max_len
    text = "What is a ternary weight? " * 12
    for _ in range(20):
        say(panel, "send", text)
        if panel.notice:
            break
    assert panel.full
    assert panel.unsent == text
    before = panel.messages
    say(panel, "forget")
    assert not panel.notice
    assert not panel.full
    assert panel.unsent == ""
    assert panel.messages[-2]["content"] == text
    assert panel.messages[:-2] == before[len(before) - len(panel.messages) + 2 :]
    assert panel.stats["context_used"] < limit


def test_a_message_longer_than_the_context_is_given_back(panel):
    say(panel, "send", "word " * 2_000)
    assert not panel.full  # forgetting would not help
    assert panel.unsent == "word " * 2_000
    say(panel, "send", "Hello!")
    assert panel.unsent == ""


def test_a_download_shows_its_progress_and_can_be_stopped(panel, monkeypatch):
    seen = []

    def slow_download(repo, tqdm_class):
        bar = tqdm_class(total=4_000_000, desc="model.safetensors", unit="B")
        for _ in range(4):
            bar.update(1_000_000)
            bar.refresh()
            seen.append(panel.notice)
            if len(seen) == 2:
                panel.receive({"do": "stop"})

    monkeypatch.setattr("bitnet_edu.ui.chat.download", slow_download)
    say(panel, "load", HUB_MODEL)
    assert seen[0] == "Downloading model.safetensors: 25% of 4 MB"
    assert len(seen) == 2
    assert "continues" in panel.notice
    assert panel.source == "tiny"


def test_every_message_of_the_page_is_acknowledged(panel):
    for count in (1, 2):
        say(panel, "clear")
        assert panel.heard == count


def test_clear_forgets_and_open_restores(panel):
    say(panel, "send", "Hello!")
    saved = {"system": "Be kind.", "messages": panel.messages}
    say(panel, "clear")
    assert panel.messages == []
    assert panel.stats["context_used"] == 0
    say(panel, "open", saved)
    assert panel.messages == saved["messages"]
    assert panel.system == "Be kind."
    say(panel, "again")
    assert panel.session.messages[0] == {"role": "system", "content": "Be kind."}


@pytest.mark.parametrize("saved", [None, [], {}, {"messages": [{"role": "tool"}]}, {"messages": 3}])
def test_a_file_that_is_no_conversation_is_refused(panel, saved):
    say(panel, "send", "Hello!")
    before = panel.messages
    say(panel, "open", saved)
    assert "not a saved conversation" in panel.notice
    assert panel.messages == before


def test_a_missing_model_is_one_clear_notice_and_the_old_one_stays(panel, tmp_path):
    say(panel, "load", str(tmp_path / "nowhere"))
    assert "nowhere" in panel.notice
    assert panel.source == "tiny"
    say(panel, "send", "Hello!")
    assert panel.messages[-1]["role"] == "assistant"


def test_the_real_model_is_offered_and_its_absence_explained(panel, monkeypatch):
    assert HUB_MODEL in panel.sources

    def no_network(source, tqdm_class):
        raise BitNetError("no network: connect and try again")

    monkeypatch.setattr("bitnet_edu.ui.chat.download", no_network)
    say(panel, "load", HUB_MODEL)
    assert panel.notice == "no network: connect and try again"


def test_an_unexpected_error_in_the_worker_is_shown(panel, monkeypatch):
    def broken(*arguments, **options):
        raise RuntimeError("disk on fire")

    monkeypatch.setattr(panel.session.model, "forward", broken)
    say(panel, "send", "Hello!")
    assert panel.notice == "RuntimeError: disk on fire"
    assert not panel.busy


def test_sampling_follows_the_settings(panel):
    answers = set()
    for seed in range(4):
        panel.settings = panel.settings | {"temperature": 1.5, "seed": seed, "max_new_tokens": 12}
        say(panel, "clear")
        say(panel, "send", "Tell me a story about a fox.")
        answers.add(panel.messages[-1]["content"])
    assert len(answers) > 1
