"""The chat panel's kernel side, without a page: messages in, traits out."""

import json
import threading
import time

import pytest

import bitnet_edu
from bitnet_edu.errors import BitNetError
from bitnet_edu.files.hub import MODEL
from bitnet_edu.ui.chat import SAMPLING, ChatPanel

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


LONE = "a\ud800b\udfffc"  # legal in JSON as an escape, and no characters


def sent_state(panel) -> str:
    """What jupyter_client would send of the panel."""
    return json.dumps(panel.get_state(), ensure_ascii=False).encode().decode()


def test_lone_surrogates_never_make_a_state_that_cannot_be_sent(panel):
    say(panel, "send", LONE)
    assert panel.messages[0]["content"] == "a\ufffdb\ufffdc"
    sent_state(panel)
    say(panel, "open", {"system": LONE, "messages": [{"role": "user", "content": LONE}]})
    assert panel.system == "a\ufffdb\ufffdc"
    sent_state(panel)
    panel.set_state({"system": LONE, "settings": {LONE: [LONE, {LONE: LONE}]}})
    sent_state(panel)
    say(panel, "again")
    assert panel.session.system == "a\ufffdb\ufffdc"
    say(panel, "load", LONE)
    assert panel.notice
    assert panel.source == "tiny"
    sent_state(panel)


def test_values_of_a_wrong_type_are_one_notice(panel):
    say(panel, "send", "Hello!")
    before = panel.messages
    for value in (None, 3, ["Hello!"], {"content": "Hello!"}):
        say(panel, "send", value)
        assert "a message must be text" in panel.notice
        say(panel, "load", value)
        assert "name of a model must be text" in panel.notice
    assert panel.messages == before
    panel.system = 3
    say(panel, "again")
    assert "system prompt must be text, not 3" in panel.notice
    panel.system = ""
    for name in SAMPLING:
        for value in ("hot", -1, [1], {}, 0.5j):
            panel.settings = SAMPLING | {name: value}
            say(panel, "again")
            assert name in panel.notice, (name, value, panel.notice)
    for settings in (None, 3, "hot", [1]):
        panel.settings = settings
        say(panel, "again")
        assert "settings must be" in panel.notice
    assert panel.messages == before
    panel.settings = {}
    say(panel, "again")
    assert panel.messages == before
    assert not panel.notice


def stop_at(panel, words: str) -> list[str]:
    """Press Stop as soon as the notice holds these words; the list receives that notice."""
    seen = []

    def press(change):
        if words in change.new and not seen:
            seen.append(change.new)
            panel.receive({"do": "stop"})

    panel.observe(press, "notice")
    return seen


def test_stop_works_while_the_prompt_is_read(panel, monkeypatch):
    monkeypatch.setattr("bitnet_edu.generate.BATCH", 16)
    long_message = "What is a ternary weight? " * 12
    say(panel, "send", "Hello!")
    before, transcript = panel.messages, list(panel.session.messages)
    stopped_at = stop_at(panel, "Reading 32 of ")
    say(panel, "send", long_message)
    assert len(stopped_at) == 1
    assert panel.notice == "Stopped before the answer began."
    assert panel.messages == before
    assert panel.session.messages == transcript
    assert panel.unsent == long_message  # given back to where it was written
    assert not panel.busy
    say(panel, "send", long_message)
    assert panel.messages[-1]["role"] == "assistant"
    assert not panel.notice


def test_stopping_another_answer_before_it_begins_keeps_the_old_one(panel):
    say(panel, "send", "Hello!")
    before = panel.messages
    panel.session.clear()
    panel.session.messages = [dict(m) for m in before]
    panel.observe(lambda change: panel._stop.set(), "messages")  # while the page shows the question
    say(panel, "again")
    assert panel.notice == "Stopped before the answer began."
    assert panel.messages == before
    assert panel.session.messages == before


def test_stop_during_loading_keeps_the_old_model(panel, monkeypatch):
    session, load = panel.session, bitnet_edu.load

    def slow_load(source):
        panel.receive({"do": "stop"})
        return load(source)

    monkeypatch.setattr("bitnet_edu.load", slow_load)
    say(panel, "load", "tiny")
    assert "stopped" in panel.notice
    assert panel.session is session


