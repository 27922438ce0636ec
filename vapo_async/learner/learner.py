"""VAPO's learner: one batch of trajectories becomes critic and policy updates.

It knows neither what steps the models nor how many processes share them: every rank gets the whole batch and does the
same, but for the passes through the models, of which each makes its own; what comes of them is summed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn
from transformers import PreTrainedModel

from vapo_async.config import LearnerConfig
from vapo_async.config.algorithm import AlgorithmConfig, ImportanceKind, MismatchKind, ValueTargetKind
from vapo_async.learner.activations import checkpoint_activations
from vapo_async.learner.backend import Backend, Schedule, Snapshot
from vapo_async.learner.backend_torch import TorchBackend
from vapo_async.learner.batch import LearnerBatch
from vapo_async.learner.batch_metrics import batch_metrics, critic_metrics
from vapo_async.learner.estimates import write_advantages, write_value_targets
from vapo_async.learner.mismatch import Decode, MismatchMeter
from vapo_async.learner.models import Critic, PolicyModel, check_log_probs, decoder_cost
from vapo_async.learner.packed import enable_packing
from vapo_async.learner.packing import WORTH_PACKING, minibatches
from vapo_async.learner.ranks import OneRank, Ranks, summed
from vapo_async.learner.sharing import Pass, Sharing
from vapo_async.objectives.importance import m2po_keep
from vapo_async.objectives.losses import (
    Denominators,
    Sums,
    add_sums,
    denominators_of,
    policy_metrics,
    policy_terms,
    value_metrics,
    vapo_value_loss,
)
from vapo_async.objectives.settings import PolicySettings

MakeBackend = Callable[[nn.Module, Schedule, str], Backend]
"""Of a model, how it is stepped, and the prefix of its parameters' names."""


@dataclass(frozen=True)
class UpdateResult:
    """What one batch did.

    ``tokens`` are the response tokens trained on; ``policy_changed`` is False in pretraining; ``note`` is a line for
    the user, set by the last batch of value pretraining.
    """

    metrics: dict[str, float]
    tokens: int
    policy_steps: int
    critic_steps: int
    policy_changed: bool
    note: str | None = None


