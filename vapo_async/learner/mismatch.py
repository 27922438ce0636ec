"""Engine against learner, with every batch: the same tokens under the same weights, and a check at a run's start.

Tokens of the present weights are compared by the pass that the learner makes anyway. Generation runs ahead, so most
tokens are older: copies of the last few policies score a bounded number of their responses.
"""

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from vapo_async.config import LearnerConfig, RunError
from vapo_async.learner.backend import Backend, Snapshot
from vapo_async.learner.batch import LearnerBatch
from vapo_async.objectives.mismatch import Mismatch, engine_mismatch, worst_tokens

SCORED_RESPONSES = 16
"""Of one older policy in one batch, at most."""
CHECKED_TOKENS = 32
"""Fewer say too little for the check: single tokens of an engine in bfloat16 differ by 0.4."""
SHOWN_TOKENS = 5

Decode = Callable[[Sequence[int]], list[str]]
"""The text of each of some tokens."""


class EngineMismatchError(RunError):
    """The engine's log-probs are not the learner's. The first line says how far off they are; then the worst tokens."""


@dataclass(frozen=True)
class _Policy:
    """The weights of the versions ``first`` to ``last``; ``number`` counts the changes seen in this process."""

    number: int
    first: int
    last: int
    snapshot: Snapshot | None
    """None: the learner's present parameters."""


