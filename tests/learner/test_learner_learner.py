"""The learner against the engine, against itself under other cuts, and through a checkpoint."""

import dataclasses
import resource
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from conftest import tiny_policy
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tensordict import TensorDict
from transformers import PreTrainedTokenizerBase

from vapo_async.collector.engine import GenerationRequest
from vapo_async.collector.engine_transformers import TransformersEngine
from vapo_async.config import ConfigError, TorchLearnerConfig
from vapo_async.config.algorithm import AdvantageKind, AlgorithmConfig, ImportanceKind
from vapo_async.learner.backend import LearnerDivergedError, Schedule
from vapo_async.learner.backend_torch import TorchBackend
from vapo_async.learner.checkpoint import load_learner, save_learner
from vapo_async.learner.learner import Learner, pretraining_note
from vapo_async.learner.models import Critic, PolicyModel, check_log_probs, policy_log_probs
from vapo_async.learner.packing import microbatches, minibatches
from vapo_async.schema import FinishReason, Problem, Prompt, Response, Score, Ticket, make_trajectory, set_score
from vapo_async.weights.mailbox import Mailbox, published_tensors

VOCAB = 18
ALGORITHM = AlgorithmConfig(
    groups_per_batch=3,
    group_size=4,
    minibatches=3,
    value_pretraining_steps=0,
    policy_lr=1e-3,
    critic_lr=1e-3,
    alpha=1.5,
)


def make_learner(
    algorithm: AlgorithmConfig = ALGORITHM,
    max_tokens: int = 16_384,
    seed: int = 0,
    *,
    vocab: int = VOCAB,
    tied: bool = True,
    device: str = "cpu",
) -> Learner:
    policy = tiny_policy(vocab, tied=tied)
    critic = Critic.from_policy(policy) if algorithm.advantage is AdvantageKind.gae else None
    config = TorchLearnerConfig(max_tokens_per_microbatch=max_tokens, device=device)
    return Learner(algorithm, config, policy, critic, temperature=1.0, seed=seed)


def make_batch(seed: int = 0, groups: int = 3, size: int = 4) -> list[TensorDict]:
    """Random responses of unequal lengths, about half of them right, sampled by a policy near the learner's."""
    generator = torch.Generator().manual_seed(seed)

    def ints(n: int, low: int = 2, high: int = VOCAB) -> list[int]:
        return torch.randint(low, high, (n,), generator=generator).tolist()

    trajectories = []
    for group in range(groups):
        token_ids = tuple(ints(ints(1, 2, 9)[0]))
        prompt = Prompt(group, Problem(group, "", ""), "", token_ids)
        for sample in range(size):
            tokens = ints(ints(1, 1, 20)[0])
            log_probs = (torch.randn(len(tokens), generator=generator) * 0.3 - 2.9).tolist()
            response = Response(sample, tokens, log_probs, [0] * len(tokens), FinishReason.STOP)
            trajectory = make_trajectory(prompt, Ticket(group, 0), response)
            correct = bool(ints(1, 0, 2)[0])
            set_score(trajectory, Score(correct, 1.0 if correct else -1.0))
            trajectories.append(trajectory)
    return trajectories


def weights(learner: Learner) -> dict[str, torch.Tensor]:
    modules = [learner.policy] if learner.critic is None else [learner.policy, learner.critic]
    return {f"{i}/{n}": p.detach().clone() for i, m in enumerate(modules) for n, p in m.named_parameters()}


def assert_close(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], atol: float) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=atol, rtol=0, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_engine_and_learner_agree_on_log_probs_before_and_after_swaps(temperature: float) -> None:
    """The acceptance bound of 1e-4 in fp32, with the learner's own publications swapped in mid-response."""
    learner = make_learner()
    engine = TransformersEngine(
        tiny_policy(VOCAB), eos_token_id=1, max_slots=6, max_length=64, temperature=temperature, seed=3
    )
    prompts = {i: tuple(range(2, 6 + i)) for i in range(6)}
    for i, token_ids in prompts.items():
        engine.submit(GenerationRequest(i, token_ids, 2, 40))
    mailbox, snapshots, completions = Mailbox(), [published_tensors(learner.policy)], []
    for version in range(1, 4):
        for _ in range(9):
            completions += engine.step()
        learner.update(make_batch(seed=version), version - 1)
        snapshots.append(published_tensors(learner.policy))
        mailbox.publish(version, snapshots[-1])
        publication = mailbox.pull()
        assert publication is not None
        engine.load_weights(*publication)
    while engine.num_unfinished:
        completions += engine.step()
    crossed = 0
    for completion in completions:
        response, prompt = completion.response, prompts[completion.request_id]
        crossed += len(set(response.versions)) > 1
        tokens = torch.tensor([[*prompt, *response.token_ids]])
        mask = torch.zeros_like(tokens, dtype=torch.bool)
        mask[:, len(prompt) :] = True
        for version in set(response.versions):
            learner.policy.load_state_dict(snapshots[version], strict=False)
            with torch.no_grad():
                log_prob, _ = policy_log_probs(learner.policy, tokens, mask, temperature=temperature, chunk_tokens=4096)
            mine = torch.tensor([v == version for v in response.versions])
            found = torch.tensor(response.log_probs)[mine]
            assert (log_prob[0, len(prompt) :][mine] - found).abs().max() < 1e-4
    assert crossed >= 3


