"""Weights in a file in memory: what is written is read, by whoever knows the path, and nothing is left behind."""

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from vapo_async.weights.shared_memory import shared

FOLDERS = [Path("/dev/shm"), Path(tempfile.gettempdir())]


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """No descriptor of this process is open that was not before, and no file has come with our name."""
    descriptors = open_files()
    yield
    assert open_files() == descriptors
    assert not [path for folder in FOLDERS for path in folder.glob("*vapo_async_weights*")]


def open_files() -> list[str]:
    """Of this process, those that are memory files of ours."""
    found = []
    for descriptor in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # the listing's own
            found.append(str(descriptor.readlink()))
    return [target for target in found if "vapo_async_weights" in target]


@settings(max_examples=25)
@given(
    shapes=st.lists(st.lists(st.integers(0, 5), max_size=3), max_size=6),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.int64]),
    seed=st.integers(0, 100),
)
def test_all_shapes_and_dtypes_come_back_bit_for_bit(shapes: list[list[int]], dtype: torch.dtype, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        f"layers.{i}.weight": torch.randn(shape, generator=generator).mul(100).to(dtype)
        for i, shape in enumerate(shapes)
    }
    with shared(tensors) as path:
        found = load_file(path)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == dtype and found[name].shape == tensor.shape and torch.equal(found[name], tensor)


def test_special_numbers_keep_their_bits() -> None:
    bits = torch.tensor([0x7FC00001, 0x7F800000, -0x80000000, 1], dtype=torch.int32)  # a NaN, ∞, −0, a subnormal
    with shared({"a": bits.view(torch.float32)}) as path:
        assert torch.equal(load_file(path)["a"].view(torch.int32), bits)


def test_non_contiguous_tensors_are_refused_by_name() -> None:
    with (
        pytest.raises(ValueError, match=r"non contiguous tensor: `a\.weight`"),
        shared({"a.weight": torch.ones(2, 3).T}),
    ):
        pass


READER = """
import sys
from safetensors.torch import load_file
tensors = load_file(sys.argv[1])
print(sorted(tensors), float(tensors["big"].double().sum()), flush=True)
sys.stdin.readline()
print(float(tensors["big"].double().sum()), flush=True)
"""


def test_another_process_reads_by_the_path_and_keeps_what_it_has_mapped() -> None:
    """64 MiB: more than a pipe or a message holds."""
    big = torch.arange(16 << 20, dtype=torch.float32).remainder_(1009)
    total = float(big.double().sum())
    command = [sys.executable, "-c", READER]
    with (
        shared({"big": big, "small": torch.ones(1)}) as path,
        subprocess.Popen([*command, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as reader,
    ):
        assert reader.stdin is not None and reader.stdout is not None
        assert reader.stdout.readline() == f"['big', 'small'] {total}\n"
        big.zero_()  # a copy was shared: the learner goes on training
        reader.stdin.write("\n")
        reader.stdin.flush()
        assert reader.stdout.readline() == f"{total}\n"


def test_it_is_gone_after_the_block_but_for_who_holds_it() -> None:
    with shared({"a": torch.full((1000,), 7.0)}) as path:
        assert Path(path).stat().st_size > 4000
        with safe_open(path, "pt") as file:
            held = file.get_tensor("a")
    with pytest.raises(FileNotFoundError):
        Path(path).stat()
    with pytest.raises(FileNotFoundError):
        load_file(path)
    assert torch.equal(held, torch.full((1000,), 7.0))


def test_it_is_gone_after_a_block_that_fails() -> None:
    with pytest.raises(KeyError), shared({"a": torch.ones(3)}) as path:
        raise KeyError
    assert not Path(path).exists()


def test_publications_one_after_the_other_and_beside_each_other_do_not_mix() -> None:
    with shared({"a": torch.ones(2)}) as first, shared({"a": torch.zeros(3)}) as second:
        assert first != second
        assert load_file(first)["a"].tolist() == [1, 1] and load_file(second)["a"].tolist() == [0, 0, 0]
    for i in range(50):
        with shared({"a": torch.tensor([float(i)])}) as path:
            assert load_file(path)["a"].item() == i


def test_a_killed_owner_leaves_nothing() -> None:
    """The file has no name: it goes with the process, however that ends."""
    script = (
        "import os, signal, torch\n"
        "from vapo_async.weights.shared_memory import shared\n"
        "with shared({'a': torch.ones(1 << 20)}) as path:\n"
        "    print(path, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == -9 and done.stdout.startswith("/proc/")
    assert not Path(done.stdout.strip()).exists()
