"""A sealed process can do nothing but judge: each layer alone, and all of them inside the real worker's loop."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from sympy import Float, nsimplify

from vapo_async.verifier import Sandbox
from vapo_async.verifier.jobs import EquivalenceJob, Outcome, pack, unpack
from vapo_async.verifier.math import equivalent
from vapo_async.verifier.without_eval import replace_eval

ROOT = Path(__file__).parents[2]
# Functions, not source text: a sealed process compiles nothing.
ATTEMPTS = r"""
import ctypes, os, resource, shutil, signal, socket, subprocess, sys, tempfile, threading
folder = sys.argv[1]
attempts = {
    "read": lambda: open(folder + "/secret").read(),
    "write": lambda: open(folder + "/new", "w").write("x"),
    "append": lambda: os.open(folder + "/secret", os.O_WRONLY | os.O_APPEND),
    "list": lambda: os.listdir(folder),
    "remove": lambda: os.remove(folder + "/secret"),
    "rename": lambda: os.rename(folder + "/secret", folder + "/moved"),
    "mkdir": lambda: os.mkdir(folder + "/sub"),
    "truncate": lambda: os.truncate(folder + "/secret", 0),
    "chmod": lambda: os.chmod(folder + "/secret", 0o777),
    "symlink": lambda: os.symlink("/etc/passwd", folder + "/link"),
    "rmtree": lambda: shutil.rmtree(folder),
    "temporary": lambda: tempfile.NamedTemporaryFile(dir=folder),
    "socket": lambda: socket.socket(),
    "unix": lambda: socket.socket(socket.AF_UNIX),
    "connect": lambda: socket.create_connection(("127.0.0.1", 9), 1),
    "popen": lambda: subprocess.run(["true"]),
    "system": lambda: 1 / (os.system("touch " + folder + "/touched") == 0),
    "fork": lambda: os.fork() or os._exit(0),
    "spawn": lambda: os.posix_spawn("/bin/true", ["true"], {}),
    "exec": lambda: os.execv("/bin/true", ["true"]),
    "kill": lambda: os.kill(os.getppid(), 0),
    "ctypes": lambda: ctypes.CDLL(None).getpid(),
    "eval": lambda: eval("1 + 1"),
    "exec text": lambda: exec("x = 1"),
    "compile": lambda: compile("1", "", "eval"),
    "import": lambda: __import__("colorsys"),
    "limits of another": lambda: resource.prlimit(os.getppid(), resource.RLIMIT_CPU),
    "limits": lambda: __import__("resource").setrlimit(__import__("resource").RLIMIT_NOFILE, (64, 64)),
}
"""
BY_THE_HOOK = {"ctypes", "eval", "exec text", "compile", "import"}  # what no kernel can see


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(workers=1, timeout_s=5.0, memory_mb=2048) as box:
        yield box


def _python(code: str, *args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-B", "-c", code, *args]
    return subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=60, check=False)


def _try_all(layer: str, folder: Path, names: tuple[str, ...] = ()) -> dict[str, str]:
    """What became of each attempt (or those named) under one layer: the exception's name, or "done"."""
    code = (
        ATTEMPTS
        + f"""
import json
from vapo_async.verifier import seal
{layer}
results = {{}}
for name in {names} or attempts:
    try:
        attempts[name]()
        results[name] = "done"
    except BaseException as error:
        results[name] = type(error).__name__
os.write(1, json.dumps(results).encode())
os._exit(0)
"""
    )
    (folder / "secret").write_text("secret")
    done = _python(code, str(folder))
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def _untouched(folder: Path) -> bool:
    return [path.name for path in folder.iterdir()] == ["secret"] and (folder / "secret").read_text() == "secret"


def test_the_hook_alone_refuses_everything_it_sees(tmp_path: Path) -> None:
    results = _try_all("sys.addaudithook(seal.Seal._hook.__get__(type('S', (), {'broken': []})()))", tmp_path)
    unseen = {name for name, result in results.items() if result != "Forbidden"}
    assert unseen == {"limits"}  # the worker sets its CPU limit; none can be raised
    assert _untouched(tmp_path)


