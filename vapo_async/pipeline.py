"""The control loop: takes batches, has them learned, publishes, evaluates, keeps checkpoints.

 prompts ──ticket──▶ collector ──▶ verifier ──▶ buffer ──batch──▶ learner ──weights, version v+1──▶ collector
 (stream)            (engine)      (reward)     (≤ S versions old) (critic, GAE, loss)               (in flight)

| stage     | consumes                      | produces                                   | waits for          |
|-----------|-------------------------------|--------------------------------------------|--------------------|
| prompts   | a task                        | prompts; returned ones come first          | –                  |
| collector | a ticket and a prompt         | a group with log-prob and version per token| admission          |
| verifier  | response text, answer         | verdict and reward                         | –                  |
| buffer    | groups                        | a batch of B groups, none older than S     | B finished groups  |
| learner   | a batch                       | updated policy and critic, metrics         | a batch            |
| weights   | the learner's parameters      | version v+1 in every engine, mid-generation| –                  |

The loop is the same whether the stages share a process (``launcher=inline``) or each has its own (``launcher=ray``).
"""

import errno
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from vapo_async.buffer import PublicationError
from vapo_async.checkpoint import CheckpointError, write_checkpoint
from vapo_async.config import Config, RunError
from vapo_async.config.load import save_config
from vapo_async.config.saved import CONFIG_FILE
from vapo_async.interrupts import NOW, Interrupts, Stop
from vapo_async.metrics.console import Console
from vapo_async.metrics.summary import Summary
from vapo_async.recorder import Recorder
from vapo_async.stages import Stages, StepTimes

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
"""What a full or a failing disk answers."""


def train(
    config: Config,
    stages: Stages,
    run_dir: Path,
    console: Console,
    *,
    resumed: Path | None = None,
    overrides: Sequence[str] = (),
) -> Summary:
    """Runs value pretraining and ``config.steps`` policy updates; goes on from the checkpoint ``resumed``, if any.

    The configuration is written into the run's folder once the checkpoint has taken it; ``overrides`` are noted in it.

    A first Ctrl-C or SIGTERM ends it with a checkpoint; the summary's status is then ``interrupted``.

    Raises:
        RunError: a stage failed; a checkpoint was tried, and the console says whether there is one.
        OSError: likewise, with one of ``DISK_ERRORS``: the disk is full.
    """
    with Interrupts() as interrupts, Recorder(config, run_dir, console) as recorder:
        if resumed is not None:
            stages.load(resumed)
            recorder.load(resumed, stages.stats())
            recorder.checkpoint = resumed
            recorder.note(f"resumed from {resumed}: {recorder.batches} of {_total(config)} batches done")
        save_config(config, run_dir / CONFIG_FILE, overrides)
        try:
            return _run(config, stages, recorder, run_dir, interrupts)
        except (RunError, OSError) as error:
            if isinstance(error, RunError) or error.errno in DISK_ERRORS:
                _rescue(config, stages, recorder, run_dir, error)
            raise


def _total(config: Config) -> int:
    return config.algorithm.value_pretraining_steps + config.steps


def _run(config: Config, stages: Stages, recorder: Recorder, run_dir: Path, interrupts: Interrupts) -> Summary:
    """From the base's evaluation to the summary."""
    if not recorder.evaluated(0):
        stages.start_evaluation(0)
        _evaluations(stages, recorder, NOW)
    if config.checkpoint.every and recorder.saved_at < 0:
        _save(config, stages, recorder, run_dir)  # from here on there is always something to resume
    recorder.start_clock()
    _batches(config, stages, recorder, run_dir, interrupts)
    interrupted = recorder.batches < _total(config)
    stages.stop_taking()  # generation ends here: what is left of the time belongs to the last evaluation
    if interrupted or recorder.saved_at != recorder.batches:
        _save(config, stages, recorder, run_dir)
    if not interrupted and not recorder.evaluated(recorder.step):
        stages.start_evaluation(recorder.step)
    while stages.evaluations_running and not interrupts():
        _evaluations(stages, recorder, interrupts)
    _evaluations(stages, recorder, NOW)
    assert recorder.checkpoint is not None, "the last batch was saved"
    return recorder.finish(stages.stats(), recorder.checkpoint, interrupted=interrupted)


def _batches(config: Config, stages: Stages, recorder: Recorder, run_dir: Path, stop: Stop) -> None:
    """Take, learn, publish, until all batches are done or ``stop`` says so."""
    while recorder.batches < _total(config) and not stop():
        clock = [time.perf_counter()]
        batch = stages.take(stop)
        if batch is None:
            return
        clock.append(time.perf_counter())
        result = stages.learn(batch)
        clock.append(time.perf_counter())
        stages.publish(result.policy_changed)
        clock.append(time.perf_counter())
        times = StepTimes(*(end - start for start, end in pairwise(clock)))
        recorder.batch(batch, result, stages.stats(), times)
        if result.note:
            recorder.note(result.note)
        every = config.evaluation.every
        due = result.policy_changed and every and recorder.step % every == 0 and recorder.step < config.steps
        if due and not stages.evaluations_running:  # a slow evaluation is not overtaken by a queue of others
            stages.start_evaluation(recorder.step)
        _evaluations(stages, recorder, NOW)
        if config.checkpoint.every and recorder.batches % config.checkpoint.every == 0:
            _save(config, stages, recorder, run_dir)


def _evaluations(stages: Stages, recorder: Recorder, stop: Stop) -> None:
    """Records what has ended. An evaluation that failed costs its number, not the run."""
    try:
        for finished in stages.finished_evaluations(stop):
            recorder.evaluation(finished)
    except RunError as error:
        recorder.note(f"an evaluation failed: {error}")


def _save(config: Config, stages: Stages, recorder: Recorder, run_dir: Path) -> None:
    def write(folder: Path) -> None:
        stages.save(folder)
        try:
            stats = stages.stats()
        except RunError:  # a stage died that the checkpoint does not need
            stats = None
        recorder.save(folder, stats)

    recorder.checkpoint = write_checkpoint(run_dir, recorder.batches, config.checkpoint.keep, write)
    recorder.saved_at = recorder.batches


def _rescue(config: Config, stages: Stages, recorder: Recorder, run_dir: Path, error: Exception) -> None:
    """After a failure: saves what is whole and says which checkpoint there is."""
    try:
        if recorder.saved_at != recorder.batches and not isinstance(error, CheckpointError):
            _save(config, stages, recorder, run_dir)
    except (RunError, PublicationError) as failure:
        recorder.note(f"no checkpoint of the last batches: {failure}")
    saved = recorder.checkpoint
    recorder.note("the run leaves no checkpoint" if saved is None else f"resume=auto goes on from {saved}")
