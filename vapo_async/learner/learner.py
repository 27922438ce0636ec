"""VAPO's learner: one batch of trajectories becomes critic and policy updates. Knows no process layout."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn
from transformers import PreTrainedModel

from vapo_async.config import AdvantageKind, AlgorithmConfig, ImportanceKind, TorchLearnerConfig
from vapo_async.learner.backend_torch import TorchBackend
from vapo_async.learner.batch import LearnerBatch
from vapo_async.learner.models import Critic, policy_log_probs
from vapo_async.learner.packing import microbatches, minibatches
from vapo_async.objectives.advantage import (
    explained_variance,
    generalized_advantage,
    group_advantage,
    length_adaptive_lambda,
    value_targets,
    whiten,
)
from vapo_async.objectives.losses import (
    Sums,
    add_sums,
    denominators_of,
    policy_metrics,
    value_metrics,
    vapo_policy_loss,
    vapo_value_loss,
)


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
    """

    def __init__(
        self,
        algorithm: AlgorithmConfig,
        config: TorchLearnerConfig,
        policy: PreTrainedModel,
        critic: Critic | None,
        *,
        temperature: float,
        seed: int,
    ) -> None:
        self._algorithm, self._config, self._temperature = algorithm, config, temperature
        self._device = torch.device(config.device)
        nn.Module.to(policy, self._device)
        self.policy = policy.eval()  # eval: no dropout, the ratios compare like with like
        self.critic = None if critic is None else critic.to(self._device).eval()
        self.policy_backend = _backend(self.policy, algorithm.policy_lr, algorithm)
        self.critic_backend = None if self.critic is None else _backend(self.critic, algorithm.critic_lr, algorithm)
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
        """Learns from one batch. ``version`` is the policy's version now, for the engine-mismatch metrics.

        Raises:
            LearnerDivergedError: a gradient norm is not finite; nothing was stepped with it.
        """
        batch = LearnerBatch.from_trajectories(trajectories, self._device)
        pretraining = self.in_value_pretraining
        metrics = self._evaluate(batch, version)
        self._estimate_advantages(batch, pretraining)
        if self.critic is not None:
            metrics["explained_variance"] = float(explained_variance(batch.state_value, batch.value_target, batch.mask))
            if pretraining:
                self.pretraining_variances.append(metrics["explained_variance"])
        before = self.policy_backend.step_count, self._critic_steps()
        history: list[dict[str, float]] = []
        for _ in range(self._algorithm.epochs):
            order = torch.randperm(len(batch), generator=self.generator).tolist()
            for rows in minibatches(order, self._algorithm.minibatches):
                history.append(self._minibatch(batch, sorted(rows), pretraining))
        self.batches += 1
        pretraining_ends = pretraining and not self.in_value_pretraining
        for key in history[-1]:
            metrics[key] = sum(h[key] for h in history) / len(history)
        return UpdateResult(
            metrics,
            tokens=int(batch.mask.sum()),
            policy_steps=self.policy_backend.step_count - before[0],
            critic_steps=self._critic_steps() - before[1],
            policy_changed=not pretraining,
            note=pretraining_note(self.pretraining_variances) if pretraining_ends else None,
        )

    def _critic_steps(self) -> int:
        return 0 if self.critic_backend is None else self.critic_backend.step_count

    @torch.no_grad()
    def _evaluate(self, batch: LearnerBatch, version: int) -> dict[str, float]:
        """Writes ``prox_log_prob`` and ``state_value`` with the weights of the start of the batch."""
        entropy = torch.zeros_like(batch.sample_log_prob)
        for rows in microbatches(batch.lengths, self._config.max_tokens_per_microbatch):
            tokens, mask = self._rows(batch, rows)
            width = tokens.shape[1]
            batch.prox_log_prob[rows, :width], entropy[rows, :width] = self._log_probs(tokens, mask)
            if self.critic is not None:
                batch.state_value[rows, :width] = self.critic(tokens, mask)
        mask, count = batch.mask, float(batch.mask.sum())
        lengths = batch.response_lengths.float()
        gap = (batch.prox_log_prob - batch.sample_log_prob)[mask & (batch.policy_version == version)].abs()
        return {
            "reward": float(batch.reward.sum(1).mean()),
            "correct": float(batch.correct.float().mean()),
            "response_length": float(lengths.mean()),
            "response_length_max": float(lengths.max()),
            "truncated": float(batch.truncated.float().mean()),
            "entropy": float(entropy[mask].sum()) / count,
            "mixed_versions": float(_mixed_versions(batch).float().mean()),
            "token_age": float((version - batch.policy_version[mask]).float().mean()),
            "engine_mismatch_max": float(gap.max()) if len(gap) else 0.0,
            "groups_mixed": _mixed_groups(batch),
        }

    def _estimate_advantages(self, batch: LearnerBatch, pretraining: bool) -> None:
        """Advantages and targets, once for the whole batch and before any whitening."""
        a = self._algorithm
        match a.advantage:
            case AdvantageKind.group:
                batch.advantage = group_advantage(batch.reward.sum(1), batch.group_id, batch.mask)
                return
            case AdvantageKind.gae:
                lmbda: Tensor | float = a.lmbda
                if a.length_adaptive:
                    lmbda = length_adaptive_lambda(batch.response_lengths, a.alpha)
                batch.advantage = generalized_advantage(batch.state_value, batch.reward, batch.mask, a.gamma, lmbda)
        lmbda_critic = 1.0 if pretraining else a.lmbda_critic
        batch.value_target = value_targets(batch.state_value, batch.reward, batch.mask, a.gamma, lmbda_critic)
        if a.whiten_advantage:
            batch.advantage = whiten(batch.advantage, batch.mask)

    def _minibatch(self, batch: LearnerBatch, rows: list[int], pretraining: bool) -> dict[str, float]:
        """One optimizer step of the policy, K of the critic; denominators are global to ``rows``."""
        denominators = denominators_of(batch.mask[rows], batch.correct[rows])
        cut = microbatches([batch.lengths[r] for r in rows], self._config.max_tokens_per_microbatch)
        pieces = [[rows[i] for i in piece] for piece in cut]
        metrics: dict[str, float] = {}
        if self.critic is not None and self.critic_backend is not None:
            for _ in range(self._algorithm.critic_updates):
                sums: Sums = {}
                for piece in pieces:
                    tokens, mask = self._rows(batch, piece)
                    width = tokens.shape[1]
                    loss, more = vapo_value_loss(
                        self.critic(tokens, mask),
                        batch.value_target[piece, :width],
                        mask=mask,
                        denominators=denominators,
                        old_value=batch.state_value[piece, :width],
                        clip=None if pretraining else self._algorithm.value_clip,
                    )
                    loss.backward()
                    sums = add_sums(sums, more)
                metrics |= {"loss_critic": value_metrics(sums)["loss_critic"]}
                metrics["grad_norm_critic"] = self.critic_backend.step()
        if pretraining:
            return metrics
        sums = {}
        for piece in pieces:
            tokens, mask = self._rows(batch, piece)
            width = tokens.shape[1]
            log_prob, entropy = self._log_probs(tokens, mask)
            loss, more = vapo_policy_loss(
                log_prob,
                entropy,
                mask=mask,
                advantage=batch.advantage[piece, :width],
                sample_log_prob=batch.sample_log_prob[piece, :width],
                prox_log_prob=(
                    None if self._algorithm.importance is ImportanceKind.naive else batch.prox_log_prob[piece, :width]
                ),
                correct=batch.correct[piece],
                algorithm=self._algorithm,
                denominators=denominators,
            )
            loss.backward()
            sums = add_sums(sums, more)
        metrics["grad_norm_policy"] = self.policy_backend.step()
        return metrics | {k: v for k, v in policy_metrics(sums).items() if k != "entropy"}

    def _rows(self, batch: LearnerBatch, rows: list[int]) -> tuple[Tensor, Tensor]:
        """Tokens and mask of some rows, [n, their longest]."""
        width = max(batch.lengths[r] for r in rows)
        return batch.tokens[rows, :width], batch.mask[rows, :width]

    def _log_probs(self, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        return policy_log_probs(
            self.policy, tokens, mask, temperature=self._temperature, chunk_tokens=self._config.logprob_chunk_tokens
        )


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


def _backend(module: nn.Module, lr: float, algorithm: AlgorithmConfig) -> TorchBackend:
    return TorchBackend(
        module,
        lr=lr,
        warmup_steps=algorithm.lr_warmup_steps,
        weight_decay=algorithm.weight_decay,
        max_grad_norm=algorithm.max_grad_norm,
    )


def _mixed_versions(batch: LearnerBatch) -> Tensor:
    """[N] bool: responses that a publication reached in flight, so that their tokens carry several versions."""
    last = batch.policy_version.masked_fill(~batch.mask, torch.iinfo(torch.int32).min).amax(1)
    first = batch.policy_version.masked_fill(~batch.mask, torch.iinfo(torch.int32).max).amin(1)
    return last > first


def _mixed_groups(batch: LearnerBatch) -> float:
    """Share of groups with right and wrong answers both: those that group-relative methods could learn from."""
    right: dict[int, set[bool]] = {}
    for group, correct in zip(batch.group_id.tolist(), batch.correct.tolist(), strict=True):
        right.setdefault(group, set()).add(correct)
    return sum(len(kinds) == 2 for kinds in right.values()) / len(right)
