"""Killed engines are noticed by whatever call is waited for; killed owners take their engine with them."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest
from conftest import REPOSITORY
from vllm_runs import engine_processes, random_prompts, running_engine, versions_of_policy

from vapo_async.collector.engine import EngineDiedError, GenerationRequest
from vapo_async.weights.mailbox import published_tensors

if TYPE_CHECKING:
    from vapo_async.collector.engine_vllm import VLLMEngine

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(120)]
NOTICED_S, GONE_S = 10.0, 5.0
(POLICY,) = versions_of_policy(1, tied=True, family="qwen2")
PROMPT = random_prompts([40], seed=0)[0]


def step(engine: "VLLMEngine", number: int) -> None:
    engine.submit(GenerationRequest(number, PROMPT, 2, 150))
    engine.step()


def load_weights(engine: "VLLMEngine", number: int) -> None:
    engine.load_weights(number, published_tensors(POLICY))


def label(engine: "VLLMEngine", number: int) -> None:
    engine.load_weights(number, None)


def abort(engine: "VLLMEngine", number: int) -> None:
    engine.submit(GenerationRequest(number, PROMPT, 2, 150))
    engine.abort(number)


def partial(engine: "VLLMEngine", number: int) -> None:
    engine.submit(GenerationRequest(number, PROMPT, 2, 150))
    engine.partial(number)


@pytest.mark.parametrize(
    "call", [step, *(pytest.param(c, marks=pytest.mark.slow) for c in (load_weights, label, abort, partial))]
)
def test_a_killed_engine_is_noticed_within_ten_seconds(
    call: "Callable[[VLLMEngine, int], None]", tmp_path: Path
) -> None:
    """Killed while requests run and one call follows the other; after that every call says so, and closing works."""
    killed: list[float] = []
    with running_engine(POLICY, tmp_path) as engine:
        engine.submit(GenerationRequest(0, PROMPT, 8, 150))  # they may have ended by then: an idle engine dies as well
        engine.step()
        (process,) = engine_processes()

        def kill() -> None:
            killed.append(time.monotonic())
            process.kill()

        timer = threading.Timer(0.3, kill)
        timer.start()
        number = count(1)
        with pytest.raises(EngineDiedError, match=r"^vLLM's engine process died$"):
            while not killed or time.monotonic() - killed[0] < 2 * NOTICED_S:
                call(engine, next(number))
        first = time.monotonic() - killed[0]
        print(f"{call.__name__}: noticed after {first:.2f} s")
        assert first < NOTICED_S
        for other in (engine.step, lambda: engine.load_weights(10**6, None), lambda: load_weights(engine, 10**6)):
            began = time.monotonic()
            with pytest.raises(EngineDiedError):
                other()
            assert time.monotonic() - began < NOTICED_S
        began = time.monotonic()
        engine.close()
        engine.close()
        assert time.monotonic() - began < NOTICED_S


@contextmanager
def owner(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that starts an engine; it and all that it has started are gone afterwards."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(REPOSITORY / "tests"), str(REPOSITORY)])}
    command = [sys.executable, str(Path(__file__).with_name("vllm_owner.py")), str(folder)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        family: list[psutil.Process] = []
        try:
            yield process
            family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        finally:
            process.kill()
            for child in family:
                if child.is_running():
                    child.kill()


def runs(process: psutil.Process) -> bool:
    """Nobody may be there to collect what an orphan leaves."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def seconds_until_gone(processes: list[psutil.Process], at_most: float) -> float:
    began = time.monotonic()
    while any(runs(process) for process in processes) and time.monotonic() - began < at_most:
        time.sleep(0.01)
    return time.monotonic() - began


def test_a_killed_owner_takes_its_engine_along(tmp_path: Path) -> None:
    with owner(tmp_path) as process:
        assert process.stdout is not None
        told = (line.strip() for line in process.stdout)  # by others too
        engine = psutil.Process(next(int(line) for line in told if line.isdigit()))
        family = psutil.Process(process.pid).children(recursive=True)
        assert engine in family and engine.name() == "VLLM::EngineCore"
        process.kill()
        process.wait()
        gone = seconds_until_gone(family, 2 * GONE_S)
        print(f"gone after {gone:.2f} s")
        try:
            assert gone < GONE_S
        finally:
            for left in family:
                if runs(left):
                    left.kill()


ALONE = """
import multiprocessing, os, pathlib, sys, time

def child(said):
    while os.getppid() == multiprocessing.parent_process().pid:
        time.sleep(0.01)
    from vapo_async.weights.vllm_plugin import register
    pathlib.Path(said).write_text("registers")
    register()
    pathlib.Path(said).write_text("goes on")

if __name__ == "__main__":
    process = multiprocessing.get_context("spawn").Process(target=child, args=(sys.argv[1],))
    process.start()
    print(process.pid, flush=True)
    time.sleep(600)
"""


@pytest.mark.slow
def test_an_engine_whose_owner_died_before_it_could_ask_ends_itself(tmp_path: Path) -> None:
    """Killed before vLLM's process gets to the plugin: that sees by itself that it is alone."""
    script, said = tmp_path / "alone.py", tmp_path / "said"
    script.write_text(ALONE)
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, str(script), str(said)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        child = psutil.Process(int(process.stdout.readline()))
        time.sleep(2)  # what it has been given is read by then
        process.kill()
    try:
        assert seconds_until_gone([child], 90) < 60 and said.read_text() == "registers"
    finally:
        if runs(child):
            child.kill()
