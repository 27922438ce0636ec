"""Memory of the hosts beside GPUs: what the learner keeps there, and weights on their way to engines. Bytes throughout.

Counted is the moment of a publication while an evaluation starts, each of which copies the policy:

- every rank copies its share. With a broadcast it keeps that for engines that come later, and still has the last one
  while it makes the next;
- what goes through Ray's object store lies there once on every node that reads it, and in parts where it comes from;
- an engine of vLLM takes it from a file in memory, whose bytes are there twice while it is written (measured: a process
  that shares 0.3 GB holds 0.6 GB).
"""

from vapo_async.planning.layout import Layout, NodeLoad
from vapo_async.planning.memory import Memory, Part

KEPT_AND_NEXT = 2
FILE = 2
"""Times the weights that a file of them takes while it is written."""


def host_parts(
    load: NodeLoad, layout: Layout, learner: Memory, weights: float, *, broadcast: bool, files: bool
) -> tuple[Part, ...]:
    """Of one node.

    Args:
        load: processes on the node.
        layout: of the whole run.
        learner: of one rank.
        weights: of the policy, as they are sent.
        broadcast: they go from device to device; otherwise through Ray's store.
        files: engines take what comes through Ray's store from files in memory.
    """
    parts = [Part(f"learner: {part.name}", load.ranks * part.bytes) for part in learner.stays if part.on_host]
    share = load.ranks / layout.ranks * weights
    copies, file = (KEPT_AND_NEXT if broadcast else 0) + 1, FILE * weights if files else 0.0
    evaluators = min(load.engines, layout.evaluators)
    workers = load.engines - evaluators
    parts.append(Part("learner: copies of the policy", copies * share))
    if not broadcast:
        parts.append(Part("weights for engines", (weights if workers else share) + workers * file))
    parts.append(Part("weights for the evaluator", (weights if evaluators else share) + evaluators * file))
    return tuple(part for part in parts if part.bytes)
