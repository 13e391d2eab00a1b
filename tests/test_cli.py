"""The command, as people and scripts use it: in a shell, in a pipe, in a terminal, with Ctrl-C."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from checkpoints import Recipe, make, save, write
from rich.console import Console

import bitnet_edu
from bitnet_edu import cli, doctor
from bitnet_edu.proof import report, transformers
from bitnet_edu.terminal import Terminal

VERBS = ["chat", "generate", "verify", "info", "evaluate", "train", "doctor"]


def run(
    *arguments: str, stdin: str | None = None, **environment: str
) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "bitnet_edu.cli", *arguments],
        input=stdin,
        stdin=subprocess.DEVNULL if stdin is None else None,
        capture_output=True,
        text=True,
        encoding="utf-8",
        env=os.environ | {"PYTHONIOENCODING": "utf-8"} | environment,
    )


def json_of(capsys, *arguments: str, status: int = 0) -> dict:
    """What a verb prints with --json, run in this process; it must be all that it prints."""
    assert cli.main([*arguments, "--json"]) == status
    out, err = capsys.readouterr()
    assert out.count("\n") == 1
    assert err == ""
    return json.loads(out)


@pytest.fixture(scope="module")
def tiny():
    return bitnet_edu.load("tiny")


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


# Help and mistakes


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_a_help_with_examples(verb):
    result = run(verb, "--help")
    assert result.returncode == 0
    assert f"examples:\n  bitnet-edu {verb}" in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 100


def test_the_installed_command_and_its_list_of_verbs():
    command = shutil.which("bitnet-edu", path=os.path.dirname(sys.executable))  # noqa: PTH120
    result = subprocess.run([command, "--help"], capture_output=True, text=True, check=True)
    for verb in VERBS:
        assert f"\n    {verb} " in result.stdout
    version = subprocess.run([command, "--version"], capture_output=True, text=True, check=True)
    assert bitnet_edu.__version__ in version.stdout


def test_help_answers_without_loading_anything_heavy():
    code = "import sys; from bitnet_edu import cli; cli.build_parser(); print(*sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert not {"numpy", "numba", "torch", "rich"} & set(result.stdout.split())


MISTAKES = {
    "no verb": [],
    "an unknown verb": ["frobnicate"],
    "an unknown option": ["info", "--frobnicate"],
    "no model of that name": ["info", "no/such/folder"],
    "a count that is none": ["generate", "--prompt", "x", "-n", "many"],
    "a count of zero": ["generate", "--prompt", "x", "-n", "0"],
    "a negative temperature": ["generate", "--prompt", "x", "--temperature", "-1"],
    "an empty stop": ["generate", "--prompt", "x", "--stop", ""],
    "a prompt past the context": ["generate", "--prompt", "word " * 3000],
    "more tokens than the context": ["verify", "--tokens", "100000"],
    "no tokens": ["verify", "--tokens", "0"],
    "no questions": ["evaluate", "--questions", "0"],
    "a seed that is none": ["chat", "--seed", "x"],
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_get_one_line_and_status_2(case):
    result = run(*MISTAKES[case], stdin="Hello!\n")
    assert result.returncode == 2
    assert result.stdout == ""
    assert re.fullmatch(r"bitnet-edu[^\n]*: [^\n]{15,}\n", result.stderr), result.stderr


@pytest.mark.parametrize("verb", [["info"], ["generate", "--prompt", "x"], ["verify"], ["chat"]])
def test_a_damaged_model_gets_one_line_and_status_2(tmp_path, verb):
    config, tensors = make()
    tensors["model.norm.weight"][3] = np.nan
    save(tmp_path, config, tensors)
    result = run(verb[0], str(tmp_path), *verb[1:], stdin="Hello!\n")
    assert result.returncode == 2
    assert result.stdout == ""
    [line] = result.stderr.splitlines()
    assert "model.norm.weight must be finite, found NaN" in line


@pytest.mark.parametrize("verb", [["generate", "--prompt", "x"], ["evaluate"]])
def test_a_model_without_text_says_so(tmp_path, verb):
    write(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    result = run(verb[0], str(tmp_path), *verb[1:])
    assert (result.returncode, result.stdout) == (2, "")
    [line] = result.stderr.splitlines()
    assert "tokenizer.json" in line


def test_out_of_memory_and_a_full_disk_are_no_tracebacks(capsys, monkeypatch):
    for error, words in ((MemoryError(), "memory"), (OSError(28, "No space left"), "No space")):

        def fail(*args, error=error, **options):
            raise error

        monkeypatch.setattr(bitnet_edu, "load", fail)
        assert cli.main(["generate", "--prompt", "x"]) == 2
        assert words in capsys.readouterr().err


# generate


def test_generate_prints_the_text_alone(tiny):
    expected = "".join(tiny.stream(user("What is a ternary weight?"), max_new_tokens=128))
    result = run("generate", "--chat", "--prompt", "What is a ternary weight?")
    assert (result.returncode, result.stdout, result.stderr) == (0, expected + "\n", "")


def test_generate_continues_text_from_a_pipe(tiny):
    ids = tiny.tokenizer.encode("Once upon a time")
    expected = "".join(tiny.stream(ids, max_new_tokens=12))
    result = run("generate", "-n", "12", stdin="Once upon a time")
    assert (result.returncode, result.stdout, result.stderr) == (0, expected + "\n", "")


def test_generate_as_json(capsys, tiny):
    options = ["--temperature", "1.5", "--seed", "3", "--top-k", "50", "--top-p", "0.9", "-n", "20"]
    found = json_of(capsys, "generate", "tiny", "--prompt", "Hello", *options)
    ids = tiny.tokenizer.encode("Hello")
    sampling = {"temperature": 1.5, "seed": 3, "top_k": 50, "top_p": 0.9}
    assert found["prompt_ids"] == ids
    assert found["ids"] == tiny.generate(ids, max_new_tokens=20, **sampling)
    assert found["text"] == tiny.tokenizer.decode(found["ids"])
    assert found["tokens_per_second"] > 0
    screened = json_of(
        capsys, "generate", "tiny", "--prompt", "Hello", *options, "--head", "screened"
    )
    assert screened["ids"] == found["ids"]


def test_generate_counts_its_steps_and_can_do_without_guesses(capsys):
    options = ["generate", "--prompt", "The fox and the fox and the fox and the fox", "-n", "60"]
    found, plain = json_of(capsys, *options), json_of(capsys, *options, "--no-guess")
    assert found["ids"] == plain["ids"]
    assert found["steps"] + found["accepted_tokens"] == len(found["ids"])
    assert found["guessed_tokens"] >= found["accepted_tokens"] > 0
    assert plain["steps"] == len(plain["ids"])
    assert plain["guessed_tokens"] == plain["accepted_tokens"] == 0


def test_generate_stops_before_a_text(capsys):
    found = json_of(capsys, "generate", "--chat", "--prompt", "What is a ternary weight?")
    stop = found["text"][10:14]
    cut = json_of(
        capsys, "generate", "--chat", "--prompt", "What is a ternary weight?", "--stop", stop
    )
    assert cut["text"] == found["text"][: found["text"].index(stop)]


def test_generate_wants_a_prompt_when_nobody_pipes_one(capsys, monkeypatch):
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    assert cli.main(["generate"]) == 2
    assert "--prompt" in capsys.readouterr().err


def test_a_reader_that_has_had_enough_is_no_error():
    command = [sys.executable, "-m", "bitnet_edu.cli", "info"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0


# verify


def test_verify_as_json(capsys, tmp_path):
    write(tmp_path, Recipe())
    found = json_of(capsys, "verify", str(tmp_path), "--tokens", "8")
    assert found["ok"] is True
    assert found["tokens"] == 8
    assert found["greedy_equal"] is True
    assert 0 < found["max_logit_difference"] < found["logit_range"]
    assert found["argmax_agreement"] == 1
    assert found["rounding_flips"] == len(found["flips"])
    names = [row["name"] for row in found["transformers"]["layers"]]
    assert (names[0], names[-1]) == ("embedding", "logits")
    assert {"layers.0.attention", "layers.1.attention"} < set(names)


def test_verify_prints_tables_without_colours(tmp_path):
    write(tmp_path, Recipe())
    result = run("verify", str(tmp_path), "--tokens", "8", "--layers")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.endswith("equal\n")
    assert "layers.1.after_attention" in result.stdout
    assert "\x1b" not in result.stdout


def test_verify_fails_with_status_1(capsys, monkeypatch, tmp_path):
    write(tmp_path / "a", Recipe(), seed=1)
    write(tmp_path / "b", Recipe(), seed=2)
    other = transformers.load_transformers(tmp_path / "b")
    monkeypatch.setattr(report, "load_transformers", lambda *_, **__: other)
    found = json_of(capsys, "verify", str(tmp_path / "a"), "--tokens", "4", status=1)
    assert found["ok"] is False
    assert cli.main(["verify", str(tmp_path / "a"), "--tokens", "4"]) == 1
    assert "NOT equal" in capsys.readouterr().out


def test_verify_and_info_take_dense_weights_on_demand(tmp_path):
    config, tensors = make(Recipe("dense"))
    save(tmp_path, config, tensors)
    for verb in (["info"], ["verify", "--tokens", "4"]):
        refused = run(*verb, str(tmp_path))
        assert refused.returncode == 2
        assert "--ternarize" in refused.stderr
        assert run(*verb, str(tmp_path), "--ternarize").returncode == 0


# info


def test_info_as_json(capsys, tmp_path):
    config, tensors = make(Recipe(tied=False))
    save(tmp_path, config, tensors)
    found = json_of(capsys, "info", str(tmp_path))
    sizes = [
        4 * t.size if t.dtype == np.uint8 else t.size for n, t in tensors.items() if t.size > 1
    ]
    assert found["parameters"] == sum(sizes)
    assert found["tied_embeddings"] is False
    assert found["embedding_dtype"] == "bfloat16"
    assert found["config"]["hidden_size"] == 72
    assert found["bytes"]["files"] == (tmp_path / "model.safetensors").stat().st_size
    assert found["bytes"]["ternary"] == found["ternary_parameters"] / 4
    assert found["vocabulary_of_tokenizer"] is None
    packed = tensors["model.layers.1.mlp.up_proj.weight"]
    zeros = sum((packed >> shift & 3 == 1).sum() for shift in (0, 2, 4, 6)) / (4 * packed.size)
    matrix = found["layers"][1]["up_proj"]
    assert matrix["shape"] == [100, 72]
    assert matrix["zero_share"] == pytest.approx(zeros)


def test_info_prints_tables_without_colours():
    result = run("info")
    assert (result.returncode, result.stderr) == (0, "")
    assert "\x1b" not in result.stdout
    for word in ("vocab_size", "zeros", "down_proj", "bfloat16"):
        assert word in result.stdout


# doctor


FIGURES = ("held_out_loss", "question_accuracy", "addition_accuracy", "stranger_accuracy")
FIGURES += ("refusal_rate", "unrelated_answers")


def test_evaluate_as_json_and_as_tables():
    result = run("evaluate", "--questions", "1", "--json")
    assert result.returncode == 0
    assert result.stdout.count("\n") == 1
    figures = json.loads(result.stdout)
    assert figures["model"] == "tiny"
    assert list(figures["trials"]) == list(FIGURES)
    assert 0 < figures["held_out_loss"] < 1
    assert all(0 <= figures[name] <= 1 for name in FIGURES[1:])
    assert figures["trials"]["addition_accuracy"] == 2
    assert figures["stranger"]["memory"]["asked"] == 1
    assert "\nsums: 2 of 2\n" in result.stderr  # no terminal: a line when a part is done

    tables = run("evaluate", "--questions", "1")
    assert tables.returncode == 0
    assert "\x1b" not in tables.stdout
    assert re.search(rf"refusal rate +{figures['refusal_rate']:.1%} +10 answers", tables.stdout)
    assert "world of the embedded model" in tables.stdout


def test_doctor_finds_this_machine_ready(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "disk", lambda: [])  # of the machine, not of the code
    monkeypatch.setattr(doctor, "memory", lambda: [])
    found = json_of(capsys, "doctor")
    assert found["ok"] is True, found
    names = {check["name"]: check for check in found["checks"]}
    for name in ("python", "processor", "kernel test", "embedded model", "packages"):
        assert names[name]["status"] == "good", names[name]
    assert "HF_HUB_OFFLINE" in names["network"]["found"]


def test_doctor_without_a_network_is_quick_and_no_failure():
    start = time.monotonic()
    result = run("doctor", HF_HUB_OFFLINE="0", HF_ENDPOINT="http://127.0.0.1:9")
    assert time.monotonic() - start < 60
    assert (result.returncode, result.stderr) == (0, "")
    assert "http://127.0.0.1:9 does not answer" in result.stdout
    assert "\x1b" not in result.stdout


def test_doctor_reports_a_kernel_that_computes_wrongly(capsys, monkeypatch):
    from bitnet_edu.kernels import matmul

    right = matmul.ternary_matmul
    monkeypatch.setattr(matmul, "ternary_matmul", lambda *a, **k: right(*a, **k) + 1)
    found = json_of(capsys, "doctor", status=1)
    [check] = [check for check in found["checks"] if check["name"] == "kernel test"]
    assert check["status"] == "bad"
    assert "BITNET_EDU_KERNEL=portable" in check["advice"]


def test_doctor_reports_what_fails_unexpectedly(capsys, monkeypatch):
    def fail():
        raise RuntimeError("no\nway")

    monkeypatch.setattr(doctor, "memory", fail)
    found = json_of(capsys, "doctor", status=1)
    assert any(check["found"] == "RuntimeError: no way" for check in found["checks"])
    assert cli.main(["doctor"]) == 1
    assert "to repair" in capsys.readouterr().out


@pytest.mark.parametrize(("free", "status"), [(0.5e9, "bad"), (2e9, "note"), (8e9, "good")])
def test_doctor_judges_memory_and_disk(monkeypatch, free, status):
    from bitnet_edu import system

    monkeypatch.setattr(system, "memory", lambda: system.Memory(16e9, free, 0, 0))
    assert doctor.memory()[0].status == status
    monkeypatch.setattr(system, "free_disk", lambda: free / 5)
    assert doctor.disk()[0].status == ("good" if free > 1e10 else "note" if free > 1e9 else "bad")


# chat


def test_chat_in_a_pipe_answers_line_by_line(tiny):
    chat = bitnet_edu.ChatSession(tiny, "Be brief.")
    expected = "".join("".join(chat.send(text)) + "\n" for text in ("Hello!", "What is a token?"))
    result = run("chat", "--system", "Be brief.", stdin="Hello!\n\nWhat is a token?\n")
    assert (result.returncode, result.stdout, result.stderr) == (0, expected, "")


def test_chat_takes_messages_of_several_lines(tiny):
    for typed in ("Hello!\\\nWhat is a token?\n", '"""\nHello!\nWhat is a token?\n"""\n'):
        expected = "".join(bitnet_edu.ChatSession(tiny).send("Hello!\nWhat is a token?"))
        assert run("chat", stdin=typed).stdout == expected + "\n"


def test_chat_commands(tmp_path, tiny):
    file = tmp_path / "talk.json"
    typed = (
        f"Hello!\n/save {file}\n/system Be brief.\n/system\n/clear\n/nonsense\n/help\n/exit\nno\n"
    )
    result = run("chat", stdin=typed)
    assert (result.returncode, result.stderr) == (0, "")
    answer = "".join(bitnet_edu.ChatSession(tiny).send("Hello!"))
    lines = result.stdout.splitlines()
    assert lines[0] == answer
    assert lines[1:6] == [
        f"Saved to {file}.",
        "System: Be brief.",
        "System: Be brief.",
        "The conversation is forgotten.",
        "There is no /nonsense: /help lists the commands.",
    ]
    assert "/exit" in result.stdout
    saved = json.loads(file.read_text(encoding="utf-8"))
    assert saved["messages"] == [*user("Hello!"), {"role": "assistant", "content": answer}]
    assert saved["system"] == ""


def test_chat_saves_whole_or_not_at_all(tmp_path):
    result = run("chat", stdin=f"/save {tmp_path / 'no' / 'talk.json'}\n")
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_chat_passes_any_text_through():
    typed = "<script>alert(1)</script> [bold]x[/] שלום 🙂 \\\n{{ 7 * 7 }}\n"
    result = run("chat", "-n", "5", stdin=typed)
    assert (result.returncode, result.stderr) == (0, "")


needs_pty = pytest.mark.skipif(
    os.name == "nt", reason="Windows has no pseudo-terminals of this kind"
)
# tiny answers within milliseconds: slow it down, so that there is something to watch and to stop
SLOW = """
import sys, time
from bitnet_edu import cli, model
next_tokens = model.BitNet.next_tokens
def slow(self, *arguments):
    time.sleep(0.05)
    return next_tokens(self, *arguments)