class Learner:
    """Policy and critic with their optimizers.

    Args:
        algorithm: which of VAPO's techniques are on.
        config: memory limits and device.
        policy: the model to train; moved to the device.
        critic: None exactly where ``algorithm.advantage`` is ``group``.
        temperature: the engine's sampling temperature, applied to the learner's log-probs too.
        seed: of the mini-batch shuffling.
        max_mismatch: nats, mean difference to the engine's log-probs that a start may have; None = no check.
        decode: texts of tokens, for that check's error.
        ranks: all processes that learn together; each makes the same calls with the same arguments.
        make_backend: what steps a model.
    """

    def __init__(
        self,
        algorithm: AlgorithmConfig,
        config: LearnerConfig,
        policy: PreTrainedModel,
        critic: Critic | None,
        *,
        temperature: float,
        seed: int,
        max_mismatch: float | None = None,
        decode: Decode | None = None,
        ranks: Ranks | None = None,
        make_backend: MakeBackend = TorchBackend,
    ) -> None:
        self._algorithm, self._config = algorithm, config
        self.ranks: Ranks = ranks or OneRank()
        self._device = torch.device(config.device)
        nn.Module.to(policy, self._device)
        self.policy = policy.eval()  # eval: no dropout, the ratios compare like with like
        self._settings = PolicySettings.of(algorithm)
        self.critic = None if critic is None else critic.to(self._device).eval()
        if config.activation_checkpointing:
            for module in filter(None, (self.policy, self.critic)):
                checkpoint_activations(module)
        model = PolicyModel(self.policy, temperature=temperature, chunk_tokens=config.logprob_chunk_tokens)
        self.policy_backend = make_backend(model, _schedule(algorithm.policy_lr, algorithm), PolicyModel.PREFIX)
        self._reference: Snapshot | None = None if self._settings.kl_coef is None else self.policy_backend.snapshot()
        self.critic_backend: Backend | None = None
        if self.critic is not None:
            self.critic_backend = make_backend(self.critic, _schedule(algorithm.critic_lr, algorithm), "")
        check_log_probs(model)
        packs = config.packing and _packs(self.policy, self.critic)
        self._sharing = Sharing(
            rank=self.ranks.rank,
            ranks=self.ranks.size,
            max_tokens=config.max_tokens_per_microbatch,
            cost=decoder_cost(self.policy, self.policy_backend.shapes),
            worth_packing=WORTH_PACKING[self._device.type] if packs else 0.0,
        )
        self._mismatch = MismatchMeter(
            self.policy_backend, config, temperature=temperature, limit=max_mismatch, decode=decode
        )
        self.generator = torch.Generator().manual_seed(seed)
        self.batches = 0
        """Batches learned from so far, value pretraining included."""
        self.pretraining_variances: list[float] = []
        """Explained variance of each batch of value pretraining so far, before the critic learned from it."""

    @property
    def in_value_pretraining(self) -> bool:
        """Whether the next batch trains only the critic."""
        return self.batches < self._algorithm.value_pretraining_steps

    def update(self, trajectories: Sequence[TensorDictBase], version: int) -> UpdateResult:
        """Learns from one batch. ``version`` is the policy's version now, which the tokens' versions compare with.

        Raises:
            EngineMismatchError: engine and learner disagree at the start; nothing was learned from the batch.
            LearnerDivergedError: a gradient norm is not finite; nothing was stepped with it.
        """
        batch = LearnerBatch.from_trajectories(trajectories, self._device, version)
        if self._algorithm.overlong_filter:
            batch.leave_out_truncated()
        pretraining = self.in_value_pretraining
        needs_prox = pretraining or _needs_prox(self._algorithm)
        metrics = batch_metrics(batch) | self._evaluate(batch, pretraining, needs_prox)
        stepped = self.policy_backend.step_count > 0
        metrics |= self._mismatch.measure(batch, version, evaluated=needs_prox, trained=stepped)
        write_advantages(batch, self._algorithm)
        if self.critic is not None:
            write_value_targets(batch, self._algorithm, pretraining=pretraining)
            metrics |= critic_metrics(batch)
            if pretraining:
                self.pretraining_variances.append(metrics["explained_variance"])
        if not pretraining and bool(batch.trained.any()):
            self._mismatch.policy_changes(version)
        before = self.policy_backend.step_count, self._critic_steps()
        history: list[dict[str, float]] = []
        for _ in range(self._algorithm.epochs):
            order = torch.randperm(len(batch), generator=self.generator).tolist()
            trained = batch.trained.any(1).tolist()
            for rows in minibatches([r for r in order if trained[r]], self._algorithm.minibatches):
                history.append(self._minibatch(batch, sorted(rows), pretraining))
        self.batches += 1
        pretraining_ends = pretraining and not self.in_value_pretraining
        for key in history[-1] if history else ():
            # What was measured on the batch's start comes before means over its mini-batches.
            metrics.setdefault(key, sum(h[key] for h in history) / len(history))
        return UpdateResult(
            metrics,
            tokens=int(batch.trained.sum()),
            policy_steps=self.policy_backend.step_count - before[0],
            critic_steps=self._critic_steps() - before[1],
            policy_changed=not pretraining,
            note=pretraining_note(self.pretraining_variances) if pretraining_ends else None,
        )

    def _critic_steps(self) -> int:
        return 0 if self.critic_backend is None else self.critic_backend.step_count

    @torch.no_grad()
    def _evaluate(self, batch: LearnerBatch, pretraining: bool, needs_prox: bool) -> dict[str, float]:
        """Writes ``prox_log_prob``, ``ref_log_prob`` and ``state_value`` with the weights of the start of the batch."""
        entropy = batch.sample_log_prob.new_zeros((), dtype=torch.float64)
        for part in self._sharing.passes(batch, range(len(batch))):
            inputs = part.of(batch.tokens), part.mask_of(batch.mask), part.lengths
            if needs_prox:
                log_prob, of_tokens = self.policy_backend.module(*inputs)
                _write(batch.prox_log_prob, part, log_prob)
                entropy += of_tokens.sum()
            if self._reference is not None and not pretraining:
                with self.policy_backend.using(self._reference):
                    _write(batch.ref_log_prob, part, self.policy_backend.module(*inputs)[0])
            if self.critic_backend is not None:
                _write(batch.state_value, part, self.critic_backend.module(*inputs))
        for evaluated in (batch.prox_log_prob, batch.ref_log_prob, batch.state_value, entropy):
            self.ranks.sum_(evaluated)  # each rank has written the rows that it took
        return {"entropy": float(entropy / batch.mask.sum())} if needs_prox else {}

    def _minibatch(self, batch: LearnerBatch, rows: list[int], pretraining: bool) -> dict[str, float]:
        """One optimizer step of the policy, K of the critic; denominators are global to ``rows``, over all ranks."""
        denominators = denominators_of(batch.trained[rows], batch.correct[rows])
        parts = self._sharing.passes(batch, rows)
        metrics = self._critic_steps_on(batch, parts, denominators, pretraining)
        return metrics if pretraining else metrics | self._policy_step_on(batch, rows, parts, denominators)

    def _critic_steps_on(
        self, batch: LearnerBatch, parts: list[Pass], denominators: Denominators, pretraining: bool
    ) -> dict[str, float]:
        if self.critic_backend is None:
            return {}
        metrics: dict[str, float] = {}
        for _ in range(self._algorithm.critic_updates):
            sums: Sums = {}
            for part in parts:
                loss, more = vapo_value_loss(
                    self.critic_backend.forward(part.of(batch.tokens), part.mask_of(batch.mask), part.lengths),
                    part.of(batch.value_target),
                    mask=part.mask_of(batch.trained),
                    denominators=denominators,
                    old_value=part.of(batch.state_value),
                    clip=None if pretraining else self._algorithm.value_clip,
                )
                self.critic_backend.backward(loss)
                sums = add_sums(sums, more)
            metrics = {"loss_critic": float(value_metrics(summed(sums, self.ranks))["loss_critic"])}
            metrics["grad_norm_critic"] = self.critic_backend.step()
        return metrics

    def _policy_step_on(
        self, batch: LearnerBatch, rows: list[int], parts: list[Pass], denominators: Denominators
    ) -> dict[str, float]:
        keep = torch.ones_like(batch.trained)
        if self._algorithm.importance is ImportanceKind.m2po:  # over the whole mini-batch, however it is cut
            log_ratio = batch.prox_log_prob[rows] - batch.sample_log_prob[rows]
            keep[rows] = m2po_keep(
                log_ratio, batch.advantage[rows], batch.trained[rows], self._algorithm.m2po_threshold
            )
        sums: Sums = {}
        for part in parts:
            log_prob, entropy = self.policy_backend.forward(
                part.of(batch.tokens), part.mask_of(batch.mask), part.lengths
            )
            losses, more = policy_terms(
                log_prob,
                entropy,
                mask=part.mask_of(batch.trained),
                advantage=part.of(batch.advantage),
                sample_log_prob=part.of(batch.sample_log_prob),
                prox_log_prob=part.of(batch.prox_log_prob),
                ref_log_prob=None if self._reference is None else part.of(batch.ref_log_prob),
                age=part.of(batch.age),
                keep=part.of(keep),
                correct=batch.correct[part.rows],
                settings=self._settings,
                denominators=denominators,
            )
            self.policy_backend.backward(sum(losses.values(), start=log_prob.new_zeros(())))
            sums = add_sums(sums, more)
        metrics = {"grad_norm_policy": self.policy_backend.step()}
        return metrics | {key: float(value) for key, value in policy_metrics(summed(sums, self.ranks)).items()}


