"""An inline run that is stopped or killed at any moment and resumed is the run that nobody disturbed, bit for bit."""

import dataclasses
import itertools
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import tiny_overrides
from guessing_policy import guessing_overrides, make_guessing_policy
from running import FEW_PROBLEMS, assert_same_end, command, newest_run, nursery
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from vapo_async.build import BaseModel
from vapo_async.checkpoint import list_checkpoints
from vapo_async.config import Config, FolderModelConfig
from vapo_async.config.load import load_config
from vapo_async.launcher.inline import COLLECTOR, INLINE_FILE, InlineStages
from vapo_async.metrics.ledger import read_flow

VERSIONS = 6
STALE = ("buffer.max_staleness=4", "buffer.lead=2", "launcher.overlap_steps=3", "algorithm.value_pretraining_steps=2")


class StopAfter:
    """A stop that comes with the question number ``asks``."""

    def __init__(self, asks: int | None) -> None:
        self.left = asks

    def __call__(self) -> bool:
        if self.left is not None:
            self.left -= 1
        return self.left is not None and self.left < 0

    def on_request(self, wake: Callable[[], None]) -> None:
        """Nobody waits here."""


def opened(config: Config, checkpoint: Path | None = None) -> InlineStages:
    assert isinstance(config.model, FolderModelConfig)
    folder = Path(config.model.path)
    stages = InlineStages(config, BaseModel(folder, folder))
    if checkpoint is not None:
        stages.load(checkpoint)
    return stages


def go_on(stages: InlineStages, versions: int, stop: StopAfter, folder: Path) -> bool:
    """Until ``versions`` are published or the stop comes; then saves. Whether they are published."""
    try:
        while stages.flow.published < versions and (batch := stages.take(stop)) is not None:
            stages.publish(stages.learn(batch).policy_changed)
        folder.mkdir()
        stages.save(folder)
        return stages.flow.published == versions
    finally:
        stages.shutdown()


def tensors(folder: Path) -> dict[str, Tensor]:
    files = folder.rglob("*.safetensors")
    return {f"{path.relative_to(folder)}/{key}": tensor for path in files for key, tensor in load_file(path).items()}


@pytest.fixture(params=["keep", "dynamic sampling"])
def config(
    request: pytest.FixtureRequest, base_folder: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> Config:
    if request.param == "dynamic sampling":
        folder = make_guessing_policy(tmp_path / "guessing", tokenizer)
        return load_config([*guessing_overrides(folder, tmp_path), *STALE, "algorithm.dynamic_sampling=true"])
    cache = f"engine.kv_cache_on_update={request.param}"
    return load_config([*tiny_overrides(base_folder, tmp_path), FEW_PROBLEMS, *STALE, cache])


def test_saved_between_any_two_decode_steps(config: Config, tmp_path: Path) -> None:
    """Also between the steps of one wait, and in value pretraining; saving itself changes nothing."""
    undisturbed = tmp_path / "undisturbed"
    counter = StopAfter(10**9)
    assert go_on(opened(config), VERSIONS, counter, undisturbed)
    expected, asks = tensors(undisturbed), 10**9 - (counter.left or 0)
    assert asks > 15
    moments = random.Random(0)
    folders = (tmp_path / f"part-{part}" for part in itertools.count())
    last, stages = next(folders), opened(config)
    for cut in (moments.randrange(1, asks // 2), moments.randrange(1, asks // 2)):
        assert not go_on(stages, VERSIONS, StopAfter(cut), last)
        stages, last = opened(config, last), next(folders)
    assert go_on(stages, VERSIONS, StopAfter(None), last)
    found = tensors(last)
    assert found.keys() == expected.keys()
    assert not [name for name in expected if not torch.equal(found[name], expected[name])]
    for name in ("flow.json", "collector.json", "inline.json", "learner.json"):
        assert (last / name).read_text() == (undisturbed / name).read_text(), name


@pytest.mark.parametrize("change", ["staleness", "slots", "another launcher"])
def test_what_an_exact_resume_is_not_possible_for_goes_on_with_the_responses(
    base_folder: Path, tmp_path: Path, change: str
) -> None:
    config = load_config([*tiny_overrides(base_folder, tmp_path), FEW_PROBLEMS, *STALE, "buffer.lead=4"])
    saved = tmp_path / "saved"
    assert not go_on(opened(config), VERSIONS, StopAfter(45), saved)
    if change == "another launcher":
        for name in (INLINE_FILE, f"{COLLECTOR}.json", f"{COLLECTOR}.safetensors"):
            (saved / name).unlink()
    elif change == "staleness":
        config = dataclasses.replace(config, buffer=dataclasses.replace(config.buffer, max_staleness=3, lead=3))
    else:
        config = dataclasses.replace(config, engine=dataclasses.replace(config.engine, max_slots=3))  # type: ignore[type-var]
    stages = opened(config, saved)
    ages: list[int] = []
    trained: list[int] = []
    try:
        waiting = stages.flow.admit(100)
        assert any(response.token_ids for assignment in waiting for response in assignment.carried)
        for assignment in waiting:
            stages.collector.start(assignment.ticket, assignment.prompt, assignment.carried)
        while stages.flow.published < VERSIONS:
            batch = stages.take(StopAfter(None))
            assert batch is not None
            ages, trained = ages + batch.ages, trained + batch.tickets
            stages.publish(stages.learn(batch).policy_changed)
        tickets = stages.stats().flow.tickets
    finally:
        stages.shutdown()
    assert max(ages) <= config.buffer.max_staleness and len({*trained}) == len(trained)
    assert tickets["charged"] == tickets["committed"] + tickets["refunded"] + tickets["outstanding"]


def test_kill_9_ctrl_c_and_sigterm_one_after_the_other(base_folder: Path, tmp_path: Path) -> None:
    """The undisturbed run writes no checkpoint on its way, the other one after every batch."""
    settings = (*STALE, "steps=8", "evaluation.every=4")
    reference = nursery().start(
        command(base_folder, tmp_path / "reference", *settings, "checkpoint.every=0")[2:], tmp_path / "reference.log"
    )
    runs_dir, log = tmp_path / "disturbed", tmp_path / "log"
    arguments = command(base_folder, runs_dir, *settings, "checkpoint.every=1", "resume=auto")[2:]

    def checkpoint_reached(number: int) -> bool:
        return any(runs_dir.glob(f"tiny/*/checkpoints/step_{number:06d}/complete"))

    assert reference.wait(100) == 0, reference.log.read_text()
    for number, code, reached in (
        (signal.SIGKILL, -9, 0),  # before the first batch
        (signal.SIGKILL, -9, 1),  # in value pretraining
        (signal.SIGINT, 130, 3),
        (signal.SIGTERM, 130, 5),
    ):
        run = nursery().start(arguments, log)
        while not checkpoint_reached(reached):
            assert run.poll() is None, log.read_text()
            time.sleep(0.001)
        run.kill(number)
        assert run.wait(60) == code, log.read_text()
        assert "Traceback" not in log.read_text()
    run_dir = newest_run(runs_dir)
    assert list_checkpoints(run_dir)
    assert nursery().start(arguments, log).wait(100) == 0, log.read_text()
    assert newest_run(runs_dir) == run_dir and f"resumed from {run_dir}/checkpoints/step_" in log.read_text()
    assert_same_end(run_dir, newest_run(tmp_path / "reference"))
    for one, other in zip(read_flow(run_dir), read_flow(newest_run(tmp_path / "reference")), strict=True):
        for key in ("version", "tickets", "group_ids", "ages", "generated_tokens", "lengths"):
            assert one[key] == other[key], key