model.BitNet.next_tokens = slow
sys.exit(cli.main(["chat", "--temperature", "0"]))
"""


class Typist:
    """A person at a terminal: a real pseudo-terminal, whose Ctrl-C is a key like others."""

    def __init__(self, code: str):
        spawn = "import os, pty, sys; sys.exit(os.waitstatus_to_exitcode(pty.spawn(sys.argv[1:])))"
        environment = {k: v for k, v in os.environ.items() if k != "NO_COLOR"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", spawn, sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment | {"TERM": "xterm-256color", "COLUMNS": "80", "LINES": "24"},
        )
        self.seen = ""
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()

    def __enter__(self) -> "Typist":
        return self

    def __exit__(self, *_) -> None:
        self.process.kill()
        self._watcher.join()
        self.process.communicate()

    def _watch(self) -> None:
        while data := os.read(self.process.stdout.fileno(), 4096):
            self.seen += data.decode("utf-8", "replace")

    def type(self, text: str) -> None:
        self.process.stdin.write(text.encode())
        self.process.stdin.flush()

    def press_ctrl_c_until_it_ends(self) -> int:
        """Again and again: readline is deaf between its prompt and its first look at the keys."""
        for _ in range(150):
            self.type("\x03")
            try:
                return self.process.wait(2)
            except subprocess.TimeoutExpired:
                continue
        raise AssertionError(f"it goes on: {self.seen!r}")

    def wait_for(self, text: str, seconds: float = 300) -> str:
        """Everything up to `text`, once it is there; what was seen is taken away."""
        end = time.monotonic() + seconds
        while text not in self.seen:
            assert time.monotonic() < end, f"no {text!r} in {self.seen!r}"
            time.sleep(0.01)
        before, self.seen = self.seen.split(text, 1)
        return before


@needs_pty
def test_ctrl_c_stops_the_answer_and_not_the_chat(tmp_path, tiny):
    with Typist(SLOW) as typist:
        typist.wait_for("> ")
        typist.type("Tell me a story.\n")
        typist.wait_for("Once")
        typist.wait_for("tokens/s")
        typist.type("\x03")
        typist.wait_for("(stopped)")
        typist.wait_for("> ")

        typist.type("\x03")  # at the prompt: a hint, and nothing else
        typist.wait_for("Ctrl-D or /exit leaves")
        typist.wait_for("> ")

        typist.type("Hello!\n")
        shown = typist.wait_for("\n> ")
        assert "\x1b[" in shown  # a terminal gets its dim colours
        assert re.search(
            r"\d+\.\d tokens/s, \d+ tokens, first after \d+\.\d\d s, context \d+ of", shown
        )

        file = tmp_path / "talk.json"
        typist.type(f"/save {file}\n")
        typist.wait_for("Saved")
        typist.type("/save /no/such/folder/talk.json\n")  # one line, and the chat goes on
        typist.wait_for("No such file")
        typist.wait_for("> ")
        typist.type("\x04")
        assert typist.process.wait(300) == 0

        messages = json.loads(file.read_text(encoding="utf-8"))["messages"]
        assert [m["role"] for m in messages] == ["user", "assistant"] * 2
        story = "".join(tiny.stream(user("Tell me a story.")))
        stopped = messages[1]["content"]
        assert story.startswith(stopped)
        assert 0 < len(stopped) < len(story)
    assert messages[3]["content"].split()[-1] in shown


def test_live_lines_keep_every_character_but_the_break(tiny):
    console = Console(width=20)
    terminal = Terminal(bitnet_edu.ChatSession(tiny), "tiny", {}, console)
    assert terminal.wrap("") == [""]
    assert terminal.wrap("one ") == ["one "]
    assert terminal.wrap("one\n") == ["one", ""]
    assert terminal.wrap("a\n\nb") == ["a", "", "b"]
    assert terminal.wrap("one two three four five six") == ["one two three four ", "five six"]
    assert "".join(terminal.wrap("x" * 50)) == "x" * 50


@needs_pty
def test_long_answers_scroll_away_whole(tiny):
    with Typist(SLOW.replace("0.05", "0.001")) as typist:
        typist.wait_for("> ")
        typist.type("Tell me a story.\n")
        typist.wait_for("Tell me a story.")
        shown = typist.wait_for("> ", seconds=60)
        plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", " ", shown)
        story = "".join(tiny.stream(user("Tell me a story."))).split()
        written = plain.split()
        at = 0
        for word in story:  # every word, in order, whatever the live line repeats
            at = written.index(word, at) + 1
        typist.type("/exit\n")
        assert typist.process.wait(300) == 0


@needs_pty
def test_ctrl_c_while_a_verb_works():
    code = "import sys; from bitnet_edu import cli, doctor\n"
    code += "doctor.examine = lambda: input('waiting')\nsys.exit(cli.main(['doctor']))"
    with Typist(code) as typist:
        typist.wait_for("waiting")
        assert typist.press_ctrl_c_until_it_ends() == 130
        assert "Traceback" not in typist.seen


# Text in, text out


def raw(*arguments: str | bytes, stdin: bytes = b"", **environment: str):
    """A run with bytes instead of text."""
    return subprocess.run(
        [sys.executable, "-m", "bitnet_edu.cli", *arguments],
        input=stdin,
        capture_output=True,
        env=os.environ | environment,
    )


def answers(tiny, *texts: str) -> bytes:
    chat = bitnet_edu.ChatSession(tiny)
    return "".join("".join(chat.send(text, 4)) + "\n" for text in texts).encode()


INPUTS = {
    "line ends of every system": (b"Hello!\r\nHi\rWhy?\n", ("Hello!", "Hi", "Why?")),
    "no line end at the end": (b"Hello!", ("Hello!",)),
    "a byte order mark": (b"\xef\xbb\xbfHello!\n", ("Hello!",)),
    "UTF-16": ("\ufeffHello!\n".encode("utf-16-le"), ("Hello!",)),
    "Latin-1": (b"caf\xe9?\n", ("caf\ufffd?",)),
    "half a character": ("🙂".encode()[:2] + b"\n", ("\ufffd",)),
    "separators that end no line": ("a\u2028b\x85c\x0bd\n".encode(), ("a\u2028b\x85c\x0bd",)),
    "a NUL": (b"a\0b\n", ("a\0b",)),
    "the end within a block": (b'"""\nHello!\nWhy?', ("Hello!\nWhy?",)),
    "the end after the start of a block": (b'Hello!\n"""\n', ("Hello!",)),
    "the end after a backslash": (b"Hello!\\", ("Hello!\n",)),
    "a block with spaces around its ends": (b' """ \nHello!\n """\nWhy?\n', ("Hello!", "Why?")),
    "a slash": (b"//exit\n", ("/exit",)),
    "a slash in a block": (b'"""\n/exit\n"""\n', ("/exit",)),
}


