"""Helpers never outlive the call they help, whatever ends it."""

import _thread
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

import bitnet_edu
from bitnet_edu.kernels import threads
from bitnet_edu.kernels.bits import cached_jit
from bitnet_edu.kernels.threads import HELPERS, NEXT, finish, run, run_long, take, wait_for


@cached_jit
def fill(memory, chunks, patience, thread, counters):
    """Add 1 in every chunk, once `patience` random numbers are drawn, so that it takes a while."""
    chunk = take(counters)
    while chunk < chunks:
        number = np.uint64(chunk + 1)
        for _ in range(patience):  # xorshift, which no compiler can shorten, and never 0
            number ^= number << np.uint64(13)
            number ^= number >> np.uint64(7)
            number ^= number << np.uint64(17)
        memory[chunk] += number != 0
        finish(counters)
        chunk = take(counters)
    wait_for(counters, chunks)


@pytest.mark.parametrize("way", [run, run_long])
@pytest.mark.parametrize("number", [1, 2, 7])
def test_all_chunks_are_done_once(number, way):
    memory = np.zeros(500, np.int64)
    for _ in range(20):
        way(fill, (memory, len(memory), 100), number)
    assert (memory == 20).all()


@pytest.mark.parametrize("number", [1, 3])
def test_ctrl_c_is_heard_in_the_middle_of_long_work(number):
    """At the next chunk: a hundredth of what would take minutes."""
    run_long(fill, (np.zeros(1, np.int64), 1, 1), number)  # compiled
    memory, patience = np.zeros(10**5, np.int64), 10**6
    timer = threading.Timer(0.3, _thread.interrupt_main)
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        run_long(fill, (memory, len(memory), patience), number)
    assert 0 < np.count_nonzero(memory) < len(memory)
    before = memory.copy()
    time.sleep(0.05)
    np.testing.assert_array_equal(memory, before)


def wait_until_begun(counters):
    """Until a helper has a ticket, if there is one who can take it."""
    end = time.monotonic() + 30
    while counters is not None and not counters[NEXT] and time.monotonic() < end:
        time.sleep(1e-4)


@pytest.mark.parametrize("after", [0, 1, 3, "function"])
def test_no_helper_works_on_after_an_interrupt(monkeypatch, after):
    """Between handing out the work and doing it, in the middle of handing out, or in the end."""
    memory, seen, submit = np.zeros(64, np.int64), [], threads._submit

    def interrupted(function, args, thread, counters):
        seen.append(counters)
        if thread - 1 == after:
            wait_until_begun(counters if after else None)
            raise KeyboardInterrupt
        submit(function, args, thread, counters)

    def function(*args):
        if after == "function" and args[-2] == 0:
            wait_until_begun(args[-1])
            raise KeyboardInterrupt
        fill(*args)

    function.compile = fill.compile
    monkeypatch.setattr(threads, "_submit", interrupted)
    for _ in range(10):
        with pytest.raises(KeyboardInterrupt):
            run(function, (memory, len(memory), 10**5), 5)
        assert seen[-1][HELPERS] == 0
        before = memory.copy()
        time.sleep(0.01)
        np.testing.assert_array_equal(memory, before)
    assert after == 0 or memory.any()  # somebody had begun


def test_helpers_that_come_late_find_nothing_to_do():
    memory, counters = np.zeros(4, np.int64), np.zeros(64, np.int64)
    threads.withdraw(counters)
    threads._help(fill, (memory, 4, 5), 1, counters)
    assert not memory.any()
    assert counters[HELPERS] == 0


def test_a_second_interrupt_does_not_leave_helpers_behind(monkeypatch):
    calls, real = [], threads.withdraw

    def twice(counters):
        calls.append(1)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return real(counters)

    monkeypatch.setattr(threads, "withdraw", twice)
    counters = np.zeros(64, np.int64)
    threads._withdraw(counters)
    assert len(calls) == 2
    assert counters[threads.WITHDRAWN] == 1


def test_without_another_thread_one_does_it_all(monkeypatch):
    """An interpreter that is ending, or a limit on processes, gives no more threads."""

    class NoThreads:
        def submit(self, *_):
            raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threads, "_pool", NoThreads)
    memory = np.zeros(50, np.int64)
    for count, way in enumerate((run, run_long), 1):
        way(fill, (memory, 50, 3), 4)
        assert (memory == count).all()


INTERRUPTED = """
import _thread, threading, sys, numpy as np, bitnet_edu
model = bitnet_edu.load("tiny")
model.threads = 4
ids = [list(range(start, start + 500)) for start in (1, 700)]
expected = model.forward(ids[1], model.new_cache())
for turn in range(30):
    timer = threading.Timer(0.001 + 0.0007 * turn, _thread.interrupt_main)
    cache = model.new_cache()
    try:
        timer.start()
        for _ in range(100):
            cache.truncate(0)
            model.forward(ids[0], cache)
    except KeyboardInterrupt:
        pass
    assert np.array_equal(model.forward(ids[1], model.new_cache()), expected), turn
print("right")
"""


def test_interrupts_at_any_moment_leave_a_model_that_is_right():
    done = subprocess.run([sys.executable, "-c", INTERRUPTED], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "right\n"), done.stderr


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT for one process")
@pytest.mark.parametrize("seconds", [0.1, 1, 4])
def test_ctrl_c_while_it_compiles(tmp_path, seconds):
    """The first run compiles for some ten seconds; an interrupt ends it soon, with status 130."""
    code = (
        "from bitnet_edu.cli import main; print('begins', flush=True); "
        "raise SystemExit(main(['generate', '--prompt', 'a']))"
    )
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path), "BITNET_EDU_THREADS": "3"}
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout.readline() == b"begins\n"
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=300)
    assert process.returncode == 130, error
    assert b"Traceback" not in error


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_a_child_of_a_generating_process_works():
    model = bitnet_edu.load("tiny")
    model.threads = 3
    ids = list(range(1, 400))
    expected, done = model.forward(ids, model.new_cache()), threading.Event()

    def generate():
        while not done.is_set():
            model.forward(ids, model.new_cache())

    worker = threading.Thread(target=generate)
    worker.start()
    context = multiprocessing.get_context("fork")
    try:
        for _ in range(8):
            mine, theirs = context.Pipe()
            child = context.Process(
                target=lambda pipe: pipe.send(model.forward(ids, model.new_cache())), args=(theirs,)
            )
            child.start()
            assert mine.poll(60), "the child hangs"
            np.testing.assert_array_equal(mine.recv(), expected)
            child.join(60)
    finally:
        done.set()
        worker.join()


EXIT = """
import threading, time, bitnet_edu
model = bitnet_edu.load("tiny")
model.threads = 4
def work():
    while True:
        model.forward(list(range(1, 500)), model.new_cache())
for _ in range(2):
    threading.Thread(target=work, daemon=True).start()
time.sleep(0.7)
"""


def test_an_interpreter_that_ends_while_threads_generate():
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", EXIT], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
