"""A saved engine goes on bit for bit: in a new engine, in another process, idle or busy, whatever weights came when."""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY, tiny_policy
from engine_runs import VOCAB, make_engine, prompts, run_all

from vapo_async.collector.engine import Completion, GenerationRequest
from vapo_async.collector.engine_transformers import TransformersEngine
from vapo_async.config import ConfigError, KVCacheOnUpdate
from vapo_async.state import State, read_state, write_state
from vapo_async.weights.mailbox import published_tensors

SWAP_BEFORE, SWAP_AFTER = 4, 6  # steps: of the first swap, and of the second one after the save


def busy_engine(**settings: object) -> TransformersEngine:
    """9 requests with 1 … 3 samples of different lengths; one is carried, one of its samples finished."""
    engine = make_engine(tiny_policy(VOCAB, seed=0), **settings)
    for i, prompt in enumerate(prompts(9)):
        engine.submit(GenerationRequest(i, prompt, 1 + i % 3, 6 + 3 * i))
    engine.step()
    carried = tuple(completion.response for completion in engine.abort(1))
    engine.submit(GenerationRequest(1, prompts(9)[1], 2, 9, carried))
    return engine


def steps(engine: TransformersEngine, count: int, first: int = 0) -> list[list[Completion]]:
    """Completions of each step; weights of version 1 come before step SWAP_BEFORE."""
    out = []
    for step in range(first, first + count):
        if step == SWAP_BEFORE:
            engine.load_weights(1, published_tensors(tiny_policy(VOCAB, seed=1)))
        out.append(engine.step())
    return out


def to_the_end(engine: TransformersEngine) -> list[list[Completion]]:
    """Completions of each step; weights of version 2 come before step SWAP_AFTER."""
    out = []
    while engine.num_unfinished:
        if len(out) == SWAP_AFTER:
            engine.load_weights(2, published_tensors(tiny_policy(VOCAB, seed=2)))
        out.append(engine.step())
    return out


def resumed_engine(version: int, state: State, **settings: object) -> TransformersEngine:
    """As a new process would build it: base weights and a seed of its own, then the weights, then the state."""
    engine = make_engine(tiny_policy(VOCAB, seed=0), **({"seed": 99} | settings))
    engine.load_weights(version, published_tensors(tiny_policy(VOCAB, seed=version)))
    engine.load_state_dict(state)
    return engine


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("on_update", list(KVCacheOnUpdate))
@pytest.mark.parametrize("after", [0, 2, 9])
def test_a_loaded_engine_goes_on_bit_for_bit(
    after: int, on_update: KVCacheOnUpdate, temperature: float, tmp_path: Path
) -> None:
    settings = {"kv_cache_on_update": on_update, "temperature": temperature}
    whole = busy_engine(**settings)
    steps(whole, after)
    assert whole.num_unfinished > whole.capacity, "some have to wait for the test to say anything"
    in_memory = whole.state_dict()
    write_state(in_memory, tmp_path, "engine")
    version, generated = whole.version, whole.generated_tokens
    expected = to_the_end(whole)
    assert version == (1 if after > SWAP_BEFORE else 0) and len(expected) > SWAP_AFTER
    for state in (in_memory, read_state(tmp_path, "engine")):
        resumed = resumed_engine(version, state, **settings)
        assert resumed.generated_tokens == generated
        assert to_the_end(resumed) == expected  # tokens, log-probs to the last bit, versions, order of completion
        assert resumed.generated_tokens == whole.generated_tokens


def test_a_chain_of_resumes_is_one_run() -> None:
    """Saved and loaded after every single step."""
    expected = to_the_end(busy_engine())
    engine, got = busy_engine(), []
    while engine.num_unfinished:
        if len(got) == SWAP_AFTER:
            engine.load_weights(2, published_tensors(tiny_policy(VOCAB, seed=2)))
        got.append(engine.step())
        engine = resumed_engine(engine.version, engine.state_dict())
    assert got == expected


CONTINUE_ELSEWHERE = """
import json, sys
from dataclasses import asdict
from pathlib import Path
from test_collector_resume import resumed_engine, to_the_end
from vapo_async.state import read_state
engine = resumed_engine(1, read_state(Path(sys.argv[1]), "engine"))
print(json.dumps([[asdict(c) for c in step] for step in to_the_end(engine)]))
"""


