"""The engine's log-probs against the learner's: a real engine as it should be, and with each fault that there is."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from conftest import tiny_policy
from tensordict import TensorDict
from test_learner_learner import ALGORITHM, VOCAB, make_batch, weights
from test_learner_off_policy import VERSION, lagged
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from vapo_async.collector.engine import GenerationRequest
from vapo_async.collector.engine_transformers import TransformersEngine
from vapo_async.config import KVCacheOnUpdate, RunError, TorchLearnerConfig
from vapo_async.config.algorithm import AlgorithmConfig, ImportanceKind
from vapo_async.learner.backend import Schedule
from vapo_async.learner.backend_torch import TorchBackend
from vapo_async.learner.checkpoint import load_learner, save_learner
from vapo_async.learner.learner import Learner
from vapo_async.learner.mismatch import SCORED_RESPONSES, EngineMismatchError, MismatchMeter
from vapo_async.learner.models import Critic, PolicyModel
from vapo_async.schema import Problem, Prompt, Score, Ticket, make_trajectory, set_score
from vapo_async.weights.mailbox import published_tensors

LIMIT = 0.002
FAST = dataclasses.replace(ALGORITHM, policy_lr=3e-3)
"""One batch moves the log-probs by far more than rounding does."""


def make_learner(
    algorithm: AlgorithmConfig = FAST,
    *,
    versions: int = 1,
    max_tokens: int = 16_384,
    limit: float | None = LIMIT,
    temperature: float = 1.0,
    decode: Callable[[Sequence[int]], list[str]] | None = None,
) -> Learner:
    policy = tiny_policy(VOCAB)
    config = TorchLearnerConfig(max_tokens_per_microbatch=max_tokens, mismatch_versions=versions)
    critic = Critic.from_policy(policy)
    return Learner(
        algorithm, config, policy, critic, temperature=temperature, seed=0, max_mismatch=limit, decode=decode
    )


def make_engine(temperature: float = 1.0, cache: KVCacheOnUpdate = KVCacheOnUpdate.recompute) -> TransformersEngine:
    return TransformersEngine(
        tiny_policy(VOCAB),
        eos_token_id=1,
        max_slots=12,
        max_length=64,
        temperature=temperature,
        kv_cache_on_update=cache,
        seed=3,
    )


class Rollouts:
    """Batches of 12 responses by a real engine, one batch after the other."""

    def __init__(self, engine: TransformersEngine, *, added_token: bool = False) -> None:
        self.engine, self._added, self._group = engine, (5,) if added_token else (), 0

    def start(self, responses: int = 12, tokens: int = 24) -> None:
        self._prompts = {
            self._group + i: Prompt(self._group + i, Problem(i, "", ""), "", tuple(range(2, 6 + i)))
            for i in range(-(-responses // 4))
        }
        self._group += len(self._prompts)
        for number, prompt in self._prompts.items():
            self.engine.submit(GenerationRequest(number, self._added + prompt.token_ids, min(4, responses), tokens))
        self._trajectories: list[TensorDict] = []

    def steps(self, count: int = 10**6) -> None:
        while count and self.engine.num_unfinished:
            count -= 1
            for done in self.engine.step():
                prompt = self._prompts[done.request_id]
                trajectory = make_trajectory(prompt, Ticket(prompt.group_id, 0), done.response)
                right = len(self._trajectories) % 3 == 0
                set_score(trajectory, Score(right, 1.0 if right else -1.0))
                self._trajectories.append(trajectory)

    def batch(self, responses: int = 12, tokens: int = 24) -> list[TensorDict]:
        self.start(responses, tokens)
        return self.rest()

    def rest(self) -> list[TensorDict]:
        self.steps()
        return self._trajectories


def tokens_of(batch: Sequence[TensorDict], versions: Sequence[int] | None = None) -> int:
    """Response tokens, of some versions or of all."""
    found = torch.cat([t["policy_version"][t["response_mask"]] for t in batch])
    return len(found) if versions is None else int(sum((found == v).sum() for v in versions))


@pytest.mark.parametrize("importance", [ImportanceKind.decoupled, ImportanceKind.a3po])
@pytest.mark.parametrize("kept", [0, 1, 2])
def test_each_token_is_compared_under_the_weights_that_sampled_it(kept: int, importance: ImportanceKind) -> None:
    """Generation two batches ahead, swaps in mid-response; A-3PO has no pass for the present weights to lean on."""
    learner = make_learner(dataclasses.replace(FAST, importance=importance), versions=kept)
    rollouts = Rollouts(make_engine())
    batches = []
    for version in range(5):
        rollouts.start()
        rollouts.steps(5)
        if version:
            rollouts.engine.load_weights(version, published_tensors(learner.policy))
        batch = rollouts.rest()
        batches.append(batch)
        now = learner.update(batch, version).metrics  # learns at once: tokens of this version and the one before
        known = [v for v in (version - 1, version) if v >= version - kept]
        assert now["engine_mismatch_tokens"] == tokens_of(batch, known) > 0
        assert now["engine_mismatch_max"] < 1e-4
        assert 0 < now["engine_mismatch_mean"] <= now["engine_mismatch_max"]
        assert 0 <= now["engine_mismatch_kl"] < 1e-8 and now["engine_mismatch_outside"] == 0
    late = learner.update(batches[-1], 5).metrics  # everything one version older
    assert late["engine_mismatch_tokens"] == tokens_of(batches[-1], range(5 - kept, 6))
    if kept:
        assert late["engine_mismatch_max"] < 1e-4
    else:
        assert set(late) & {f"engine_mismatch_{x}" for x in ("mean", "max", "kl", "outside")} == set()


def test_without_the_kept_copy_the_lag_would_be_taken_for_a_mismatch() -> None:
    """The weights moved: what the copies find equal the present weights see far apart."""
    learner, rollouts = make_learner(limit=None), Rollouts(make_engine())
    batch = rollouts.batch()
    learner.update(make_batch(), 0)
    assert learner.update(batch, 1).metrics["engine_mismatch_max"] < 1e-4
    for trajectory in batch:
        trajectory["policy_version"].fill_(2)  # says that the present weights sampled them
    assert learner.update(batch, 2).metrics["engine_mismatch_mean"] > LIMIT


def test_value_pretraining_compares_tokens_of_every_age(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """The policy does not change, however often the version does; also in a process that goes on with it."""
    algorithm = dataclasses.replace(FAST, value_pretraining_steps=3)
    learner, rollouts = make_learner(algorithm), Rollouts(make_engine())

    def pretraining(version: int) -> list[TensorDict]:
        rollouts.start()
        rollouts.steps(5)
        rollouts.engine.load_weights(version, None)
        return rollouts.rest()

    for version in range(2):
        batch = pretraining(version + 5)  # the learner is at 10: ages 4 to 6, and mixed ones
        metrics = learner.update(batch, 10 + version).metrics
        assert metrics["engine_mismatch_tokens"] == tokens_of(batch)
        assert metrics["engine_mismatch_max"] < 1e-4
    save_learner(learner, tokenizer, tmp_path)
    resumed = make_learner(algorithm)
    load_learner(resumed, tmp_path)
    batch = pretraining(8)
    for _ in range(2):  # the last batch of pretraining, and the first one after it
        metrics = resumed.update(batch, 12).metrics
        assert metrics["engine_mismatch_tokens"] == tokens_of(batch)
        assert metrics["engine_mismatch_max"] < 1e-4


def test_a_resumed_learner_knows_the_present_weights_alone(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    learner = make_learner(limit=None)
    learner.update(make_batch(), 0)
    save_learner(learner, tokenizer, tmp_path)
    resumed = make_learner(limit=None)
    load_learner(resumed, tmp_path)
    batch = lagged()
    metrics = resumed.update(batch, VERSION).metrics
    assert metrics["engine_mismatch_tokens"] == tokens_of(batch, [VERSION])


@pytest.mark.parametrize("kept", [0, 1, 3])
def test_no_more_copies_are_held_than_asked_for(kept: int) -> None:
    """And none is the model's own memory, which the optimizer writes to."""
    policy = tiny_policy(VOCAB)
    backend = TorchBackend(PolicyModel(policy, temperature=1.0, chunk_tokens=4096), Schedule(1e-3, 0, 0.0, 1.0))
    meter = MismatchMeter(backend, TorchLearnerConfig(mismatch_versions=kept), temperature=1.0)
    own = {p.data_ptr() for p in policy.parameters()}
    for version in range(6):
        meter.policy_changes(version)
        assert len(meter.kept) == min(kept, version + 1)
        held = [p for policy in meter.kept for p in policy.snapshot or ()]
        assert not own & {p.data_ptr() for p in held}
        assert sum(p.numel() for p in held) == len(meter.kept) * sum(p.numel() for p in policy.parameters())
    assert [p.last for p in meter.kept] == list(range(6 - kept, 6))


