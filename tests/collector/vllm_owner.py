"""A process that owns an engine of vLLM's: says its name, then generates until it is killed. Argument: a folder."""

import sys
from pathlib import Path


def main(folder: Path) -> None:
    from vllm_runs import engine_processes, random_prompts, running_engine, versions_of_policy

    from vapo_async.collector.engine import GenerationRequest

    (policy,) = versions_of_policy(1, tied=True, family="qwen2")
    with running_engine(policy, folder) as engine:
        (process,) = engine_processes()
        number = 0
        while True:
            engine.submit(GenerationRequest(number, random_prompts([5], seed=number)[0], 8, 150))
            engine.step()
            if not number:
                print(process.pid, flush=True)
            number += 1


if __name__ == "__main__":  # vLLM's process imports this file too
    main(Path(sys.argv[1]))
