import json
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from vapo_async.config import ChainSumTaskConfig, ConfigError, TaskConfig
from vapo_async.models.char_tokenizer import build_char_tokenizer
from vapo_async.prompts.stream import PromptStream
from vapo_async.prompts.tasks import Task
from vapo_async.prompts.template import render
from vapo_async.schema import Problem, Prompt

CHARS = build_char_tokenizer()
CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def task(*questions: str) -> Task:
    return Task("test", [Problem(i, question, "0") for i, question in enumerate(questions)], [])


def stream(*questions: str, seed: int = 0, max_prompt_tokens: int = 512) -> PromptStream:
    return PromptStream(task(*questions), CHARS, ChainSumTaskConfig(max_prompt_tokens=max_prompt_tokens), seed)


def word_tokenizer(chat_template: str | None = None, *, close: bool = False) -> PreTrainedTokenizerFast:
    """Adds a BOS, and an EOS if ``close``."""
    vocab = ["<s>", "</s>", "<unk>", "<user>", "<system>", "<assistant>", "hello", "be", "kind"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocab)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>" if close else "<s> $A", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens=["<user>", "<system>", "<assistant>"],
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def test_every_epoch_holds_every_problem_once_in_another_order() -> None:
    prompts = stream(*(f"{i}+1:" for i in range(10)))
    epochs = [[prompts.next() for _ in range(10)] for _ in range(3)]
    assert all(sorted(p.problem.index for p in epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(p.problem.index for p in epoch) for epoch in epochs}) == 3
    assert [p.group_id for epoch in epochs for p in epoch] == list(range(30))


def test_the_order_is_the_seeds() -> None:
    questions = [f"{i}+1:" for i in range(10)]
    first, again, other = ([s.next() for _ in range(25)] for s in (stream(*questions, seed=x) for x in (1, 1, 2)))
    assert first == again != other


def test_returned_prompts_come_first_and_keep_their_group_id() -> None:
    prompts = stream("1+1:", "2+2:", "3+3:")
    first, second, third = prompts.next(), prompts.next(), prompts.next()
    prompts.put_back(third)
    prompts.put_back(first)
    assert [prompts.next(), prompts.next()] == [first, third]
    assert prompts.next().group_id == 3
    prompts.put_back(second)
    with pytest.raises(ValueError, match="put back twice"):
        prompts.put_back(second)
    with pytest.raises(ValueError, match="not from this stream"):
        prompts.put_back(Prompt(99, first.problem, first.text, first.token_ids))


@settings(deadline=None)
@given(st.lists(st.sampled_from(["next", "put_back", "resume"]), max_size=60), st.integers(0, 3))
def test_a_resumed_stream_goes_on_as_if_nothing_had_happened(actions: list[str], seed: int) -> None:
    questions = ["1+1:", "2+2:", "3+3+3+3+3:", "4+4:", "5+5:"]
    kept = stream(*questions, seed=seed, max_prompt_tokens=6)
    resumed = stream(*questions, seed=seed, max_prompt_tokens=6)
    out: list[Prompt] = []
    for action in actions:
        if action == "next":
            out.append(kept.next())
            assert resumed.next() == out[-1]
        elif action == "put_back" and out:
            prompt = out.pop(0)
            kept.put_back(prompt)
            resumed.put_back(prompt)
        else:
            state = json.loads(json.dumps(resumed.state_dict()))
            resumed = stream(*questions, seed=seed, max_prompt_tokens=6)
            resumed.load_state_dict(state)
    assert kept.state_dict() == resumed.state_dict()
    assert kept.left_out == resumed.left_out <= 1


def test_the_state_holds_what_was_put_back_and_nothing_that_is_out() -> None:
    prompts = stream("1+1:", "2+2:", "3+3:")
    given_out = [prompts.next() for _ in range(3)]
    prompts.put_back(given_out[2])
    prompts.put_back(given_out[1])
    state = prompts.state_dict()
    assert state["returned"] == [[1, given_out[1].problem.index], [2, given_out[2].problem.index]]
    assert prompts.next() == given_out[1], "taking the state changes nothing"
    resumed = stream("1+1:", "2+2:", "3+3:")
    resumed.load_state_dict(state)
    assert [resumed.next() for _ in range(2)] == given_out[1:] and resumed.next().group_id == 3
    resumed.put_back(given_out[0])
    assert resumed.next() == given_out[0]


