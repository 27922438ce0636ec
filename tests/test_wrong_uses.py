"""Wrong uses of ``scripts/train_async.py``: exit code 2, one clear line, no stack trace, nothing left behind."""

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import REPOSITORY

SCRIPT = REPOSITORY / "scripts" / "train_async.py"
TIME_LIMIT_S = 120
GOOD_ROW = {"question": "What is 2 + 3?", "answer": "#### 5"}


@dataclass(frozen=True)
class Mistake:
    """A command line and what its one line has to say: what is wrong, then a way out."""

    arguments: tuple[str, ...]
    says: tuple[str, ...]
    ray_address: str | None = None
    without_torch: bool = True
    """The answer has to come before the seconds that importing torch takes."""


@dataclass(frozen=True)
class Outcome:
    code: int
    stdout: str
    stderr: str
    left_behind: set[str]


MISTAKES = {
    "typo in a key": Mistake(
        ("buffer.max_stalenes=4",), ("unknown key 'buffer.max_stalenes'", "did you mean 'buffer.max_staleness'?")
    ),
    "S below zero": Mistake(("buffer.max_staleness=-1",), ("buffer.max_staleness must be ≥ 0, found -1",)),
    "a dtype that cannot be trained": Mistake(
        ("model.dtype=bfloat16",), ("model.dtype must be float32 for training, found 'bfloat16'", "fp32 master weights")
    ),
    "lead above S": Mistake(
        ("buffer.max_staleness=1", "buffer.lead=2"), ("buffer.lead", "found 2", "lower it or leave it null")
    ),
    "G = 1 with group advantages": Mistake(
        ("algorithm.advantage=group", "algorithm.group_size=1"),
        ("algorithm.group_size must be ≥ 2", "found 1", "algorithm.advantage=gae"),
    ),
    "missing data file": Mistake(
        ("task=gsm8k", "task.train=no/such/rows.jsonl", "launcher=inline"),
        ("data file not found: no/such/rows.jsonl", "expected a .jsonl, .json or .parquet file"),
        without_torch=False,
    ),
    "a row without an answer": Mistake(
        ("task=gsm8k", "task.train={place}/unanswered.jsonl", "task.heldout={place}/good.jsonl"),
        ("{place}/unanswered.jsonl:2 has no answer in column 'answer'", "task.skip_incomplete=true"),
        without_torch=False,
    ),
    "model folder that is not one": Mistake(
        ("model=folder", "model.path={place}/no_model"),
        ("{place}/no_model is not a Hugging Face model folder: no config.json", "give the folder"),
        without_torch=False,
    ),
    "model folder with broken weights": Mistake(
        ("model=folder", "model.path={place}/broken_model", "evaluation.problems=4", "task.heldout_problems=4"),
        ("{place}/broken_model cannot be loaded as a causal language model", "give the folder"),
        without_torch=False,
    ),
    "resume from an empty folder": Mistake(
        ("resume={place}/no_model",), ("resume={place}/no_model: no complete checkpoint", "'auto' or 'never'")
    ),
    "resume from nowhere": Mistake(("resume=no/run",), ("resume=no/run: no such folder", "'auto' or 'never'")),
    "RAY_ADDRESS that answers nobody": Mistake(
        (), ("RAY_ADDRESS=127.0.0.1:{closed}: nobody answers there", "unset it"), ray_address="127.0.0.1:{closed}"
    ),
    "RAY_ADDRESS of something that is no Ray": Mistake(
        ("launcher.connect_timeout_s=0.5",),
        ("RAY_ADDRESS=127.0.0.1:{taken}: nobody answers there (timed out)", "unset it"),
        ray_address="127.0.0.1:{taken}",
    ),
    "RAY_ADDRESS that is no address": Mistake(
        (), ("RAY_ADDRESS=somewhere: expected host:port",), ray_address="somewhere"
    ),
    "cluster address that answers nobody": Mistake(
        ("launcher.address=ray://127.0.0.1:{closed}",),
        ("launcher.address=ray://127.0.0.1:{closed}: nobody answers there", "`ray start --head`"),
    ),
    "unwritable run folder": Mistake(
        ("runs_dir={place}/good.jsonl/runs",),
        ("runs_dir={place}/good.jsonl/runs: cannot write the run folder there", "not a folder", "choose another"),
    ),
    "a port in use": Mistake(
        ("launcher.port={taken}",), ("launcher.port={taken}: cannot be used", "choose another, or null for a free one")
    ),
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory, base_folder: Path) -> Iterator[dict[str, Future[Outcome]]]:
    """All of them, two at a time."""
    with closing(socket.socket()) as holder, ThreadPoolExecutor(max_workers=2) as pool:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        with closing(socket.socket()) as closed:
            closed.bind(("127.0.0.1", 0))
            ports = {"taken": str(holder.getsockname()[1]), "closed": str(closed.getsockname()[1])}
        yield {
            name: pool.submit(run, mistake, tmp_path_factory.mktemp("use"), {"base": str(base_folder), **ports})
            for name, mistake in MISTAKES.items()
        }


def run(mistake: Mistake, place: Path, names: dict[str, str]) -> Outcome:
    """Runs the command in a folder of its own."""
    prepare(place, Path(names["base"]))
    before = contents(place)
    names = names | {"place": str(place)}
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "PYTHONPATH"))}
    environment = inherited | {"VAPO_ASYNC_CACHE": str(place / "cache"), "PYTHONDONTWRITEBYTECODE": "1"}
    if mistake.ray_address is not None:
        environment["RAY_ADDRESS"] = filled(mistake.ray_address, names)
    if mistake.without_torch:
        environment["PYTHONPATH"] = str(place / "no_torch")
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *(filled(argument, names) for argument in mistake.arguments)],
        cwd=place,
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIME_LIMIT_S,
    )
    expected = [filled(text, names) for text in mistake.says]
    assert all(text in done.stderr for text in expected), (expected, done.stderr)
    return Outcome(done.returncode, done.stdout, done.stderr, contents(place) ^ before)


def prepare(place: Path, base_folder: Path) -> None:
    (place / "good.jsonl").write_text(json.dumps(GOOD_ROW) + "\n")
    (place / "unanswered.jsonl").write_text(json.dumps(GOOD_ROW) + '\n{"question": "What is 2 + 4?"}\n')
    (place / "no_model").mkdir()
    shutil.copytree(base_folder, place / "broken_model")
    (place / "broken_model" / "model.safetensors").write_bytes(b"broken")
    (place / "no_torch").mkdir()
    (place / "no_torch" / "torch.py").write_text("raise ImportError('too early')\n")


def filled(text: str, names: dict[str, str]) -> str:
    for name, value in names.items():
        text = text.replace(f"{{{name}}}", value)
    return text


def contents(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.mark.parametrize("name", MISTAKES)
def test_wrong_use_is_told_in_one_line(name: str, outcomes: dict[str, Future[Outcome]]) -> None:
    outcome = outcomes[name].result(TIME_LIMIT_S * len(MISTAKES))
    assert "Traceback" not in outcome.stderr
    assert outcome.stderr.startswith("error: "), outcome.stderr
    assert outcome.stderr.count("\n") == 1 and outcome.stderr.endswith("\n"), outcome.stderr
    assert outcome.stdout == ""
    assert outcome.code == 2
    assert outcome.left_behind == set()