def test_another_process_goes_on_bit_for_bit(tmp_path: Path) -> None:
    whole = busy_engine()
    steps(whole, SWAP_BEFORE + 2)
    write_state(whole.state_dict(), tmp_path, "engine")
    expected = [[asdict(c) for c in step] for step in to_the_end(whole)]
    paths = [str(REPOSITORY), str(REPOSITORY / "tests"), str(REPOSITORY / "tests" / "collector")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-c", CONTINUE_ELSEWHERE, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True)
    assert json.loads(done.stdout) == json.loads(json.dumps(expected))


def test_the_stored_keys_are_what_is_decoded_with() -> None:
    """Kept keys under new weights can be had from nowhere else: without them the log-probs are others."""
    settings = {"kv_cache_on_update": KVCacheOnUpdate.keep, "temperature": 1.0}
    whole = busy_engine(**settings)
    steps(whole, SWAP_BEFORE + 1)
    state = whole.state_dict()
    in_flight = state.data["samples"]["in_flight"]
    prompt_lengths = [len(state.data["requests"][place]["prompt_token_ids"]) for place in in_flight["request"]]
    newest = len(prompt_lengths)  # one token of each: its keys come with the next step
    positions = sum(prompt_lengths) + sum(in_flight["response"]["length"]) - newest
    stored = sum(tensor.nbytes for key, tensor in state.tensors.items() if key.startswith("cache/"))
    assert stored == positions * 2 * 2 * 2 * 32 * 4  # keys and values, 2 layers, 2 heads, 32 numbers, float32
    expected = to_the_end(whole)
    without = state.tensors | {"cache/keys.0": torch.zeros_like(state.tensors["cache/keys.0"])}
    assert to_the_end(resumed_engine(1, State(state.data, without), **settings)) != expected
    assert to_the_end(resumed_engine(1, state, **settings)) == expected


@pytest.mark.parametrize("used", [False, True])
def test_an_idle_engine_is_saved_too(used: bool, tmp_path: Path) -> None:
    """Before its cache was ever filled, and after its last response: sampling goes on where it was."""
    whole = make_engine(tiny_policy(VOCAB), seed=4)
    if used:
        whole.submit(GenerationRequest(0, (2, 3, 4), 3, 5))
        run_all(whole)
    write_state(whole.state_dict(), tmp_path, "engine")
    resumed = make_engine(tiny_policy(VOCAB), seed=5)
    resumed.load_state_dict(read_state(tmp_path, "engine"))
    assert resumed.num_unfinished == 0 and resumed.generated_tokens == whole.generated_tokens
    completions = []
    for engine in (whole, resumed):
        engine.submit(GenerationRequest(1, (5, 6), 4, 20))
        completions.append(run_all(engine))
    assert completions[0] == completions[1]


def test_waiting_and_carried_finished_ones_are_saved_before_the_first_step() -> None:
    first = make_engine(tiny_policy(VOCAB), temperature=0.0)
    first.submit(GenerationRequest(0, (2, 3), 2, 4))
    done = tuple(c.response for c in run_all(first))
    whole, resumed = make_engine(tiny_policy(VOCAB)), make_engine(tiny_policy(VOCAB), seed=1)
    whole.submit(GenerationRequest(7, (2, 3), 3, 4, done))
    resumed.load_state_dict(whole.state_dict())
    assert resumed.num_unfinished == 3
    first_step = resumed.step()
    assert [c.response for c in first_step[:2]] == list(done)
    assert first_step == whole.step() and run_all(resumed) == run_all(whole)


def test_fewer_slots_than_were_in_flight() -> None:
    """The surplus waits in front of the others, with its tokens; greedy decoding gives the same ones."""
    whole = busy_engine(temperature=0.0)
    steps(whole, 2)
    narrow = resumed_engine(0, whole.state_dict(), temperature=0.0, max_slots=2)
    waiting = narrow.state_dict().data["samples"]["waiting"]["response"]["length"]
    assert waiting[:3] == whole.state_dict().data["samples"]["in_flight"]["response"]["length"][2:] and all(waiting[:3])
    narrow.step()
    assert narrow.num_unfinished > narrow.capacity == 2

    def tokens(completions: list[Completion]) -> dict[tuple[int, int], list[int]]:
        return {(c.request_id, c.response.sample_index): c.response.token_ids for c in completions}

    narrow = resumed_engine(0, whole.state_dict(), temperature=0.0, max_slots=2)
    assert tokens(run_all(narrow)) == tokens(run_all(whole))


def test_wrong_states_are_refused() -> None:
    whole = busy_engine()
    state = whole.state_dict()
    with pytest.raises(RuntimeError, match="idle"):
        whole.load_state_dict(state)
    with pytest.raises(ConfigError, match=r"may take \d+ tokens with its prompt, the engine holds 20"):
        make_engine(tiny_policy(VOCAB), max_length=20).load_state_dict(state)