def test_the_filter_of_system_calls_alone_refuses_what_leaves_the_process(tmp_path: Path) -> None:
    results = _try_all("seal.filter_system_calls() or os._exit(7)", tmp_path)
    assert {name for name, result in results.items() if result == "done"} <= BY_THE_HOOK - {"import"} | {"limits"}
    assert results["read"] == results["socket"] == results["fork"] == results["kill"] == "PermissionError"
    assert results["limits of another"] == "PermissionError"
    assert _untouched(tmp_path)


def test_the_limits_alone_leave_no_descriptor(tmp_path: Path) -> None:
    names = ("read", "write", "append", "list", "temporary", "socket", "unix", "connect", "popen", "import")
    results = _try_all("seal.lower_limits()", tmp_path, names)
    assert "done" not in results.values()
    assert _untouched(tmp_path)


def test_all_of_it_together_leaves_nothing(tmp_path: Path) -> None:
    results = _try_all("seal.Seal()", tmp_path)
    assert {name for name, result in results.items() if result != "Forbidden"} == {"limits"}
    assert results["limits"] in ("ValueError", "PermissionError")
    assert _untouched(tmp_path)


@pytest.mark.parametrize("handled", [False, True])
def test_the_real_worker_finds_every_attempt_of_a_judge_forbidden(tmp_path: Path, handled: bool) -> None:
    """A judge that is led astray, and one that hides the refusal and says "right"."""
    code = (
        ATTEMPTS
        + """
from vapo_async.verifier import worker
def judge(job):
    try:
        attempts[job["pred"]]() if job["pred"] else None
    except BaseException:
        if job["gold"] != "handled":
            raise
    return True
worker.load = lambda needs: {"math_verify": judge}
worker.main(2048)
"""
    )
    names = [
        "read",
        "write",
        "remove",
        "rename",
        "mkdir",
        "socket",
        "popen",
        "system",
        "fork",
        "eval",
        "import",
        "exec",
    ]
    (tmp_path / "secret").write_text("secret")
    gold = "handled" if handled else ""
    jobs = [{"kind": "equivalence", "gold": gold, "pred": name} for name in ["", *names, ""]]
    frame = pack({"timeout_s": 5.0, "needs": ["math_verify"], "jobs": jobs})
    worker = subprocess.Popen(
        [sys.executable, "-B", "-c", code, str(tmp_path)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert worker.stdin is not None and worker.stdout is not None
    worker.stdin.write(frame)
    worker.stdin.flush()
    output, replies = bytearray(), []
    while len(replies) < len(jobs) + 1 and (data := worker.stdout.read1()):
        output += data
        replies += unpack(output, 1 << 16)
    worker.communicate(timeout=60)  # closes stdin, which ends the worker
    forbidden: dict[str, object] = {"correct": False, "forbidden": True}
    expected = [{"ready": True}, {"correct": True}, *[forbidden] * len(names), {"correct": True}]
    assert replies == expected
    assert worker.returncode == 0
    assert _untouched(tmp_path)


@pytest.mark.parametrize(
    ("gold", "pred", "right"),
    [
        ("2y=x+2", "y=0.5x+1", True),
        ("3x+2y=6", "y=3-1.5x", True),
        ("3x+2y=7", "y=3-1.5x", False),
        ("0.75x-y=3", "3x-4y=12", True),
        ("2", r"\sum_{n=0}^\infty \frac1{2^n}", True),
        ("3", r"\sum_{n=0}^\infty \frac1{2^n}", False),
        ("e", r"\sum_{n=0}^\infty \frac{1}{n!}", True),
        (r"\sum_{n=1}^\infty \frac{1}{n^2}", r"\frac{\pi^2}{6}", True),
        (r"\sum_{n=1}^\infty \frac{1}{n^2}", r"\frac{\pi^2}{7}", False),
    ],
)
def test_the_seal_changes_no_verdict(sandbox: Sandbox, gold: str, pred: str, right: bool) -> None:
    assert equivalent(gold, pred) == right
    assert sandbox.run([EquivalenceJob(gold, pred)]) == [Outcome(right)]


@pytest.mark.parametrize("value", ["0.75", "1.41421356237310", "2.0", "0.1", "-12.5", "1e-8"])
def test_decimals_become_the_ratios_that_sympy_finds(value: str) -> None:
    """With the replacement and, in a fresh process, without."""
    code = "import sys; from sympy import Float, nsimplify; print(nsimplify(Float(sys.argv[1]), rational=True))"
    replace_eval()
    assert str(nsimplify(Float(value), rational=True)) == _python(code, value).stdout.strip()