def test_value_pretraining_and_batches_without_a_step_copy_nothing() -> None:
    learner = make_learner(
        dataclasses.replace(FAST, value_pretraining_steps=1, overlong_filter=True), versions=3, limit=None
    )
    learner.update(make_batch(), 0)
    cut = make_batch()
    for trajectory in cut:
        trajectory["finish_reason"] = torch.ones_like(trajectory["finish_reason"])
    assert learner.update(cut, 1).policy_steps == 0
    batch = make_batch()
    assert learner.update(batch, 2).metrics["engine_mismatch_tokens"] == tokens_of(batch)


@pytest.mark.parametrize(("max_tokens", "rows"), [(16_384, SCORED_RESPONSES), (80, 3)])
def test_older_tokens_are_scored_within_one_small_pass(max_tokens: int, rows: int) -> None:
    """Of 40 responses those with the most tokens of the older policy, as many as fit."""
    learner = make_learner(limit=None, max_tokens=max_tokens)
    learner.update(make_batch(), 0)
    batch = make_batch(1, groups=10)
    seen: list[torch.Size] = []

    def watch(_: object, args: object, kwargs: dict[str, Tensor]) -> None:
        if learner.policy.model.embed_tokens.weight.data_ptr() != present:
            seen.append(kwargs["input_ids"].shape)

    present = learner.policy.model.embed_tokens.weight.data_ptr()
    learner.policy.get_decoder().register_forward_pre_hook(watch, with_kwargs=True)
    metrics = learner.update(batch, 1).metrics
    assert learner.policy.model.embed_tokens.weight.data_ptr() == present, "the model has its own weights again"
    assert len(seen) == 1 and seen[0][0] == rows and seen[0].numel() <= max_tokens
    longest = sorted((tokens_of([t]) for t in batch), reverse=True)
    assert metrics["engine_mismatch_tokens"] == sum(longest[:rows])


