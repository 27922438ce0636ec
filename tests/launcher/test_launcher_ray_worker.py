"""When a rollout worker has to be looked at, and what is then found."""

import time

import pytest

from vapo_async.config import RayLauncherConfig
from vapo_async.launcher.ray_worker import Worker

LAUNCHER = RayLauncherConfig(start_timeout_s=300.0, engine_timeout_s=120.0)


def worker(heard_at: float = 1000.0, **states: object) -> Worker:
    found = Worker(0, "rollout worker 0", None, heard_at)
    for name, value in states.items():
        setattr(found, name, value)
    return found


@pytest.mark.parametrize(
    ("states", "due_at"),
    [
        ({}, 1300.0),
        ({"up": True}, 1120.0),
        ({"up": True, "asked_at": 1130.0}, 1250.0),
        ({"up": False, "asked_at": 1130.0}, 1300.0),
    ],
)
def test_one_that_starts_has_the_limit_of_a_start_and_later_each_question_that_of_an_engine(
    states: dict[str, object], due_at: float
) -> None:
    assert worker(**states).due_at(LAUNCHER) == due_at


def test_who_is_due_is_asked_before_it_counts_as_dead() -> None:
    assert worker().why_silent(LAUNCHER, 1301.0) == "it did not start within 300 s"
    assert worker(up=True).why_silent(LAUNCHER, 1121.0) is None
    asked = worker(up=True, asked_at=1121.0)
    expected = "it gave no sign of life for 242 s (launcher.engine_timeout_s=120)"
    assert asked.why_silent(LAUNCHER, 1242.0) == expected


@pytest.mark.parametrize(
    ("states", "watched"),
    [
        ({}, True),
        ({"up": True}, False),
        ({"up": True, "running": True}, True),
        ({"up": True, "handing": True}, True),
        ({"lost": True}, False),
        ({"up": True, "running": True, "handing": True, "lost": True}, False),
    ],
)
def test_who_rests_and_who_is_lost_owe_no_sign_of_life(states: dict[str, object], watched: bool) -> None:
    assert worker(**states).watched is watched


def test_a_sign_of_life_answers_the_question_for_it() -> None:
    before = time.monotonic()
    found = worker(up=True, asked_at=1130.0)
    found.heard()
    assert before <= found.heard_at <= time.monotonic()
    assert found.asked_at is None
    assert found.due_at(LAUNCHER) == found.heard_at + 120.0
