"""The watch, the length audit and the packing, each alone."""

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tensordict import LazyStackedTensorDict

from vapo_async import schema
from vapo_async.buffer import LengthAudit, Lengths, StragglerWatch
from vapo_async.buffer.lengths import upper_bound
from vapo_async.buffer.packing import pack_groups, unpack_groups
from vapo_async.schema import FinishReason, Problem, Prompt, Response, Score, Ticket
from vapo_async.state import State, read_state, write_state


def test_the_watch_times_one_ticket() -> None:
    watch = StragglerWatch(10.0)
    first, second = Ticket(0, 0), Ticket(1, 0)
    assert watch.remaining(0.0) is None
    assert not watch.overdue(first, 100.0) and watch.remaining(104.0) == 6.0
    assert not watch.overdue(first, 109.5) and watch.overdue(first, 110.0) and watch.remaining(120.0) == 0.0
    assert not watch.overdue(second, 120.0), "another one starts anew"
    assert not watch.overdue(None, 125.0) and watch.remaining(125.0) is None
    assert not watch.overdue(second, 131.0), "it was not waited for in between"
    watch.reset()
    assert not watch.overdue(second, 200.0) and watch.overdue(second, 210.0)


@pytest.mark.parametrize("timeout_s", [0.0, -1.0, float("nan")])
def test_a_watch_without_time_is_refused(timeout_s: float) -> None:
    with pytest.raises(ValueError, match="timeout_s > 0"):
        StragglerWatch(timeout_s)


@pytest.mark.parametrize(
    ("length", "bound"), [(0, 1), (1, 1), (2, 2), (3, 4), (4, 4), (5, 8), (512, 512), (513, 1024), (2**40 + 1, 2**41)]
)
def test_buckets(length: int, bound: int) -> None:
    assert upper_bound(length) == bound


def test_the_audit_counts_by_kind_and_over_a_resume() -> None:
    audit = LengthAudit()
    audit.add("generated", [5, 1, 8])
    audit.add("generated", [])
    audit.add("dropped", [0])
    resumed = LengthAudit()
    resumed.load_state_dict(audit.state_dict())
    for each in (audit, resumed):
        each.add("generated", [6])
        counts = each.counts()
        assert counts["generated"] == Lengths(4, 20, {1: 1, 8: 3}) and list(counts["generated"].histogram) == [1, 8]
        assert counts["dropped"] == Lengths(1, 0, {1: 1})
        assert counts["trained"] == counts["refused"] == Lengths()
    with pytest.raises(KeyError):
        audit.add("other", [1])


@st.composite
def groups(draw: st.DrawFn) -> LazyStackedTensorDict:
    prompt = Prompt(draw(st.integers(0, 2**40)), Problem(0, "", ""), "", tuple(range(draw(st.integers(0, 3)))))
    trajectories = []
    for sample in range(2):
        tokens = draw(st.lists(st.integers(0, 2**40), min_size=1, max_size=4))
        log_probs = draw(st.lists(st.floats(width=32), min_size=len(tokens), max_size=len(tokens)))
        response = Response(sample, tokens, log_probs, [7] * len(tokens), draw(st.sampled_from(FinishReason)))
        trajectories.append(schema.make_trajectory(prompt, Ticket(draw(st.integers(0, 9)), 7), response))
        schema.set_score(trajectories[-1], Score(draw(st.booleans()), draw(st.floats(width=32, allow_nan=False))))
    return schema.stack_group(trajectories)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(groups(), max_size=3))
def test_groups_come_back_bit_for_bit(tmp_path: Path, ready: list[LazyStackedTensorDict]) -> None:
    write_state(State(tensors=pack_groups(ready)), tmp_path, "groups")
    back = unpack_groups(read_state(tmp_path, "groups").tensors, 2)
    assert len(back) == len(ready)
    for got, want in zip(back, ready, strict=True):
        for a, b in zip(got.unbind(0), want.unbind(0), strict=True):
            assert set(a.keys()) == set(b.keys())
            for key, dtype in schema.TRAJECTORY_DTYPES.items():
                assert a[key].dtype == dtype and a[key].shape == b[key].shape
                assert a[key].numpy().tobytes() == b[key].numpy().tobytes(), "NaN and -0.0 too"
    memory = {a[key].untyped_storage().data_ptr() for group in back for a in group.unbind(0) for key in a.keys()}  # noqa: SIM118
    assert len(memory) == len(back) * 2 * len(schema.TRAJECTORY_DTYPES), "no tensor holds the memory of another"


@pytest.mark.parametrize("metadata", [None, {"terms": [1, 2], "nested": {"x": None}}])
def test_prompts_come_back(metadata: dict[str, object] | None, tmp_path: Path) -> None:
    prompt = Prompt(3, Problem(7, "1+1 = “?”", "2", metadata), "Q: 1+1", (5, 6))
    write_state(State({"prompt": schema.prompt_to_json(prompt)}), tmp_path, "prompt")
    assert schema.prompt_from_json(read_state(tmp_path, "prompt").data["prompt"]) == prompt


def test_lengths_and_oldest_version_of_a_group() -> None:
    prompt = Prompt(0, Problem(0, "", ""), "", (1, 2))
    pair = [Response(i, [3] * n, [0.0] * n, [4 + i] * n, FinishReason.STOP) for i, n in enumerate((3, 1))]
    group = schema.stack_group([schema.make_trajectory(prompt, Ticket(0, 2), r) for r in pair])
    assert schema.response_lengths(group) == [3, 1]
    assert schema.oldest_version(group) == 4, "the prompt's version, 2, does not count"
    group.tensordicts[0][schema.RESPONSE_MASK][-1] = False
    with pytest.raises(ValueError, match="must be True on the last token"):
        schema.check_trajectories(group.unbind(0))
    del group.tensordicts[1][schema.TOKENS]
    with pytest.raises(ValueError, match="no key 'tokens'"):
        schema.check_trajectories(group.unbind(0))


@pytest.mark.parametrize("shape", [(0,), (2, 2)])
def test_trajectories_have_one_dimension_and_a_token(shape: tuple[int, ...]) -> None:
    trajectory = schema.make_trajectory(
        Prompt(0, Problem(0, "", ""), "", ()), Ticket(0, 0), Response(0, [1], [0.0], [0], FinishReason.STOP)
    )
    for key in schema.PER_TOKEN_KEYS:
        trajectory[key] = torch.zeros(shape, dtype=schema.TRAJECTORY_DTYPES[key])
    with pytest.raises(ValueError, match=r"key 'tokens' has shape .*, expected \[L\] with L >= 1"):
        schema.check_trajectory(trajectory)
