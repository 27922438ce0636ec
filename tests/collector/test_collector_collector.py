"""Groups in flight: cancelled, interrupted, carried across publications, saved; their age and their neighbours."""

from pathlib import Path

import pytest
import torch
from conftest import tiny_policy
from engine_runs import make_engine
from tensordict import TensorDictBase
from transformers import PreTrainedTokenizerBase

from vapo_async.collector.collector import Collector, FinishedGroup
from vapo_async.schema import FinishReason, Problem, Prompt, Response, Ticket, oldest_version
from vapo_async.state import read_state, write_state
from vapo_async.weights.mailbox import published_tensors

GROUP_SIZE, LIMIT = 3, 16


def make_collector(
    tokenizer: PreTrainedTokenizerBase, *, temperature: float = 1.0, max_slots: int = 5, seed: int = 0
) -> Collector:
    engine = make_engine(
        tiny_policy(len(tokenizer)),
        eos_token_id=tokenizer.eos_token_id,
        temperature=temperature,
        max_slots=max_slots,
        seed=seed,
    )
    return Collector(engine, tokenizer, group_size=GROUP_SIZE, max_response_tokens=LIMIT)


def prompt(i: int) -> Prompt:
    return Prompt(100 + i, Problem(i, f"{i}+1?", str(i + 1), {"level": i}), f"{i}+1=", tuple(range(4, 6 + i)))


def start_all(collector: Collector, count: int = 4) -> None:
    for i in range(count):
        collector.start(Ticket(i, 0), prompt(i))


def run_all(collector: Collector) -> list[FinishedGroup]:
    finished = []
    while collector.busy:
        finished += collector.step()
    return finished


def plain(finished: list[FinishedGroup]) -> list[tuple[Ticket, Prompt, list[str], list[dict[str, list[float]]]]]:
    """Comparable with ==, to the last bit."""

    def rows(group: TensorDictBase) -> list[dict[str, list[float]]]:
        return [{str(key): value.tolist() for key, value in row.items()} for row in group.unbind(0)]

    return [(f.ticket, f.prompt, f.texts, rows(f.group)) for f in finished]


def tokens(finished: list[FinishedGroup]) -> dict[int, list[list[int]]]:
    return {f.ticket.ticket_id: [row["tokens"].tolist() for row in f.group.unbind(0)] for f in finished}