@pytest.mark.parametrize("case", INPUTS)
def test_chat_reads_text_of_any_kind(tiny, case):
    typed, texts = INPUTS[case]
    result = raw("chat", "-n", "4", stdin=typed)
    assert (result.returncode, result.stderr) == (0, b"")
    assert result.stdout == answers(tiny, *texts)


@pytest.mark.parametrize("coding", ["utf-8:strict", "utf-8:surrogateescape", "ascii:strict"])
def test_a_prompt_of_any_bytes(tiny, coding):
    for arguments, stdin in ((["--prompt", b"caf\xe9?"], b""), ([], b"\xef\xbb\xbfcaf\xe9?")):
        result = raw(
            "generate", "--json", "-n", "3", *arguments, stdin=stdin, PYTHONIOENCODING=coding
        )
        assert (result.returncode, result.stderr) == (0, b"")
        said = json.loads(result.stdout.decode("utf-8"))
        if coding != "ascii:strict" or arguments:
            assert said["prompt_ids"] == tiny.tokenizer.encode("caf\ufffd?")
    assert raw("generate", "-n", "1", stdin=b"a\r\nb\r").stdout
    assert raw("chat", "-n", "1", "--system", b"\xff", stdin=b"Hi\n").returncode == 0


def shell(command: str) -> subprocess.CompletedProcess:
    command = command.replace("bitnet-edu", f'"{sys.executable}" -m bitnet_edu.cli')
    return subprocess.run(["bash", "-c", command], capture_output=True, text=True)