@pytest.mark.parametrize("importance", list(ImportanceKind))
@pytest.mark.parametrize("max_tokens", [40, 100])
def test_cutting_into_micro_batches_changes_nothing(importance: ImportanceKind, max_tokens: int) -> None:
    algorithm = dataclasses.replace(ALGORITHM, importance=importance, critic_updates=2)
    whole, cut = make_learner(algorithm), make_learner(algorithm, max_tokens)
    for version in range(2):
        a, b = whole.update(make_batch(version), version), cut.update(make_batch(version), version)
        assert a.metrics.keys() == b.metrics.keys()
        for key in a.metrics:
            if not key.startswith("engine_mismatch_"):  # older tokens are compared within one pass
                assert a.metrics[key] == pytest.approx(b.metrics[key], abs=2e-4), key
    # AdamW divides by the root of tiny second moments, which magnifies rounding: hence not 1e-6, and not all. A key's
    # bias shifts all scores of a query alike: its gradient is 0, and what AdamW steps along is nothing but rounding.
    a, b = ({k: v for k, v in weights(x).items() if not k.endswith("k_proj.bias")} for x in (whole, cut))
    assert a.keys() == b.keys()
    apart = torch.cat([(a[name] - b[name]).abs().flatten() for name in a])
    assert (apart > 2e-5).double().mean() < 1e-4
    assert apart.max() < 2e-3, "as far as a step goes"


def test_value_pretraining_trains_the_critic_alone() -> None:
    learner = make_learner(dataclasses.replace(ALGORITHM, value_pretraining_steps=2))
    before = weights(learner)
    result = learner.update(make_batch(), 0)
    after = weights(learner)
    assert not result.policy_changed
    assert (result.policy_steps, result.critic_steps) == (0, 3)
    assert all(torch.equal(before[name], after[name]) for name in before if name.startswith("0/"))
    assert any(not torch.equal(before[name], after[name]) for name in before if name.startswith("1/"))
    assert learner.update(make_batch(1), 1).note is not None, "the last batch of value pretraining"
    later = learner.update(make_batch(2), 2)
    assert later.policy_changed and result.note is later.note is None
    assert len(learner.pretraining_variances) == 2


def test_the_critic_learns_and_its_explained_variance_rises() -> None:
    """Rewards that the first token decides: a critic that reads it explains them."""
    learner = make_learner(dataclasses.replace(ALGORITHM, value_pretraining_steps=1000, critic_lr=3e-3))
    batch = make_batch(seed=5, groups=8)
    for trajectory in batch:
        first = int(trajectory["tokens"][trajectory["response_mask"]][0])
        set_score(trajectory, Score(first % 2 == 0, 1.0 if first % 2 == 0 else -1.0))
    variances = [learner.update(batch, 0).metrics["explained_variance"] for _ in range(60)]
    assert abs(variances[0]) < 1e-6, "a zero head explains nothing"
    assert variances[-1] > 0.8


@pytest.mark.parametrize(
    ("variances", "note"),
    [
        ([0.0, 0.04, 0.2, 0.9, 0.5, 0.1, 0.3, 0.32], "explained variance rose from 0.02 to 0.31"),
        (
            [0.02, 0.9, 0.9, 0.01],
            "explained variance has not risen (0.02 → 0.01): raise algorithm.value_pretraining_steps",
        ),
        ([-0.001, 0.004], "explained variance has not risen (0.00 → 0.00)"),
        ([0.3], "explained variance has not risen (0.30 → 0.30)"),
        ([0.1, float("nan")], "explained variance has not risen (0.10 → nan)"),
    ],
)
def test_what_value_pretraining_says_at_its_end(variances: list[float], note: str) -> None:
    assert pretraining_note(variances).startswith(f"value pretraining: {note}")


