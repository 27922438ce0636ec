"""What needs no Ray: the driver's inbox with its deadlines, the watchdog in a process that hangs, counters."""

import pickle
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import OwnerDiedError, RayActorError, RayTaskError

from vapo_async.buffer import PublicationError
from vapo_async.launcher.ray_calls import answer
from vapo_async.launcher.ray_cluster import keep_logs
from vapo_async.launcher.ray_inbox import Inbox
from vapo_async.launcher.ray_rollout import _told
from vapo_async.launcher.ray_services import Counters
from vapo_async.launcher.ray_watchdog import Watchdog
from vapo_async.stages import StageDiedError


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


def failed(error: Exception) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_exception(error)
    return future


@pytest.mark.parametrize("cause", [None, ValueError("x")])
def test_lost_data_is_a_dead_stage(cause: Exception | None) -> None:
    lost = OwnerDiedError("00" * 28, "", "")
    error = lost if cause is None else RayTaskError("f", "trace", lost)
    with pytest.raises(StageDiedError, match=r"^the learner could not get its data.*see the logs$"):
        answer(failed(error), "the learner", "the logs")


def test_a_checkpoint_between_take_and_publish_is_told_in_one_line() -> None:
    error = RayTaskError("save", "File x\nray::FlowActor.save", PublicationError("save after the publication"))
    with pytest.raises(PublicationError, match=r"^save after the publication$"):
        answer(failed(error), "the flow", "the logs")


def test_the_death_of_a_stage_travels_on_as_what_can_be_pickled() -> None:
    told = _told(RayActorError(error_msg="first\nsecond"), "rollout worker 0")
    again = pickle.loads(pickle.dumps(told))
    assert type(again) is StageDiedError
    assert str(again) == "a stage that rollout worker 0 talks to died (first)"


def test_logs_that_cannot_be_kept_do_not_hide_why_the_run_ended(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    (source / "worker-1.err").touch()
    keep_logs(source, target)
    assert not target.exists()
    (source / "worker-2.err").write_text("why")
    keep_logs(source, target)
    assert [path.name for path in target.iterdir()] == ["worker-2.err"]
    keep_logs(source, source / "worker-2.err")  # no folder: an OSError
