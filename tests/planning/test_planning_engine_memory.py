"""Memory of engines: what is left for keys and values, by hand."""

from dataclasses import replace

import pytest

from vapo_async.planning.cluster import GIB
from vapo_async.planning.engine_memory import EngineSizes, full_cache_memory, vllm_gpu_memory
from vapo_async.planning.shapes import KNOWN, ModelShape

LARGE = KNOWN["Qwen/Qwen2.5-32B"]
SIZES = EngineSizes(2, slots=160, max_length=22_528, tensor_parallel=4)


def test_the_cache_takes_what_weights_and_buffers_leave() -> None:
    found = vllm_gpu_memory(LARGE, SIZES, 71 * GIB, 4 * GIB)
    parts = {part.name: part.bytes for part in found.memory.parts}
    assert parts["weights"] == 2 * 32_763_876_352 / 4
    assert parts["activations"] == 2 * 16_384 * (4 * 5120 + 3 * 27_648 / 4)
    assert parts["logits"] == 3 * 4 * 160 * 152_064
    assert found.memory.peak() == pytest.approx((71 - 4) * GIB)
    assert found.kv_tokens == pytest.approx(parts["KV cache"] / 65_536)
    assert found.full_length == pytest.approx(found.kv_tokens / 22_528)


def test_weights_that_leave_nothing_leave_nothing() -> None:
    found = vllm_gpu_memory(LARGE, replace(SIZES, tensor_parallel=1), 71 * GIB, 4 * GIB)
    assert 0 < found.kv_tokens < 22_528  # one response does not fit
    assert vllm_gpu_memory(LARGE, replace(SIZES, tensor_parallel=1), 40 * GIB, 4 * GIB).kv_tokens == 0


def test_a_cache_of_its_own_setting_is_taken_as_it_is() -> None:
    sizes = replace(SIZES, kv_bytes=10 * GIB)
    for found in (vllm_gpu_memory(LARGE, sizes, 71 * GIB, 4 * GIB), full_cache_memory(LARGE, sizes)):
        assert found.kv_tokens == 10 * GIB / 65_536


def test_a_full_cache_holds_all_slots_and_one_more_in_whole_blocks() -> None:
    shape = ModelShape("x", 16, 2, 2, 1, 8, 32, 11, tied=True)
    found = full_cache_memory(shape, EngineSizes(4, slots=3, max_length=33))
    cache = {part.name: part.bytes for part in found.memory.parts}["KV cache"]
    assert cache == 4 * 64 * (2 * 2 * 8 * 4)  # 33 tokens take two blocks of 32
    assert found.kv_tokens == 256 and found.full_length == pytest.approx(256 / 33)
