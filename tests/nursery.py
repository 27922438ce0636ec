"""A process that has imported all that a run needs and forks runs from then on; see :class:`running.Nursery`.

Reads a JSON line for each run: ``{"arguments": [...], "log": path}``; answers with the process id of the run. When it
has ended, its exit code (negative: the signal that killed it) stands in the file ``<log>.exit``.
"""

import json
import os
import runpy
import sys
from pathlib import Path

import matplotlib.pyplot  # noqa: F401
import torch
from conftest import REPOSITORY
from transformers import PreTrainedTokenizerFast, Qwen2ForCausalLM  # noqa: F401

import vapo_async.launcher.run
import vapo_async.metrics.console  # noqa: F401

main = runpy.run_path(str(REPOSITORY / "scripts" / "train_async.py"))["main"]


def keeper(arguments: list[str], log: Path, announce: int) -> None:
    """Waits for the run; a process of its own, so that the nursery never waits."""
    pid = os.fork()
    if pid == 0:
        os.setsid()
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        code = 1
        try:
            code = main(arguments)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    os.write(announce, f"{pid}\n".encode())
    _, status = os.waitpid(pid, 0)
    draft = log.with_name(log.name + ".exit.partial")
    draft.write_text(str(os.waitstatus_to_exitcode(status)))
    draft.rename(log.with_name(log.name + ".exit"))
    os._exit(0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    print("ready", flush=True)
    for line in sys.stdin:
        wanted = json.loads(line)
        if os.fork() == 0:
            keeper(wanted["arguments"], Path(wanted["log"]), 1)