needs_bash = pytest.mark.skipif(os.name == "nt", reason="closes streams as a Unix shell does")
GENERATE = "bitnet-edu generate --prompt Hi -n 2"


@needs_bash
@pytest.mark.parametrize(
    ("command", "words"),
    [
        (f"{GENERATE} >&-", "output is closed"),
        ("bitnet-edu --help >&-", "output is closed"),
        ("bitnet-edu generate <&-", "input is closed"),
        ("bitnet-edu chat <&-", "input is closed"),
        (f"{GENERATE} >/dev/full", "No space left"),
        (f"{GENERATE} --json >/dev/full", "No space left"),
        ("bitnet-edu info >/dev/full", "No space left"),
        ("bitnet-edu --help >/dev/full", "No space left"),
        ("echo Hi | bitnet-edu chat -n 2 >/dev/full", "No space left"),
        ("bitnet-edu info $'no\\xff\\x1b[31m\\nsuch'", "no model"),
        ("bitnet-edu info --$'\\x1b[31m\\n'", "unrecognized"),
        ("echo /save ~nouser/x | bitnet-edu chat", "nouser"),
        ("echo /save / | bitnet-edu chat", "folder"),
        ("echo /save .. | bitnet-edu chat", "folder"),
        ("echo /save | bitnet-edu chat", "name a file"),
        ("echo /save /proc/x | bitnet-edu chat", "/proc/x"),
        ("echo /save /dev/null/x | bitnet-edu chat", "/dev/null/x"),
        (f"{GENERATE} --seed -1", "seed"),
        (f"{GENERATE} --seed {2**64}", "seed"),
        (f"{GENERATE} --temperature nan", "temperature"),
        (f"{GENERATE} --top-p 0", "top_p"),
        ("bitnet-edu chat --top-k 0 </dev/null", "top_k"),
        ("bitnet-edu chat -n 0 </dev/null", "max_new_tokens"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(command, words):
    if "/dev/full" in command and not os.path.exists("/dev/full"):  # noqa: PTH110
        pytest.skip("this system has no /dev/full")
    result = shell(command)
    assert (result.returncode, result.stdout) == (2, "")
    [line] = result.stderr.splitlines()
    assert words in line
    assert line.isprintable()


@needs_bash
def test_closed_streams_that_are_not_needed():
    whole = shell(GENERATE)
    assert (whole.returncode, whole.stderr) == (0, "")
    for closed in ("<&-", "2>&-", "<&- 2>&-", "2>/dev/full"):
        result = shell(f"{GENERATE} {closed}")
        assert (result.returncode, result.stdout) == (0, whole.stdout), closed
    assert shell(f"{GENERATE} --seed -1 2>&-").returncode == 2
    assert json.loads(shell(f"{GENERATE} --json 2>&-").stdout)
    assert shell(f"{GENERATE} --temperature 1e-320").stdout == whole.stdout


def test_a_path_that_is_no_text_leaves_json_whole(capsys):
    cli.print_json({"path": "a\udcff", "x": ["\ud800é"]})
    out = capsys.readouterr().out
    assert out.isascii()
    assert json.loads(out) == {"path": "a\ufffd", "x": ["\ufffdé"]}


SLOW_PROMPT = """
import sys, time
from bitnet_edu import cli, generate
from bitnet_edu.generate import BitNetLM
generate.BATCH = 8
prefill = BitNetLM.prefill
def slow(self, *arguments):
    time.sleep(0.3)
    return prefill(self, *arguments)
BitNetLM.prefill = slow
sys.exit(cli.main(["chat", "-n", "5"]))
"""


@needs_pty
def test_ctrl_c_while_the_prompt_is_read_leaves_no_turn(tmp_path):
    with Typist(SLOW_PROMPT) as typist:
        typist.wait_for("> ")
        typist.type("word " * 100 + "\n")
        typist.wait_for("word \r\n")
        time.sleep(1)
        typist.type("\x03")
        typist.wait_for("(stopped)")
        typist.wait_for("> ")
        file = tmp_path / "talk.json"
        typist.type(f"/save {file}\n")
        typist.wait_for("Saved")
        assert json.loads(file.read_text(encoding="utf-8"))["messages"] == []
        typist.type("/exit\n")
        assert typist.process.wait(300) == 0


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT for one process")
@pytest.mark.parametrize("verb", ["generate", "chat"])
def test_an_interrupted_pipe_ends_with_130(verb):
    code = SLOW_PROMPT.replace("sys.exit", "print('x', file=sys.stderr, flush=True); sys.exit")
    code = code.replace('["chat", "-n", "5"]', "sys.argv[1:]").replace("0.3", "1.0")
    process = subprocess.Popen(
        [sys.executable, "-c", code, verb],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdin.write(b"word " * 300 + b"\n")
    process.stdin.flush()
    if verb == "generate":
        process.stdin.close()
    assert process.stderr.readline() == b"x\n"  # from here on, whatever it does
    time.sleep(2)
    process.send_signal(signal.SIGINT)
    held, process.stdin = process.stdin, None  # open, for communicate would end the input
    out, err = process.communicate(timeout=300)
    held.close()
    assert (process.returncode, out, err) == (130, b"", b"")