class PanicException(BaseException):
    """What PyO3 makes of a panic in Rust."""


@pytest.mark.parametrize("error", [PanicException, KeyboardInterrupt, SystemExit, MemoryError])
def test_whatever_ends_the_worker_the_panel_is_not_busy_for_ever(panel, monkeypatch, error):
    def broken(*arguments, **options):
        raise error("index out of range")

    monkeypatch.setattr(panel.session.model.tokenizer, "apply_chat_template", broken)
    say(panel, "send", "Hello!")
    assert panel.notice
    assert not panel.busy
    assert panel.messages == []
    monkeypatch.undo()
    say(panel, "send", "Hello!")
    assert len(panel.messages) == 2


def test_stop_ends_the_answer_midway(panel, monkeypatch):
    next_tokens, started = panel.session.model.next_tokens, threading.Event()

    def slow(*arguments):
        time.sleep(0.05)
        return next_tokens(*arguments)

    monkeypatch.setattr(panel.session.model, "next_tokens", slow)
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


@pytest.fixture
def endless(panel, monkeypatch):
    """A conversation of many times the context, and how often its tokens are counted."""
    turn = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
    say(panel, "open", {"messages": turn * 2_000})
    say(panel, "send", "And now?")
    assert panel.full
    tokenizer, counted = panel.session.model.tokenizer, []
    count = tokenizer.apply_chat_template
    tokenizer.apply_chat_template = lambda messages: (
        counted.append(len(messages)) or count(messages)
    )
    yield counted
    tokenizer.apply_chat_template = count


def test_forgetting_counts_a_long_conversation_a_few_times_only(panel, endless):
    say(panel, "forget")
    assert not panel.notice
    assert panel.unsent == ""
    assert 4 < len(panel.messages) < 100
    assert panel.messages[0]["role"] == "user"
    assert len(endless) < 20
    assert max(endless) < 200  # never all 4,000
    # as much as fits into half of the context is kept: with one turn more it would not
    session, question = panel.session, panel.messages[-2]
    kept = panel.messages[:-2]
    count = session.model.tokenizer.apply_chat_template
    assert len(count([*kept, question])) <= session.cache.max_len // 2
    assert len(count([*kept[:2], *kept, question])) > session.cache.max_len // 2


def test_forgetting_can_be_stopped_and_then_forgets_nothing(panel, endless, monkeypatch):
    count = panel.session.model.tokenizer.apply_chat_template
    monkeypatch.setattr(
        panel.session.model.tokenizer,
        "apply_chat_template",
        lambda messages: panel.receive({"do": "stop"}) or count(messages),
    )
    say(panel, "forget")
    assert "nothing is forgotten" in panel.notice
    assert len(endless) == 1
    assert len(panel.messages) == 4_000
    assert panel.unsent == "And now?"


def test_forgetting_keeps_the_system_prompt(panel, endless):
    panel.system = "Be kind."
    say(panel, "forget")
    assert panel.session.messages[0] == {"role": "system", "content": "Be kind."}
    assert panel.messages[0]["role"] == "user"


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
    say(panel, "load", MODEL)
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


def test_a_saved_system_prompt_of_null_is_none_and_a_number_is_refused(panel):
    say(panel, "open", {"system": None, "messages": []})
    assert panel.system == ""
    assert not panel.notice
    panel.system = "Be kind."
    for system in (3, [], {}, False):
        say(panel, "open", {"system": system, "messages": []})
        assert "system prompt must be text" in panel.notice
        assert panel.system == "Be kind."


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
    assert MODEL in panel.sources

    def no_network(source, tqdm_class):
        raise BitNetError("no network: connect and try again")

    monkeypatch.setattr("bitnet_edu.ui.chat.download", no_network)
    say(panel, "load", MODEL)
    assert panel.notice == "no network: connect and try again"


def test_an_unexpected_error_in_the_worker_is_shown(panel, monkeypatch):
    def broken(*arguments, **options):
        raise RuntimeError("disk on fire")

    monkeypatch.setattr(panel.session.model, "next_tokens", broken)
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
