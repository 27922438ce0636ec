"""The worker processes: limits, deaths, restarts, and none left behind."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from vapo_async.verifier import Sandbox, SandboxError, is_equivalent
from vapo_async.verifier.jobs import MAX_ANSWER_CHARS, EquivalenceJob, Job, Outcome, ReasoningGymJob, unpack
from vapo_async.verifier.process import WorkerProcess

RIGHT = Outcome(True)
HONEST = EquivalenceJob("1/2", r"\frac{x}{2x}")  # needs SymPy
SLOW = EquivalenceJob(r"\sqrt{\pi}", r"\int_{-\infty}^{\infty} e^{-x^2} dx")  # right, after a second or more
HANGS = EquivalenceJob("42", r"10^{10^{10}}!")


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(workers=2, timeout_s=2.0, memory_mb=2048) as box:
        yield box


def _gone(pid: int, within_s: float = 30.0) -> bool:
    end = time.monotonic() + within_s
    while time.monotonic() < end:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.05)
    return False


def test_order_is_kept(sandbox: Sandbox) -> None:
    jobs = [EquivalenceJob(str(i), str(i if i % 3 else i + 1)) for i in range(500)]
    assert [outcome.correct for outcome in sandbox.run(jobs)] == [i % 3 != 0 for i in range(500)]
    assert sandbox.run([]) == []


def test_reasoning_gym_pays_in_full_or_not_at_all(sandbox: Sandbox) -> None:
    preds = ["5", "15", "the answer is 5", "5 or 6", ""]
    outcomes = sandbox.run([ReasoningGymJob("chain_sum", "5", pred) for pred in preds])
    assert [outcome.correct for outcome in outcomes] == [True, False, False, False, False]


def test_a_scorer_that_compiles_the_answers_text_is_stopped(sandbox: Sandbox) -> None:
    countdown = {"numbers": [2, 3], "target": 5}  # its scorer gives the text to SymPy's eval
    jobs: list[Job] = [ReasoningGymJob("countdown", "2 + 3", pred, countdown) for pred in ["3+2", "__import__('os')"]]
    pids = sandbox.pids
    assert sandbox.run([*jobs, HONEST]) == [Outcome(False, "forbidden")] * 2 + [RIGHT]
    assert not set(sandbox.pids) & set(pids), "a sealed worker loads nothing: another one takes its place"
    pids = sandbox.pids
    assert sandbox.run([HONEST, ReasoningGymJob("chain_sum", "5", "5")] * 4) == [RIGHT] * 8
    assert sandbox.pids == pids, "what was needed once is loaded together"


def test_unknown_dataset_is_an_error(sandbox: Sandbox) -> None:
    with pytest.raises(SandboxError, match="no_such_task"):
        sandbox.run([ReasoningGymJob("no_such_task", "5", "5")])
    assert sandbox.run([HONEST]) == [RIGHT]


def test_metadata_that_json_cannot_say_is_refused(sandbox: Sandbox) -> None:
    with pytest.raises(TypeError):
        sandbox.run([ReasoningGymJob("chain_sum", "5", "5", {"bad": object()})])


def test_long_answers_are_not_looked_at(sandbox: Sandbox) -> None:
    assert sandbox.run([EquivalenceJob("1", "1" * (MAX_ANSWER_CHARS + 1)), HONEST]) == [
        Outcome(False, "too long"),
        RIGHT,
    ]


def test_a_hang_costs_only_its_own_answer(sandbox: Sandbox) -> None:
    jobs: list[Job] = [HONEST] * 5 + [HANGS] + [HONEST] * 5
    start = time.monotonic()
    outcomes = sandbox.run(jobs)
    assert outcomes == [RIGHT] * 5 + [Outcome(False, "timeout")] + [RIGHT] * 5
    assert time.monotonic() - start < 20


@pytest.mark.parametrize(
    "hostile",
    [
        "9**9**9**9",
        "\\frac{" * 600,
        "$" * 3000,
        "\\left(" * 200,
        "1," * 1500,
        "\ud800\\u0000\x00",
        "\\begin{matrix}" * 50,
        "x^{99999999999}-1",
    ],
)
def test_hostile_answers_are_wrong_and_the_next_is_judged(sandbox: Sandbox, hostile: str) -> None:
    outcomes = sandbox.run([EquivalenceJob("42", hostile), HONEST])
    assert not outcomes[0].correct
    assert outcomes[1] == RIGHT


def test_a_worker_limits_itself(sandbox: Sandbox) -> None:
    sandbox.run([HONEST] * 8)
    for worker in map(psutil.Process, sandbox.pids):
        assert worker.rlimit(psutil.RLIMIT_AS) == (2048 << 20, 2048 << 20)
        assert worker.rlimit(psutil.RLIMIT_FSIZE) == worker.rlimit(psutil.RLIMIT_CORE) == (0, 0)
        assert 0 < worker.rlimit(psutil.RLIMIT_CPU)[0] < 60  # seconds
        assert worker.rlimit(psutil.RLIMIT_NOFILE) == (1, 1)
        assert "HF_TOKEN" not in worker.environ()
        assert "Seccomp:\t2" in Path(f"/proc/{worker.pid}/status").read_text()


def test_stopped_and_killed_workers_are_replaced(sandbox: Sandbox) -> None:
    sandbox.run([HONEST] * 8)
    for death in (signal.SIGSTOP, signal.SIGKILL):
        for pid in sandbox.pids:
            os.kill(pid, death)
        assert sandbox.run([HONEST] * 8) == [RIGHT] * 8


def _kill_the_worker(box: Sandbox, times: int) -> None:
    """Waits each time until a worker has computed for a while."""
    for _ in range(times):
        pid = box.pids[0]
        end = time.monotonic() + 20
        while time.monotonic() < end and not _computes(pid):
            time.sleep(0.02)
        os.kill(pid, signal.SIGKILL)
        while time.monotonic() < end and box.pids[0] == pid:
            time.sleep(0.01)


def _computes(pid: int) -> bool:
    """It is sealed (so it judges) and has used processor time since."""
    if "Seccomp:\t2" not in Path(f"/proc/{pid}/status").read_text():
        return False
    before = sum(psutil.Process(pid).cpu_times()[:2])
    time.sleep(0.2)
    return sum(psutil.Process(pid).cpu_times()[:2]) > before + 0.05


@pytest.mark.parametrize(("deaths", "outcome"), [(1, Outcome(False, "timeout")), (2, Outcome(False, "crashed"))])
def test_an_answer_whose_worker_died_is_judged_once_more(deaths: int, outcome: Outcome) -> None:
    with Sandbox(workers=1, timeout_s=3.0, memory_mb=2048) as box:
        killer = threading.Thread(target=_kill_the_worker, args=(box, deaths))
        killer.start()
        start = time.monotonic()
        outcomes = box.run([HONEST, HANGS, HONEST])
        killer.join()
    assert outcomes == [RIGHT, outcome, RIGHT]
    assert time.monotonic() - start < 30


def test_a_worker_killed_from_outside_changes_no_verdict(sandbox: Sandbox) -> None:
    """Workers die again and again while honest answers are judged."""
    jobs = [
        EquivalenceJob(rf"\frac{{{i}}}{{7}} x", rf"\frac{{{i if i % 3 else i + 1} x^2}}{{7x}}") for i in range(1, 1500)
    ]
    done = threading.Event()

    def kill() -> None:
        while not done.wait(0.1):
            if "Seccomp:\t2" in Path(f"/proc/{(pid := sandbox.pids[0])}/status").read_text():  # it judges
                done.wait(1.0)  # longer than one answer takes, which is judged twice at most
                os.kill(pid, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        outcomes = sandbox.run(jobs)
    finally:
        done.set()
        killer.join()
    assert outcomes == [Outcome(i % 3 != 0) for i in range(1, 1500)]


def _stop_the_worker(box: Sandbox, times: int) -> None:
    for _ in range(times):
        pid, end = box.pids[0], time.monotonic() + 20
        while time.monotonic() < end and not _computes(pid):
            time.sleep(0.02)
        os.kill(pid, signal.SIGSTOP)
        while time.monotonic() < end and box.pids[0] == pid:
            time.sleep(0.01)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processor times of a worker are unknown")
@pytest.mark.parametrize(("stops", "outcome"), [(1, Outcome(True)), (2, Outcome(False, "timeout"))])
def test_an_answer_whose_worker_was_stopped_is_judged_once_more(stops: int, outcome: Outcome) -> None:
    with Sandbox(workers=1, timeout_s=8.0, memory_mb=2048) as box:
        box.run([HONEST])
        stopper = threading.Thread(target=_stop_the_worker, args=(box, stops))
        stopper.start()
        outcomes = box.run([SLOW])
        stopper.join()
    assert outcomes == [outcome]


def test_an_error_of_a_worker_that_is_ready_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer took the worker over and says what only a worker that loads may say."""
    receive, lies = WorkerProcess.receive, []

    def lie(self: WorkerProcess) -> list[dict[str, object]] | None:
        replies = receive(self)
        if replies and self.ready and len(lies) < 2:
            lies.append(self.pid)
            return [{"error": "out of order"}]
        return replies

    with Sandbox(workers=1, timeout_s=3.0, memory_mb=2048) as box:
        box.run([HONEST])
        monkeypatch.setattr(WorkerProcess, "receive", lie)
        assert box.run([HONEST]) == [Outcome(False, "crashed")]
        assert box.run([HONEST]) == [RIGHT]
    assert len(set(lies)) == 2


