"""Responses made to attack the verifier, through the whole stage: extraction in this process, judging in the workers.

None is right, each is scored within 5 seconds, honest ones beside it stay right, and nothing is left behind: no file,
no process, no memory.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from vapo_async.config import AnswerStyle, DatasetTaskConfig, VerifierConfig
from vapo_async.schema import Problem, Score
from vapo_async.verifier import ScoreRequest, TaskVerifier, extract_answer

MEMORY_MB = 1024
LIMIT_S = 5.0
MB = 1 << 20
WORKER = "vapo_async.verifier.worker"
RIGHT = Score(True, 1.0)
HONEST = r"So \boxed{\frac{84x}{2x}}"  # needs SymPy


def _boxed(answer: str) -> str:
    return rf"Clearly \boxed{{{answer}}}."


DETERMINANT = r"\\".join("&".join(f"{column}_{row}" for column in "abcdefghijk") for row in range(11))
HOSTILE = {
    "import": _boxed("__import__('os').system('touch DIR/a')"),
    "text import": _boxed(r"\text{__import__('os').system('touch DIR/b')}"),
    "subclasses": _boxed("().__class__.__mro__[1].__subclasses__()"),
    "builtins": _boxed("().__class__.__base__.__subclasses__()[84]().load_module('os').mkdir('DIR/c')"),
    "lambda": _boxed("(lambda f: f(f))(lambda f: f(f))"),
    "open": _boxed("open('DIR/d','w').write('x')"),
    "exit": _boxed("exit()"),
    "eval": _boxed("eval('6*7')"),
    "int": _boxed("int('42')"),
    "sympify": _boxed('sympify("42")'),
    "sympify import": _boxed("sympify(\"__import__('os').mkdir('DIR/e')\")"),
    "Integer": _boxed("Integer.__subclasses__"),
    "Symbol": _boxed("Symbol('x').func(42)"),
    "solve": _boxed("solve(x-42, x)[0]"),
    "integrate": _boxed("integrate(exp(exp(exp(x))), x)"),
    "integral": _boxed(r"\int_0^1 e^{e^{e^{x}}} \sin(x^{x}) dx"),
    "zoo": _boxed("zoo"),
    "nan": _boxed("nan"),
    "infinity": _boxed(r"\infty - \infty + 42"),
    "division": _boxed(r"\frac{42}{0}"),
    "power tower": _boxed("9**9**9**9"),
    "latex tower": _boxed("9^{9^{9^{9^{9}}}}"),
    "factorials": _boxed("9!!!!!!!!!!!!!!!!!!!!!!!!"),
    "factorial": _boxed("10^{10^{10}}!"),
    "binomial": _boxed(r"\binom{10^{9}}{5 \cdot 10^{8}}"),
    "sum": _boxed(r"\sum_{n=1}^{10^{12}} \frac{1}{n^n}"),
    "product": _boxed(r"\prod_{n=1}^{10^{9}} (x+n)"),
    "expand": _boxed("(a+b+c+d+e+f+g)^{300}-(g+f+e+d+c+b+a)^{300}+42x"),
    "polynomial": _boxed("x^{99999999999}-1"),
    "root": _boxed("x^{17}-x-1 > 0"),
    "brackets": _boxed("(" * MB + ")" * MB),
    "braces": "{" * MB + r"\boxed{" + "{" * MB + "42" + "}" * MB,
    "boxes": r"\boxed{" * (MB // 4) + "42",
    "short brackets": _boxed("(" * 1900 + "42" + ")" * 1900),
    "left": _boxed(r"\left(" * 300 + "42" + r"\right)" * 200),
    "fractions": _boxed(r"\frac{1}{" * MB + "42" + "}" * MB),
    "short fractions": _boxed(r"\frac{1}{" * 350 + "42" + "}" * 350),
    "roots": _boxed(r"\sqrt{" * MB + "42" + "}" * MB),
    "short roots": _boxed(r"\sqrt{" * 450 + "42" + "}" * 450),
    "latex": r"\boxed{" + r"\frac{x}{y} + " * (5 * MB // 14) + "42}",
    "no end": r"\boxed{42" + r"\left\{ x " * (MB // 2),
    "nulls": _boxed("\0" * 100 + "42\0"),
    "surrogates": _boxed("\ud800\udfff42\udc00"),
    "escapes": _boxed("\x1b[2J\\u0034\\u0032\r\b\x7f"),
    "matrix": _boxed(r"\begin{pmatrix}" + r"1 & 2 & x \\" * 250 + r"\end{pmatrix}^{99}"),
    "determinant": _boxed(r"\det\begin{pmatrix}" + DETERMINANT + r"\end{pmatrix}"),
    "environments": _boxed(r"\begin{matrix}" * 250),
    "digits": _boxed("4" * 100_000),
    "some digits": _boxed("4" * 3900),
    "ratio of digits": _boxed("4" * 1900 + "/" + "7" * 1900),
    "exponent": _boxed("4.2e999999999"),
    "other digits": _boxed("\u0664\u0663"),  # 43 in Arabic-Indic digits
    "confusables": _boxed("\U0001d7dc\U0001d7db"),  # 43 in double-struck digits
    "format": _boxed("{0.__class__.__init__.__globals__}%s%n%x{x!r:>999999999}"),
    "commas": _boxed("42," * 1300),
    "set": _boxed(r"\{" + ",".join(map(str, range(900))) + r"\}"),
    "intervals": _boxed(r" \cup ".join(f"({n},{n + 1})" for n in range(250))),
    "equations": _boxed("=".join(f"x_{n}" for n in range(600)) + "=43"),
    "dollars": _boxed("$" * 3900),
    "spaces": _boxed("4" + " " * 3900 + "2 x"),
    "text": _boxed(r"\text" * 700 + "{42" + "}" * 10),
    "answers": "the answer is " * (5 * MB // 14) + "\n" + _boxed("the answer is " * 250),
    "frames": _boxed('\x00\x00\x00\x11{"correct": true}' * 3),
    "ready": '{"ready": true}\n{"correct": true}\n' + _boxed('{"ready": true}{"correct": true}'),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Home, folder for temporary files and working directory in one."""
    folder = tmp_path_factory.mktemp("hostile")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HOME", "TMPDIR", "XDG_CACHE_HOME", "MPLCONFIGDIR"):
            patch.setenv(name, str(folder))
        patch.chdir(folder)
        yield folder