class MismatchMeter:
    """Compares the engine's log-probs with those of the weights that sampled the tokens.

    The first two policies that it meets are checked against a limit: what the engines started with, and what was first
    published to them. The check takes responses of one policy alone: with ``kv_cache_on_update=keep`` the tokens after
    a swap are of the new weights over old keys, which no learner computes. The metrics count these too: they are a
    mismatch that the losses meet.

    Args:
        backend: of the policy that is trained.
        config: how many older policies are kept, and the limits of one pass.
        temperature: the learner's, for what the engine should have sampled with.
        limit: nats, of the mean difference that the check allows; None = no check.
        decode: for the error's lines; None shows token ids alone.
    """

    def __init__(
        self,
        backend: Backend,
        config: LearnerConfig,
        *,
        temperature: float,
        limit: float | None = None,
        decode: Decode | None = None,
    ) -> None:
        self._backend = backend
        self._max_tokens = config.max_tokens_per_microbatch
        self._limit, self._decode, self._temperature = limit, decode, temperature
        self._unchecked = {0, 1}
        self._number, self._since = 0, -1  # of the present policy; its first version, -1: not known yet
        self.kept: deque[_Policy] = deque()
        """Older policies, the newest last."""
        self._keep = config.mismatch_versions

    def measure(self, batch: LearnerBatch, version: int, *, evaluated: bool, trained: bool) -> dict[str, float]:
        """``engine_mismatch_tokens``, and what there is to say of them.

        Args:
            batch: read only.
            version: of the present policy.
            evaluated: whether ``batch.prox_log_prob`` holds the log-probs under the present policy.
            trained: whether the policy has ever been stepped, in this process or before; if not, all versions so far
                have the weights of the present one.

        Raises:
            EngineMismatchError: the check at the start failed.
        """
        if self._since < 0:
            self._since = version if trained else 0
        learner_log_prob = batch.prox_log_prob.clone() if evaluated else torch.zeros_like(batch.prox_log_prob)
        measured = torch.zeros_like(batch.mask)
        for policy in (_Policy(self._number, self._since, version, None), *self.kept):
            theirs = batch.mask & (batch.policy_version >= policy.first) & (batch.policy_version <= policy.last)
            if policy.snapshot is not None or not evaluated:
                theirs = self._score(batch, policy, theirs, learner_log_prob)
            self._check(batch, policy, theirs, learner_log_prob)
            measured |= theirs
        return _metrics(engine_mismatch(batch.sample_log_prob, learner_log_prob, measured))

    def policy_changes(self, version: int) -> None:
        """Before the optimizer's first step at ``version``: keeps a copy of the weights."""
        if self._keep:
            if len(self.kept) == self._keep:
                self.kept.popleft()  # first: there are never more copies than that
            self.kept.append(_Policy(self._number, self._since, version, self._backend.snapshot()))
        self._number += 1
        self._since = version + 1

    @torch.no_grad()
    def _score(self, batch: LearnerBatch, policy: _Policy, theirs: Tensor, log_prob: Tensor) -> Tensor:
        """Writes ``log_prob`` [N, T] of one micro-batch of the policy's responses; returns which tokens those are."""
        rows = _rows_with_most(theirs.sum(1).tolist(), batch.lengths, self._max_tokens)
        found = torch.zeros_like(theirs)
        if rows:
            width = max(batch.lengths[row] for row in rows)
            tokens, mask = batch.tokens[rows, :width], theirs[rows, :width]
            other = nullcontext() if policy.snapshot is None else self._backend.using(policy.snapshot)
            with other:
                scored, _ = self._backend.module(tokens, mask)
            log_prob[rows, :width] = torch.where(mask, scored, log_prob[rows, :width])  # others have other policies
            found[rows] = theirs[rows]
        return found

    def _check(self, batch: LearnerBatch, policy: _Policy, theirs: Tensor, log_prob: Tensor) -> None:
        if self._limit is None or policy.number not in self._unchecked:
            return
        whole = theirs & (theirs == batch.mask).all(1, keepdim=True)
        found = engine_mismatch(batch.sample_log_prob, log_prob, whole)
        if found.tokens < CHECKED_TOKENS:
            return
        self._unchecked.remove(policy.number)
        if not found.mean <= self._limit:  # NaN is no agreement
            head = (
                f"engine and learner disagree about the same weights: their log-probs differ by {found.mean:.3g} nats "
                f"on average over {found.tokens:,} tokens, the limit is {self._limit:g} (engine.max_mismatch). Either "
                "the engine read other prompts (chat template, tokenizer), sampled at another temperature than "
                f"{self._temperature:g} (engine.temperature) or did not get the weights of the version below: mend "
                "that; or its arithmetic is that coarse: raise engine.max_mismatch"
            )
            raise EngineMismatchError("\n".join([head, *self._worst(batch, log_prob, whole)]))

    def _worst(self, batch: LearnerBatch, log_prob: Tensor, mask: Tensor) -> list[str]:
        places = worst_tokens(batch.sample_log_prob, log_prob, mask, SHOWN_TOKENS)
        tokens = [int(batch.tokens[place]) for place in places]
        texts = [""] * len(places) if self._decode is None else [f" {text!r}" for text in self._decode(tokens)]
        starts = batch.mask.int().argmax(1).tolist()
        lines = [f"The worst {len(places)} tokens, places counted from 0:"]
        for (row, column), token, text in zip(places, tokens, texts, strict=True):
            engine, learner = float(batch.sample_log_prob[row, column]), float(log_prob[row, column])
            ratio = float((log_prob[row, column] - batch.sample_log_prob[row, column]).exp())
            lines.append(
                f"  response {row} of the batch, token {column - starts[row]}, version "
                f"{int(batch.policy_version[row, column])}: id {token}{text}, log-prob {engine:.4f} by the engine, "
                f"{learner:.4f} by the learner, ratio {ratio:.4g}"
            )
        return lines


def _rows_with_most(counts: Sequence[int], lengths: Sequence[int], max_tokens: int) -> list[int]:
    """Rows of the largest counts above 0 that fit into one padded micro-batch, ``SCORED_RESPONSES`` at most."""
    rows: list[int] = []
    longest = 0
    for row in sorted(range(len(counts)), key=lambda i: (-counts[i], i)):
        longest = max(longest, lengths[row])
        if not counts[row] or len(rows) == SCORED_RESPONSES or (len(rows) + 1) * longest > max_tokens:
            break
        rows.append(row)
    return rows


def _metrics(found: Mismatch) -> dict[str, float]:
    measured = {"mean": found.mean, "max": found.max, "kl": found.kl, "outside": found.outside}
    return {"engine_mismatch_tokens": found.tokens} | (
        {f"engine_mismatch_{name}": value for name, value in measured.items()} if found.tokens else {}
    )
