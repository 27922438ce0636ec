"""The control loop: takes batches, has them learned, publishes, evaluates, keeps checkpoints (DESIGN §2).

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

import time
from pathlib import Path

from vapo_async.checkpoint import list_checkpoints, write_checkpoint
from vapo_async.config import Config
from vapo_async.interrupts import Interrupted, Interrupts
from vapo_async.metrics.console import Console
from vapo_async.metrics.summary import Summary
from vapo_async.recorder import Recorder
from vapo_async.stages import Stages, TakenBatch


def train(config: Config, stages: Stages, run_dir: Path, console: Console, *, resume: bool) -> Summary:
    """Runs value pretraining and ``config.steps`` policy updates; ``resume`` goes on from the run's last checkpoint.

    A first Ctrl-C or SIGTERM ends it with a checkpoint; the summary's status is then ``interrupted``.
    """
    evaluation = config.evaluation
    total = config.algorithm.value_pretraining_steps + config.steps
    with Interrupts() as interrupts, Recorder(config, run_dir, console) as recorder:
        saved = -1
        if resume:
            checkpoint = list_checkpoints(run_dir)[-1]
            stages.load(checkpoint)
            recorder.load(checkpoint)
            saved = recorder.batches
            recorder.note(f"resumed from {checkpoint}: {recorder.batches} of {total} batches done")
        elif not recorder.evaluated(0):
            stages.start_evaluation(0)
        recorder.start_clock()
        while recorder.batches < total:
            start = time.perf_counter()
            batch = _take(stages, interrupts)
            waited_s = time.perf_counter() - start
            if batch is None:
                break
            result = stages.learn(batch)
            stages.publish(result.policy_changed)
            recorder.batch(batch, result, stages.stats(), waited_s)
            step = recorder.step
            if step and evaluation.every and step % evaluation.every == 0 and step < config.steps:
                stages.start_evaluation(step)
            for finished in stages.finished_evaluations(wait=False):
                recorder.evaluation(finished)
            every = config.checkpoint.every
            if step and every and step % every == 0 and result.policy_changed:
                _save(config, stages, recorder, run_dir)
                saved = recorder.batches
        interrupted = recorder.batches < total
        if interrupted:
            recorder.note("interrupted: writing a checkpoint (again to leave at once)")
        else:
            stages.stop_taking()  # generation ends here: what is left of the time belongs to the last evaluation
        if saved != recorder.batches:
            _save(config, stages, recorder, run_dir)
        if not interrupted and not recorder.evaluated(recorder.step):
            stages.start_evaluation(recorder.step)
        for finished in stages.finished_evaluations(wait=True):
            recorder.evaluation(finished)
        return recorder.finish(stages.stats().tickets, list_checkpoints(run_dir)[-1], interrupted=interrupted)


def _take(stages: Stages, interrupts: Interrupts) -> TakenBatch | None:
    """The next batch; after a signal the one that was already on its way, then None."""
    try:
        with interrupts.raising():
            return stages.take()
    except Interrupted:
        return stages.stop_taking()


def _save(config: Config, stages: Stages, recorder: Recorder, run_dir: Path) -> None:
    def write(folder: Path) -> None:
        stages.save(folder)
        recorder.save(folder)

    write_checkpoint(run_dir, recorder.batches, config.checkpoint.keep, write)