@pytest.mark.parametrize("after", [0, 1, 7, 14])
def test_a_loaded_collector_goes_on_bit_for_bit(after: int, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """Groups come in the same order with the same texts; finished responses of unfinished groups are kept."""
    whole = make_collector(tokenizer)
    start_all(whole)
    for _ in range(after):
        whole.step()
    write_state(whole.state_dict(), tmp_path, "collector")
    resumed = make_collector(tokenizer, seed=7)
    resumed.load_state_dict(read_state(tmp_path, "collector"))
    assert resumed.tickets == whole.tickets
    assert resumed.partial_groups() == whole.partial_groups()
    assert resumed.unfinished_responses == whole.unfinished_responses
    expected = plain(run_all(whole))
    assert expected and plain(run_all(resumed)) == expected
    assert resumed.generated_tokens == whole.generated_tokens


def test_nothing_in_flight_is_saved_too(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    whole, resumed = make_collector(tokenizer), make_collector(tokenizer, seed=7)
    write_state(whole.state_dict(), tmp_path, "collector")
    resumed.load_state_dict(read_state(tmp_path, "collector"))
    assert not resumed.busy and resumed.tickets == []
    start_all(whole)
    start_all(resumed)
    assert plain(run_all(resumed)) == plain(run_all(whole))


def test_cancel_gives_lengths_frees_slots_and_disturbs_no_other(tokenizer: PreTrainedTokenizerBase) -> None:
    alone = make_collector(tokenizer, temperature=0.0, max_slots=4)
    start_all(alone)
    expected = tokens(run_all(alone))
    collector = make_collector(tokenizer, temperature=0.0, max_slots=4)
    start_all(collector)
    for _ in range(5):
        assert not collector.step()
    before = collector.unfinished_responses
    assert collector.cancel(1) == [5, 0, 0], "group 0 holds three of four slots, one sample of group 1 the other"
    assert collector.unfinished_responses == before - GROUP_SIZE and collector.tickets == [0, 2, 3]
    assert collector.cancel(1) == [] and collector.cancel(99) == []
    finished = run_all(collector)
    assert tokens(finished) == {i: rows for i, rows in expected.items() if i != 1}
    assert collector.cancel(0) == [], "a finished group is not in flight"


def test_cancel_counts_finished_responses_too(tokenizer: PreTrainedTokenizerBase) -> None:
    collector = make_collector(tokenizer, max_slots=2)
    start_all(collector, 1)
    while collector.unfinished_responses == GROUP_SIZE:
        collector.step()
    lengths = [len(response.token_ids) for response in collector.partial_groups()[0]]
    assert len(lengths) == GROUP_SIZE and sum(lengths) == collector.generated_tokens
    assert collector.cancel(0) == lengths and not collector.busy


def test_a_group_carried_across_a_publication_is_as_old_as_its_oldest_token(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Finished responses travel along; the interrupted collector knows nothing of the group any more."""
    first, second = make_collector(tokenizer, max_slots=2), make_collector(tokenizer, seed=1)
    first.load_weights(2, None)
    first.start(Ticket(5, 1), prompt(0))
    while first.unfinished_responses == GROUP_SIZE:
        first.step()
    carried = first.interrupt(5)
    assert [r.sample_index for r in carried] == [0, 1, 2] and not first.busy
    assert {r.finish_reason for r in carried} > {FinishReason.ABORTED}, "the test wants finished ones as well"
    assert first.interrupt(5) == [] and first.partial_groups() == {}
    second.load_weights(6, published_tensors(tiny_policy(len(tokenizer), seed=6)))
    second.start(Ticket(5, 1), prompt(0), carried)
    assert second.partial_groups() == {5: carried}
    (finished,) = run_all(second)
    assert finished.ticket == Ticket(5, 1) and oldest_version(finished.group) == 2
    start = len(prompt(0).token_ids)
    for response, row in zip(carried, finished.group.unbind(0), strict=True):
        n = len(response.token_ids)
        assert row["tokens"][start : start + n].tolist() == response.token_ids
        assert torch.equal(row["sample_log_prob"][start : start + n], torch.tensor(response.log_probs))
        assert row["policy_version"][start:].tolist() == response.versions + [6] * (len(row["tokens"]) - start - n)
    assert 6 in torch.cat([row["policy_version"] for row in finished.group.unbind(0)])


def test_all_responses_carried_finished_make_a_group_in_one_step(tokenizer: PreTrainedTokenizerBase) -> None:
    done = [Response(i, [4, tokenizer.eos_token_id], [-1.0, -0.5], [3, 3], FinishReason.STOP) for i in range(3)]
    collector = make_collector(tokenizer)
    collector.load_weights(4, None)
    collector.start(Ticket(0, 3), prompt(0), done[::-1])
    assert collector.busy
    (finished,) = collector.step()
    assert oldest_version(finished.group) == 3 and not collector.busy and collector.generated_tokens == 0


def test_partial_groups_are_copies_and_disturb_nothing(tokenizer: PreTrainedTokenizerBase) -> None:
    alone, watched = make_collector(tokenizer), make_collector(tokenizer)
    start_all(alone)
    start_all(watched)
    finished = []
    while watched.busy:
        groups = watched.partial_groups()
        assert list(groups) == watched.tickets and {len(group) for group in groups.values()} == {GROUP_SIZE}
        for response in (r for group in groups.values() for r in group):
            response.token_ids.clear()
            response.versions.append(-1)
        finished += watched.step()
    assert plain(finished) == plain(run_all(alone))


def test_wrong_starts_are_refused_and_leave_nothing_behind(tokenizer: PreTrainedTokenizerBase) -> None:
    collector = make_collector(tokenizer)
    collector.load_weights(3, None)
    old = Response(1, [4, 5], [-1.0, -1.0], [2, 1], FinishReason.ABORTED)
    with pytest.raises(RuntimeError, match="admitted at version 4, the engine still holds 3"):
        collector.start(Ticket(0, 4), prompt(0))
    with pytest.raises(ValueError, match=r"admitted at version 2, a carried token is of version 1"):
        collector.start(Ticket(0, 2), prompt(0), [old])
    with pytest.raises(ValueError, match="each sample_index once"):
        collector.start(Ticket(0, 1), prompt(0), [old, old])
    assert collector.tickets == [] and not collector.busy
    collector.start(Ticket(0, 1), prompt(0), [old])
    with pytest.raises(ValueError, match="ticket 0 is in flight already"):
        collector.start(Ticket(0, 1), prompt(0))