def test_the_policy_moves_towards_what_is_rewarded() -> None:
    learner = make_learner()
    batch = make_batch(seed=7, groups=6)

    def mean_log_prob(correct: bool) -> float:
        values = []
        for t in batch:
            if bool(t["correct"]) is correct:
                with torch.no_grad():
                    log_prob, _ = policy_log_probs(
                        learner.policy, t["tokens"][None], t["response_mask"][None], temperature=1.0, chunk_tokens=4096
                    )
                values.append(float(log_prob.sum() / t["response_mask"].sum()))
        return sum(values) / len(values)

    before = mean_log_prob(True) - mean_log_prob(False)
    for version in range(5):
        learner.update(batch, version)
    assert mean_log_prob(True) - mean_log_prob(False) > before + 0.1


def test_group_advantages_need_no_critic() -> None:
    algorithm = dataclasses.replace(ALGORITHM, advantage=AdvantageKind.group, nll_coef=0.0)
    result = make_learner(algorithm).update(make_batch(), 0)
    assert "explained_variance" not in result.metrics
    assert (result.policy_steps, result.critic_steps) == (3, 0)


def test_no_learning_rate_no_change() -> None:
    learner = make_learner(dataclasses.replace(ALGORITHM, policy_lr=0.0, critic_lr=0.0))
    before = weights(learner)
    learner.update(make_batch(), 0)
    after = weights(learner)
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("advantage", list(AdvantageKind))
def test_a_checkpoint_goes_on_bit_for_bit(
    advantage: AdvantageKind, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    algorithm = dataclasses.replace(ALGORITHM, advantage=advantage, lr_warmup_steps=8)
    learner = make_learner(algorithm)
    for version in range(2):
        learner.update(make_batch(version), version)
    save_learner(learner, tokenizer, tmp_path)
    other = make_learner(algorithm, seed=99)
    load_learner(other, tmp_path)
    for version in range(2, 4):
        learner.update(make_batch(version), version)
        other.update(make_batch(version), version)
    a, b = weights(learner), weights(other)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert other.batches == learner.batches == 4


def test_a_checkpoint_of_another_kind_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    save_learner(make_learner(), tokenizer, tmp_path)
    algorithm = dataclasses.replace(ALGORITHM, advantage=AdvantageKind.group)
    with pytest.raises(ConfigError, match="disagree on whether there is a critic"):
        load_learner(make_learner(algorithm), tmp_path)


@pytest.mark.parametrize("limit", [100, 500, 2000, 20_000])
def test_a_full_disk_is_an_os_error_whoever_writes(
    limit: int, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    """A real limit on every file's size: it hits JSON, the tokenizer's own writer and safetensors in turn."""
    learner = make_learner()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises((OSError, SafetensorError), match="File too large"):
            save_learner(learner, tokenizer, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_value_pretraining_goes_on_in_a_resumed_run(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Its explained variances too, and the policy's optimizer that has not stepped yet."""
    algorithm = dataclasses.replace(ALGORITHM, value_pretraining_steps=2)
    learner, other = make_learner(algorithm), make_learner(algorithm, seed=99)
    learner.update(make_batch(0), 0)
    save_learner(learner, tokenizer, tmp_path)
    load_learner(other, tmp_path)
    assert learner.update(make_batch(1), 1) == other.update(make_batch(1), 1)
    assert len(other.pretraining_variances) == 2


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_of_other_sizes_is_refused(tied: bool, tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    learner = make_learner()
    learner.update(make_batch(), 0)
    save_learner(learner, tokenizer, tmp_path)
    before = weights(other := make_learner(vocab=VOCAB + 2, tied=tied))
    with pytest.raises(ConfigError) as caught:
        load_learner(other, tmp_path)
    assert str(caught.value) == (
        "the checkpoint's policy does not fit: model.embed_tokens.weight is [18, 64], expected [20, 64]: "
        "resume with the run's own model"
    )
    assert all(torch.equal(before[name], weight) for name, weight in weights(other).items()), "nothing was loaded"


def test_an_untied_head_that_the_checkpoint_lacks_is_refused(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    save_learner(make_learner(), tokenizer, tmp_path)
    with pytest.raises(ConfigError, match=r"lm_head\.weight is missing, expected \[18, 64\]"):
        load_learner(make_learner(tied=False), tmp_path)


@pytest.mark.parametrize(
    ("file", "name", "message"),
    [
        ("critic", "value_head.weight", r"critic does not fit: value_head\.weight is \[3\], expected \[1, 64\]"),
        ("critic", "more", r"critic does not fit: more is \[3\], expected missing"),
        (
            "policy_optimizer",
            "model.norm.weight/exp_avg_sq",
            r"optimizer of PolicyModel .* \[3\], expected \[64\]",
        ),
        ("critic_optimizer", "value_head.bias/step", r"optimizer of Critic .* is \[3\], expected \[\]"),
        ("critic_optimizer", "more/exp_avg", r"optimizer of Critic .* more/exp_avg is \[3\], expected missing"),
    ],
)
def test_a_tensor_of_another_shape_is_refused(
    file: str, name: str, message: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    learner = make_learner()
    learner.update(make_batch(), 0)
    save_learner(learner, tokenizer, tmp_path)
    path = tmp_path / f"{file}.safetensors"
    save_file({**load_file(path), name: torch.zeros(3)}, path)
    with pytest.raises(ConfigError, match=message):
        load_learner(make_learner(), tmp_path)


@pytest.mark.parametrize("device", ["meta", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_moments_go_to_their_parameters_device(device: str) -> None:
    """Loaded from a file they are on the CPU; the step count stays there."""

    def backend(where: str) -> TorchBackend:
        module = torch.nn.Linear(3, 2, device=where)
        return TorchBackend(module, Schedule(lr=0.1, warmup_steps=0, weight_decay=0.0, max_grad_norm=1.0))

    one, other = backend("cpu"), backend(device)
    one.module(torch.ones(1, 3)).sum().backward()
    one.step()
    other.load_optimizer_tensors(dict(one.optimizer_tensors()), 1)
    for key, value in other.optimizer_tensors():
        assert value.device.type == ("cpu" if key.endswith("/step") else device), key
    if device == "cuda":
        other.module(torch.ones(1, 3, device=device)).sum().backward()
        other.step()
        assert other.step_count == 2


@pytest.mark.gpu
def test_a_checkpoint_goes_on_bit_for_bit_on_a_gpu(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    learner = make_learner(device="cuda")
    learner.update(make_batch(0), 0)
    save_learner(learner, tokenizer, tmp_path)
    load_learner(other := make_learner(device="cuda", seed=99), tmp_path)
    learner.update(make_batch(1), 1)
    other.update(make_batch(1), 1)
    a, b = weights(learner), weights(other)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_gradient_that_is_not_finite_stops_before_it_does_harm() -> None:
    learner = make_learner()
    before = weights(learner)
    batch = make_batch()
    set_score(batch[0], Score(True, float("nan")))
    with pytest.raises(LearnerDivergedError, match="gradient norm of Critic is nan"):
        learner.update(batch, 0)
    after = weights(learner)
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(("rows", "count"), [(9, 4), (12, 3), (7, 7), (5, 2), (64, 4), (256, 255), (2, 3)])
def test_mini_batches_are_as_many_and_as_equal_as_they_can_be(rows: int, count: int) -> None:
    order = torch.randperm(rows).tolist()
    parts = minibatches(order, count)
    assert len(parts) == min(rows, count)
    assert [row for part in parts for row in part] == order
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    if rows % count == 0:
        size = rows // count
        assert parts == [order[start : start + size] for start in range(0, rows, size)]


def test_as_many_steps_as_mini_batches_where_the_batch_does_not_divide() -> None:
    learner = make_learner(dataclasses.replace(ALGORITHM, minibatches=4, epochs=2))
    result = learner.update(make_batch(groups=3, size=3), 0)
    assert (result.policy_steps, result.critic_steps) == (8, 8)


@pytest.mark.parametrize("lengths", [[5, 3, 9, 1, 1, 7], [100], [1] * 50, [30, 2, 2, 2]])
def test_micro_batches_keep_the_budget_and_every_row(lengths: Sequence[int]) -> None:
    pieces = microbatches(lengths, 20)
    assert sorted(row for piece in pieces for row in piece) == list(range(len(lengths)))
    for piece in pieces:
        padded = len(piece) * max(lengths[row] for row in piece)
        assert padded <= 20 or len(piece) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_scales_its_logits_is_refused(dtype: torch.dtype) -> None:
    class Scaled(type(tiny_policy(VOCAB))):  # type: ignore[misc]
        def forward(self, **kwargs: object) -> object:
            out = super().forward(**kwargs)
            out.logits = out.logits * 0.5
            return out

    policy = tiny_policy(VOCAB).to(dtype)
    model = PolicyModel(policy, temperature=0.7, chunk_tokens=8)
    check_log_probs(model)
    policy.__class__ = Scaled
    with pytest.raises(ConfigError, match="changes its logits after the output embedding"):
        check_log_probs(model)
