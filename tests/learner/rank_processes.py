"""Processes that learn together, for tests: real DeepSpeed over gloo."""

import multiprocessing
import os
import pickle
import socket
import traceback
from collections.abc import Callable
from contextlib import closing
from multiprocessing.connection import Connection
from typing import Any

LOCAL = "127.0.0.1"


def in_ranks(
    size: int, work: Callable[..., Any], *args: Any, device: str = "cpu", timeout_s: float = 240.0
) -> list[Any]:
    """What ``work(ranks, *args)`` returns in each of ``size`` processes; fails with the first one's traceback.

    ``device``: ``cpu``, or ``cuda`` for one process.
    ``work`` is a function of a module, and it returns what can be pickled.
    """
    with closing(socket.socket()) as probe:
        probe.bind((LOCAL, 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    processes, outputs = [], []
    for rank in range(size):
        receiving, sending = context.Pipe(duplex=False)
        processes.append(
            context.Process(target=_rank, args=(rank, size, port, device, work, args, sending), daemon=True)
        )
        processes[-1].start()
        sending.close()
        outputs.append(receiving)
    try:
        answers = []
        for rank, output in enumerate(outputs):
            assert output.poll(timeout_s), f"rank {rank} did not answer within {timeout_s:g} s"
            answers.append(pickle.loads(output.recv_bytes()))
        errors = [f"rank {rank}:\n{answer}" for rank, (failed, answer) in enumerate(answers) if failed]
        assert not errors, "\n".join(errors)  # one may be the other's consequence
        return [answer for _, answer in answers]
    finally:
        for process in processes:
            process.kill()
            process.join()


def _rank(
    rank: int, size: int, port: int, device: str, work: Callable[..., Any], args: tuple[Any, ...], out: Connection
) -> None:
    os.environ["DS_ACCELERATOR"] = device
    import torch

    torch.set_num_threads(1)
    try:
        from vapo_async.learner.distributed import join_ranks

        ranks = join_ranks(LOCAL, port, rank=rank, size=size, device=device, timeout_s=120)
        found = False, work(ranks, *args)
    except BaseException:  # noqa: BLE001 (told to the test)
        found = True, traceback.format_exc()
    out.send_bytes(pickle.dumps(found))  # as copies: this process ends before they are looked at