def test_a_deeply_nested_reply_is_garbage() -> None:
    body = b"[" * 60_000
    with pytest.raises(ValueError, match="nested"):
        list(unpack(bytearray(len(body).to_bytes(4, "big") + body), 1 << 16))


def test_a_process_that_cannot_be_started_is_one_line(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    sandbox.run([HONEST])
    with monkeypatch.context() as patch:
        patch.setattr("vapo_async.verifier.process.subprocess.Popen", refuse)
        with pytest.raises(SandboxError, match="temporarily unavailable"):
            Sandbox(workers=2, timeout_s=2.0, memory_mb=2048)
        for pid in sandbox.pids:
            os.kill(pid, signal.SIGKILL)
        with pytest.raises(SandboxError, match="temporarily unavailable"):
            sandbox.run([EquivalenceJob("1", "2")] * 8)
    assert sandbox.run([HONEST] * 8) == [RIGHT] * 8


def test_threads_may_share_it(sandbox: Sandbox) -> None:
    results: dict[int, list[bool]] = {}

    def ask(n: int) -> None:
        results[n] = [o.correct for o in sandbox.run([EquivalenceJob(str(n), str(i)) for i in range(20)])]

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {n: [i == n for i in range(20)] for n in range(8)}


def test_throughput(sandbox: Sandbox) -> None:
    """At least 500 answers per second of two workers: by the clock, or by the processor time of both where others
    compete for the processors.
    """
    jobs = [EquivalenceJob(f"{i:,}", str(i)) for i in range(5000)]
    sandbox.run(jobs[:200])
    workers = [psutil.Process(pid) for pid in sandbox.pids]
    before, start = _cpu_s(workers), time.monotonic()
    assert all(outcome.correct for outcome in sandbox.run(jobs))
    took = time.monotonic() - start
    computed = (_cpu_s(workers) - before) / len(workers)
    assert len(jobs) / took > 500 or (computed < took / 2 and len(jobs) / computed > 500)


def _cpu_s(processes: list[psutil.Process]) -> float:
    """Their processor seconds so far."""
    return sum(sum(process.cpu_times()[:2]) for process in processes)


def test_close_leaves_no_process() -> None:
    box = Sandbox(workers=2, timeout_s=2.0, memory_mb=2048)
    pids = box.pids
    box.run([HONEST])
    box.close()
    box.close()
    assert all(_gone(pid) for pid in pids)
    with pytest.raises(RuntimeError, match="closed"):
        box.run([HONEST])


@pytest.mark.parametrize("busy", [False, True])
def test_workers_end_with_a_killed_parent(busy: bool) -> None:
    code = (
        "from vapo_async.verifier import Sandbox; from vapo_async.verifier.jobs import EquivalenceJob as E\n"
        "box = Sandbox(1, 0.5, 2048); box.run([E('1', '1')]); print(box.pids[0], flush=True)\n"
        f"box.run([E('42', '10^{{10^{{10}}}}!')]) if {busy} else input()"
    )
    root = Path(__file__).parents[2]
    parent = subprocess.Popen(
        [sys.executable, "-c", code], cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    worker = int(parent.stdout.readline())
    time.sleep(0.5)
    parent.kill()
    parent.communicate()
    assert _gone(worker)


def test_a_worker_imports_no_torch() -> None:
    code = (
        "import sys, vapo_async.verifier.worker as w\n"
        "w.load({'math_verify', 'reasoning_gym chain_sum'})\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=False).returncode == 0


def test_workers_that_cannot_start_are_an_error() -> None:
    with Sandbox(workers=1, timeout_s=2.0, memory_mb=40) as box, pytest.raises(SandboxError, match="memory_mb"):
        box.run([HONEST])


@pytest.mark.parametrize("settings", [(0, 1.0, 512), (1, 0.0, 512), (1, 1.0, 0)])
def test_senseless_settings_are_refused(settings: tuple[int, float, int]) -> None:
    with pytest.raises(ValueError, match=r"verifier\."):
        Sandbox(*settings)


def test_is_equivalent() -> None:
    assert is_equivalent(r"\frac{1}{2}", "0.5")
    assert not is_equivalent("42", "The answer is 43")
    assert not is_equivalent("42", "4" * 10_000)