def pretraining_note(variances: Sequence[float]) -> str:
    """Whether explained variance rose, by 0.01 or so at least, from the first quarter of the batches to the last.

    Policy training on a critic that explains nothing is noise (docs/methods.md, technique 1).
    """
    quarter = max(1, len(variances) // 4)
    first, last = (round(sum(part) / quarter, 2) + 0.0 for part in (variances[:quarter], variances[-quarter:]))
    if last > first:
        return f"value pretraining: explained variance rose from {first:.2f} to {last:.2f}"
    return (
        f"value pretraining: explained variance has not risen ({first:.2f} → {last:.2f}): "
        "raise algorithm.value_pretraining_steps or algorithm.critic_lr"
    )


def _schedule(lr: float, algorithm: AlgorithmConfig) -> Schedule:
    return Schedule(lr, algorithm.lr_warmup_steps, algorithm.weight_decay, algorithm.max_grad_norm)


def _packs(policy: PreTrainedModel, critic: Critic | None) -> bool:
    """Both or none: a mini-batch is cut once."""
    backbone = None if critic is None else critic.backbone
    return enable_packing(policy) and (not isinstance(backbone, PreTrainedModel) or enable_packing(backbone))


def _write(to: Tensor, part: Pass, values: Tensor) -> None:
    if part.counts:
        to[part.rows, : part.width] = values


def _needs_prox(algorithm: AlgorithmConfig) -> bool:
    """A-3PO is there to save this pass; everything else reads it, if only for the metrics."""
    saves = algorithm.importance is ImportanceKind.a3po and algorithm.mismatch is MismatchKind.none
    return not saves or algorithm.value_target is ValueTargetKind.vtrace
