"""What needs no Ray: the driver's inbox with its deadlines, the watchdog in a process that hangs, counters."""

import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from typing import Any

from vapo_async.launcher.ray_inbox import Inbox
from vapo_async.launcher.ray_services import Counters
from vapo_async.launcher.ray_watchdog import Watchdog


class Reference:
    """Like an object reference: its future can be had."""

    def __init__(self) -> None:
        self._future: Future[Any] = Future()

    def future(self) -> Future[Any]:
        return self._future

    def answer(self, value: object) -> None:
        self._future.set_result(value)


def test_a_wait_ends_with_the_answer_and_not_with_the_limit() -> None:
    inbox, reference = Inbox(), Reference()
    call = inbox.call(reference)
    threading.Timer(0.05, reference.answer, args=["came"]).start()
    start = time.monotonic()
    assert inbox.wait(lambda: call.done, start + 30)
    assert 0.04 < time.monotonic() - start < 5
    assert call.future is not None and call.future.result() == "came"


def test_a_limit_ends_a_wait_and_is_not_passed_by_an_answer_that_lies_there() -> None:
    inbox, reference = Inbox(), Reference()
    call = inbox.call(reference)
    assert not inbox.wait(lambda: call.done, time.monotonic() + 0.02)
    reference.answer(1)
    assert inbox.wait(lambda: call.done, time.monotonic() - 1), "it came before anybody looked at the clock"


def test_answers_are_handled_in_the_waiting_thread_whoever_is_waited_for() -> None:
    inbox, other, mine = Inbox(), Reference(), Reference()
    seen: list[int] = []
    inbox.watch(other, lambda future: seen.append(threading.get_ident()))
    call = inbox.call(mine)
    threading.Thread(target=lambda: (other.answer(0), mine.answer(0))).start()
    assert inbox.wait(lambda: call.done, time.monotonic() + 10)
    assert seen == [threading.get_ident()]


def test_a_signal_handler_wakes_a_wait() -> None:
    inbox, stopped = Inbox(), threading.Event()

    def on_signal(number: int, frame: object) -> None:
        stopped.set()
        inbox.wake()

    old = signal.signal(signal.SIGUSR1, on_signal)
    try:
        threading.Timer(0.05, signal.pthread_kill, args=[threading.main_thread().ident, signal.SIGUSR1]).start()
        start = time.monotonic()
        assert inbox.wait(stopped.is_set, start + 30)
        assert time.monotonic() - start < 5
    finally:
        signal.signal(signal.SIGUSR1, old)


class Alarm:
    """Rings at its times."""

    def __init__(self, *times: float) -> None:
        self.times, self.rang = list(times), 0

    def due_at(self) -> float:
        return self.times[0] if self.times else float("inf")

    def look(self, now: float) -> None:
        assert now >= self.times.pop(0)
        self.rang += 1


def test_what_is_timed_is_looked_at_during_any_wait() -> None:
    inbox, now = Inbox(), time.monotonic()
    inbox.timers = alarm = Alarm(now - 1, now + 0.03, now + 0.06, now + 60)
    assert not inbox.wait(lambda: False, now + 0.1)
    assert alarm.rang == 3


HANGS = """
import ctypes, sys, time
from vapo_async.launcher.ray_watchdog import Watchdog
dog = Watchdog(0.4)
for _ in range(20):  # works: twice the limit in all
    dog.alive()
    time.sleep(0.04)
dog.rest()
time.sleep(0.6)  # rests: longer than the limit
print("alive so far", flush=True)
dog.alive()
def hangs():
    ctypes.PyDLL(None).pause()  # a C call that keeps the interpreter's lock and does not return
hangs()
"""


def test_the_watchdog_ends_a_call_that_never_returns_and_leaves_its_stack() -> None:
    start = time.monotonic()
    ended = subprocess.run([sys.executable, "-c", HANGS], capture_output=True, text=True, timeout=60, check=False)
    assert ended.stdout.strip() == "alive so far"
    assert ended.returncode == 1
    assert "Timeout (0:00:00.4" in ended.stderr
    assert "in hangs" in ended.stderr
    assert time.monotonic() - start < 30


def test_arming_anew_costs_little() -> None:
    dog = Watchdog(100.0)
    start = time.perf_counter()
    for _ in range(2000):
        dog.alive()
    per_call_s = (time.perf_counter() - start) / 2000
    dog.rest()
    assert per_call_s < 2e-5, "most calls only look at the clock"


def test_counters_go_on_over_processes() -> None:
    counters = Counters()
    counters.seen({"scored": 8, "crashes": 1})
    counters.seen({"scored": 12, "crashes": 1})
    counters.seen({"scored": 3, "crashes": 0})
    assert counters.total() == {"scored": 15, "crashes": 1}
    counters.seen({"scored": 5, "crashes": 0})
    assert counters.total() == {"scored": 17, "crashes": 1}