@pytest.fixture(scope="module")
def others() -> set[int]:
    """Children that are not the verifier's."""
    return _children()


@pytest.fixture(scope="module")
def verifier(others: set[int], folder: Path) -> Iterator[TaskVerifier]:
    limits = VerifierConfig(workers=2, timeout_s=2.0, memory_mb=MEMORY_MB)
    with TaskVerifier(DatasetTaskConfig(train="unused.jsonl"), limits) as verifier:
        assert _score(verifier, HONEST, HONEST) == [RIGHT] * 2
        yield verifier


def _score(verifier: TaskVerifier, *texts: str) -> list[Score]:
    return verifier.score([ScoreRequest(Problem(0, "?", "42"), text, 10) for text in texts])


def _children() -> set[int]:
    return {process.pid for process in psutil.Process().children(recursive=True)}


class Peaks:
    """Samples the memory that this process gains and that the verifier's processes hold, MiB, while it is open."""

    def __init__(self, others: set[int]) -> None:
        self._others = others

    def __enter__(self) -> "Peaks":
        self._before = psutil.Process().memory_info().rss
        self.own = self.child = 0.0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self._sample()  # once at least

    def _watch(self) -> None:
        while not self._done.wait(0.02):
            self._sample()

    def _sample(self) -> None:
        me = psutil.Process()
        self.own = max(self.own, (me.memory_info().rss - self._before) / MB)
        for child in (child for child in me.children() if child.pid not in self._others):
            with suppress(psutil.NoSuchProcess):
                if WORKER in child.cmdline():  # until its exec a new one shows this process's memory
                    self.child = max(self.child, child.memory_info().rss / MB)


NAMES = list(HOSTILE)


@pytest.mark.parametrize("pair", zip(NAMES[::2], NAMES[1::2], strict=True), ids=" and ".join)
def test_hostile_answers_cost_only_themselves(
    others: set[int], verifier: TaskVerifier, folder: Path, pair: tuple[str, str]
) -> None:
    texts = [HOSTILE[name].replace("DIR", str(folder)) for name in pair]
    root = set(Path("/").iterdir())
    with Peaks(others) as peaks:
        start = time.monotonic()
        scores = _score(verifier, HONEST, *texts, HONEST)
        took = time.monotonic() - start
    assert not scores[1].correct and not scores[2].correct
    assert [scores[0], scores[3]] == [RIGHT] * 2
    assert took < LIMIT_S
    assert 0 < peaks.child < MEMORY_MB
    assert peaks.own < 200
    assert list(folder.iterdir()) == []
    assert set(Path("/").iterdir()) == root  # the workers' working directory
    assert len(_children() - others) <= 3  # two workers, one that stands by


def test_all_at_once(others: set[int], verifier: TaskVerifier, folder: Path) -> None:
    """The quick ones in one call, each beside an honest one; what is counted is what the scores say."""
    slow = (
        "tower",
        "factorial",
        "sum",
        "binomial",
        "product",
        "expand",
        "left",
        "short",
        "set",
        "intervals",
        "equations",
    )
    texts = [
        text.replace("DIR", str(folder)) for name, text in HOSTILE.items() if not any(word in name for word in slow)
    ]
    assert len(texts) > 40
    before = (verifier.scored, verifier.timeouts, verifier.crashes, verifier.forbidden)
    scores = _score(verifier, *(text for hostile in texts for text in (hostile, HONEST)))
    assert not any(score.correct for score in scores[::2])
    assert scores[1::2] == [RIGHT] * len(texts)
    notes = [score.note for score in scores]
    gained = (len(scores), notes.count("timeout"), notes.count("crashed"), notes.count("forbidden"))
    after = (verifier.scored, verifier.timeouts, verifier.crashes, verifier.forbidden)
    assert after == tuple(a + b for a, b in zip(before, gained, strict=True))
    verifier.close()
    assert _children() <= others
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("style", AnswerStyle)
@pytest.mark.parametrize(
    "bait",
    [
        r"\boxed{",
        r"\boxed {{",
        "}" + r"\boxed{",
        "{\\",
        "\\",
        "#",
        "#### ",
        "answer is ",
        "answer" + " " * 20,
        "**" + "_" * 7,
        "\n",
        " ",
        ".`*",
        "answer:" + "*" * 9,
    ],
)
def test_extraction_is_linear(style: AnswerStyle, bait: str) -> None:
    """5 MB in this process, where nothing limits it."""
    text = bait * (5 * MB // len(bait))
    start = time.process_time()
    extract_answer(text + "}" * 1000, style)
    assert time.process_time() - start < 3.0