def test_what_is_learned_does_not_depend_on_what_is_measured() -> None:
    """Bit for bit: copies and further passes leave weights and random numbers alone."""
    ends = []
    for kept in (0, 2):
        learner = make_learner(versions=kept, limit=None)
        for version in range(3):
            learner.update(make_batch(version), version)
        ends.append(weights(learner))
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def shifted(batch: list[TensorDict]) -> list[TensorDict]:
    """Each log-prob stands one token too early."""
    for trajectory in batch:
        mask = trajectory["response_mask"]
        trajectory["sample_log_prob"][mask] = trajectory["sample_log_prob"][mask].roll(-1)
    return batch


FAULTS: dict[str, Callable[[], list[TensorDict]]] = {
    "another temperature": lambda: Rollouts(make_engine(temperature=1.1)).batch(),
    "another prompt": lambda: Rollouts(make_engine(), added_token=True).batch(),
    "tokens shifted by one": lambda: shifted(Rollouts(make_engine()).batch()),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_stops_the_start_with_the_five_worst_tokens(fault: str) -> None:
    learner = make_learner(decode=lambda ids: [f"<{i}>\n" for i in ids])
    before, batch = weights(learner), FAULTS[fault]()
    with pytest.raises(RunError) as caught:
        learner.update(batch, 0)
    lines = str(caught.value).splitlines()
    assert len(lines) == 7, "one line, a heading, one line for each token, whatever a token holds"
    for part in (f"over {tokens_of(batch)} tokens", "limit is 0.002 (engine.max_mismatch)", "engine.temperature"):
        assert part in lines[0]
    assert lines[1].startswith("The worst 5 tokens")
    after = weights(learner)
    assert all(torch.equal(before[name], after[name]) for name in before), "nothing was learned"
    gaps = []
    for line in lines[2:]:
        words = line.replace(",", "").split()
        row, place = int(words[1]), int(words[words.index("token") + 1])
        trajectory = batch[row]
        at = int(trajectory["response_mask"].int().argmax()) + place
        assert f"id {int(trajectory['tokens'][at])} '<{int(trajectory['tokens'][at])}>\\n', log-prob" in line
        numbers = {word: float(words[i - 3]) for i, word in enumerate(words) if word in ("engine", "learner")}
        assert numbers["engine"] == pytest.approx(float(trajectory["sample_log_prob"][at]), abs=1e-4)
        gaps.append(abs(numbers["learner"] - numbers["engine"]))
        ratio = float(words[-1])
        assert ratio == pytest.approx(float(torch.tensor(numbers["learner"] - numbers["engine"]).exp()), rel=1e-2)
    assert gaps == sorted(gaps, reverse=True) and gaps[0] > LIMIT


def test_the_same_temperature_everywhere_is_no_fault() -> None:
    learner = make_learner(temperature=1.1)
    assert learner.update(Rollouts(make_engine(temperature=1.1)).batch(), 0).metrics["engine_mismatch_max"] < 1e-4


@pytest.mark.parametrize("lag", [0, 1])
def test_an_engine_that_does_not_take_the_first_publication_is_found(lag: int) -> None:
    """Its log-probs are those of the version before; with a lag the kept copy finds it."""
    learner, rollouts = make_learner(), Rollouts(make_engine())
    learner.update(rollouts.batch(), 0)
    rollouts.engine.load_weights(1, None)
    stale = rollouts.batch()
    if lag:
        fresh = make_engine()
        fresh.load_weights(1, published_tensors(learner.policy))
        few = Rollouts(fresh).batch(responses=1, tokens=20)  # too few for the check: it is still to come
        assert "engine_mismatch_max" in learner.update(few, 1).metrics
    with pytest.raises(EngineMismatchError, match="did not get the weights of the version below") as caught:
        learner.update(stale, 1 + lag)
    assert str(caught.value).count("version 1:") == 5


def test_an_engine_with_the_base_model_after_a_resume_is_found(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    learner, rollouts = make_learner(), Rollouts(make_engine())
    for version in range(2):
        learner.update(rollouts.batch(), version)
        rollouts.engine.load_weights(version + 1, published_tensors(learner.policy))
    save_learner(learner, tokenizer, tmp_path)
    stale = Rollouts(make_engine())
    stale.engine.load_weights(2, None)
    for batch, right in ((rollouts.batch(), True), (stale.batch(), False)):
        resumed = make_learner()
        load_learner(resumed, tmp_path)
        if right:
            assert resumed.update(batch, 2).metrics["engine_mismatch_max"] < 1e-4
        else:
            with pytest.raises(EngineMismatchError):
                resumed.update(batch, 2)


def test_tokens_over_kept_keys_are_measured_but_stop_nothing() -> None:
    """With ``kv_cache_on_update=keep`` the swap under a response is a mismatch that the user chose."""
    learner, rollouts = make_learner(), Rollouts(make_engine(cache=KVCacheOnUpdate.keep))
    learner.update(rollouts.batch(), 0)
    rollouts.start()
    rollouts.steps(2)
    rollouts.engine.load_weights(1, published_tensors(learner.policy))
    batch = rollouts.rest()
    mixed = [t for t in batch if len(t["policy_version"][t["response_mask"]].unique()) > 1]
    assert tokens_of(mixed) > 100
    metrics = learner.update(mixed, 1).metrics
    assert metrics["engine_mismatch_tokens"] == tokens_of(mixed)
    assert metrics["engine_mismatch_mean"] > LIMIT
    whole = rollouts.batch()  # of one version: the check takes these
    assert learner.update(whole, 2).metrics["engine_mismatch_max"] < 1e-4


def test_only_the_start_is_checked() -> None:
    """Later mismatches are the metrics' and the corrections' matter."""
    learner, rollouts = make_learner(), Rollouts(make_engine())
    for version in range(2):
        learner.update(rollouts.batch(), version)
        rollouts.engine.load_weights(version + 1, published_tensors(learner.policy))
    learner.update(rollouts.batch(), 2)
    rollouts.engine.load_weights(3, None)
    assert learner.update(rollouts.batch(), 3).metrics["engine_mismatch_mean"] > LIMIT