def test_long_prompts_are_left_out_and_counted_once() -> None:
    prompts = stream("1+1:", "1+1+1:", "2+2:", max_prompt_tokens=4)
    drawn = Counter(prompts.next().problem.question for _ in range(20))
    assert drawn == {"1+1:": 10, "2+2:": 10}
    assert prompts.left_out == 1


def test_no_prompt_that_fits_is_told() -> None:
    with pytest.raises(
        ConfigError, match=r"every one of the 2 training prompts is longer than task.max_prompt_tokens=3"
    ):
        stream("1+1:", "2+2:", max_prompt_tokens=3).next()


def test_the_state_of_another_run_is_refused() -> None:
    state = stream("1+1:", "2+2:").state_dict()
    with pytest.raises(ConfigError, match="written with another seed"):
        stream("1+1:", "2+2:", seed=1).load_state_dict(state)
    with pytest.raises(ConfigError, match="with 2 training problems, this run has 1"):
        stream("1+1:").load_state_dict(state)


@pytest.mark.parametrize(
    ("chat_template", "close", "settings", "text", "tokens"),
    [
        (None, False, {}, "hello", ["<s>", "hello"]),
        (None, True, {}, "hello", ["<s>", "hello"]),
        (None, False, {"template": "<s> {question}"}, "<s> hello", ["<s>", "hello"]),
        (None, False, {"system_prompt": "be kind"}, "be kind\n\nhello", ["<s>", "be", "kind", "hello"]),
        (CHAT, True, {}, "<user>hello<assistant>", ["<user>", "hello", "<assistant>"]),
        ("<s>" + CHAT, False, {}, "<s><user>hello<assistant>", ["<s>", "<user>", "hello", "<assistant>"]),
        (CHAT, False, {"use_chat_template": False}, "hello", ["<s>", "hello"]),
        (
            CHAT,
            False,
            {"system_prompt": "be kind", "template": "{question} {question}"},
            "<system>be kind<user>hello hello<assistant>",
            ["<system>", "be", "kind", "<user>", "hello", "hello", "<assistant>"],
        ),
    ],
)
def test_rendering(
    chat_template: str | None, close: bool, settings: dict[str, object], text: str, tokens: list[str]
) -> None:
    tokenizer = word_tokenizer(chat_template, close=close)
    config = TaskConfig(**settings)  # type: ignore[arg-type]
    rendered, ids = render(Problem(0, "hello", "0"), tokenizer, config)
    assert rendered == text
    assert tokenizer.convert_ids_to_tokens(list(ids)) == tokens


def test_braces_in_a_question_are_left_alone() -> None:
    question = r"What is \frac{1}{2} of {question}?"
    text, _ = render(Problem(0, question, "0"), _lenient(), TaskConfig(template="Q: {question}\nA: \\boxed{}"))
    assert text == f"Q: {question}\nA: \\boxed{{}}"


def _lenient() -> PreTrainedTokenizerFast:
    tokenizer = word_tokenizer()
    tokenizer.unk_token = "</s>"
    return tokenizer


def test_mistakes_in_the_template_are_told() -> None:
    problem = Problem(0, "hello", "0")
    with pytest.raises(ConfigError, match=r"task.template is 'Q:'; expected it to contain \{question\}"):
        render(problem, word_tokenizer(), TaskConfig(template="Q:"))
    refusing = word_tokenizer("{{ raise_exception('no system role') }}")
    with pytest.raises(ConfigError, match=r"refuses the prompt \(no system role\); set task.system_prompt=null"):
        render(problem, refusing, TaskConfig())


def test_a_tokenizer_that_cannot_read_the_task_is_told() -> None:
    with pytest.raises(ConfigError, match=r"cannot read the task's prompts .*'Natalia sold"):
        render(Problem(0, "Natalia sold clips", "0"), CHARS, TaskConfig())
