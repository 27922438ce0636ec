import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vapo_async.config import ConfigError
from vapo_async.prompts.datasets import load_problems
from vapo_async.schema import Problem

SHARED = Path(__file__).parents[3] / "shared" / "data"


def load(path: Path | str, question: str = "q", answer: str = "a", **options: Any) -> list[Problem]:
    return load_problems(str(path), question_column=question, answer_column=answer, **options)


def jsonl(folder: Path, *rows: object) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("file", "question", "answer", "separator", "rows", "first"),
    [
        ("gsm8k/train.jsonl", "question", "answer", "####", 7473, "72"),
        ("gsm8k/test.jsonl", "question", "answer", "####", 1319, "18"),
        ("math_train/train.json", "problem", "answer", None, 7470, "0"),
        ("math500/test.jsonl", "problem", "answer", None, 500, None),
        ("aime24/test.jsonl", "problem", "answer", None, 30, "204"),
        ("amc23/test.jsonl", "question", "answer", None, 40, "27"),
        ("dapo17k/train.parquet", "prompt.0.content", "reward_model.ground_truth", None, 17917, "34"),
    ],
)
def test_real_files_load_with_the_right_counts(
    file: str, question: str, answer: str, separator: str | None, rows: int, first: str | None
) -> None:
    path = SHARED / file
    if not path.is_file():
        pytest.skip(f"{file} is not on this machine")
    problems = load(path, question, answer, answer_separator=separator, skip_incomplete="math_train" in file)
    assert len(problems) == rows
    assert [problem.index for problem in problems] == list(range(rows))
    assert all(problem.question.strip() and problem.answer.strip() for problem in problems)
    assert first is None or problems[0].answer == first


@settings(deadline=None, max_examples=40)
@given(
    st.lists(
        st.tuples(
            st.text(min_size=1).map(str.strip).filter(bool),
            st.one_of(st.integers(), st.text(min_size=1).map(str.strip).filter(bool)),
        ),
        min_size=1,
        max_size=5,
    )
)
def test_every_format_gives_the_same_problems(tmp_path_factory: pytest.TempPathFactory, rows: list[Any]) -> None:
    folder = tmp_path_factory.mktemp("formats")
    nested = [{"q": [{"text": question}], "a": {"gold": str(answer)}} for question, answer in rows]
    lines = jsonl(folder, *nested)
    array = folder / "rows.json"
    array.write_text(json.dumps(nested), encoding="utf-8")
    table = folder / "rows.parquet"
    encodable = all(not any("\ud800" <= c <= "\udfff" for c in f"{q}{a}") for q, a in rows)
    expected = [Problem(i, question, str(answer)) for i, (question, answer) in enumerate(rows)]
    assert load(lines, "q.0.text", "a.gold") == load(array, "q.0.text", "a.gold") == expected
    if encodable:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(nested), table)
        assert load(table, "q.0.text", "a.gold") == expected


@pytest.mark.parametrize(
    ("value", "text"),
    [(27.0, "27"), (27, "27"), (-3.0, "-3"), (0.5, "0.5"), (" 1/2 ", "1/2"), (0, "0"), (1e20, "1" + "0" * 20)],
)
def test_answers_become_plain_text(tmp_path: Path, value: object, text: str) -> None:
    assert load(jsonl(tmp_path, {"q": "?", "a": value}))[0].answer == text


def test_the_answer_follows_the_last_separator(tmp_path: Path) -> None:
    path = jsonl(tmp_path, {"q": "?", "a": "#### 1\n#### 2 "})
    assert load(path, answer_separator="####")[0].answer == "2"


def test_incomplete_rows_are_left_out_on_request(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = jsonl(tmp_path, {"q": "x", "a": "# 1"}, {"q": "y", "a": None}, {"q": "z", "a": "1"}, {"a": "# 1"})
    assert load(path, answer_separator="#", skip_incomplete=True) == [Problem(0, "x", "1")]
    assert "left out 3 rows" in caplog.text and "rows.jsonl:2" in caplog.text


def test_limit_keeps_the_first_rows_and_blank_lines_do_not_count(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('\n{"q": "x", "a": 1}\n\n{"q": "y", "a": 2}\n{"q": "z", "a": 3}\n')
    assert [p.question for p in load(path, limit=2)] == ["x", "y"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("rows.jsonl", '{"q": "x", "a": 1}\n{"q": "y"}\n', ["rows.jsonl:2", "no answer", "'a'", "found: q"]),
        ("rows.jsonl", '{"q": "x", "a": null}\n', ["rows.jsonl:1", "no answer"]),
        ("rows.jsonl", '{"q": "  ", "a": 1}\n', ["rows.jsonl:1", "no question", "task.question_column"]),
        ("rows.jsonl", '{"q": "x", "a": 1}\n{"q": \n', ["rows.jsonl:2", "not valid JSON"]),
        ("rows.jsonl", "[1]\n", ["rows.jsonl:1", "no question", "a list"]),
        ("rows.jsonl", "\n", ["holds no rows"]),
        ("rows.json", '[{"q": "x", "a": NaN}]', ["row 1", "no answer"]),
        ("rows.json", '{"q": "x", "a": 1}', ["an object", "expected a list of rows"]),
        ("rows.json", '[\n{"q": "x", "a": 1},\n{]', ["line 3", "not valid JSON"]),
        ("rows.parquet", "no parquet", ["cannot be read as parquet"]),
        ("rows.csv", "q,a\n", ["'.csv'", ".jsonl, .json, .parquet"]),
    ],
)
def test_a_broken_file_is_told_in_one_line(tmp_path: Path, name: str, content: str, words: list[str]) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError) as error:
        load(tmp_path / name)
    message = str(error.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


def test_a_line_that_is_not_utf8_is_told(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(b'{"q": "\xff", "a": 1}\n')
    with pytest.raises(ConfigError, match=r"rows.jsonl:1: not UTF-8"):
        load(tmp_path / "rows.jsonl")


def test_an_answer_without_the_separator_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no answer after '####'"):
        load(jsonl(tmp_path, {"q": "x", "a": "72"}), answer_separator="####")


@pytest.mark.parametrize("name", ["/no/such/file", "./x", "~/x", "a/b/c", "train.jsonl", "data/train.parquet"])
def test_a_path_that_does_not_exist_is_told(name: str) -> None:
    with pytest.raises(ConfigError, match="data file not found"):
        load(name)


def test_a_folder_is_no_data_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="data file not found"):
        load(tmp_path)


def test_a_hub_that_does_not_answer_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def refuse(*_: object, **__: object) -> None:
        raise ConnectionError("nobody\nanswers")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(ConfigError, match=r"'openai/gsm8k' \(split 'train'\) cannot be loaded.*nobody answers"):
        load("openai/gsm8k")


def test_a_hub_data_set_is_read_like_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    seen: list[object] = []

    def give(name: str, config: str | None, split: str) -> datasets.Dataset:
        seen.append((name, config, split))
        return datasets.Dataset.from_list([{"q": "x", "a": 1.0}])

    monkeypatch.setattr(datasets, "load_dataset", give)
    assert load("org/name", hf_config="main", split="test") == [Problem(0, "x", "1")]
    assert seen == [("org/name", "main", "test")]
