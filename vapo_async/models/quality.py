"""What an embedded model can do: accuracy, and which habits its mistakes come from."""

import re
from collections import Counter
from dataclasses import asdict, dataclass

import numpy as np
import torch
from transformers import PreTrainedModel

from vapo_async.models.char_tokenizer import EOS, PAD, SYMBOLS
from vapo_async.models.pretrain import MAX_TERMS, MIN_TERMS
from vapo_async.models.traces import CLEAN, encode_traces, make_traces

_STEP = re.compile(r"(-?\d+)([+-])(\d+)=(-?\d+)")
_LONGEST_RESPONSE = 112


@dataclass(frozen=True)
class Quality:
    """Shares in [0, 1], over equally many chains of each length."""

    accuracy: float
    """Right final answers at T = 1."""
    greedy_accuracy: float
    accuracy_by_terms: dict[int, float]
    direct_share: float
    """Responses without a single step."""
    sign_error_share: float
    """``-`` steps worked as ``+``."""
    slip_share: float
    """Steps wrong in any other way."""
    response_tokens: float
    """Mean length at T = 1, the end token included."""

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


def measure(model: PreTrainedModel, problems_per_length: int = 64, samples: int = 4, seed: int = 1) -> Quality:
    """Samples ``samples`` answers at T = 1 and one greedy answer to each of a fixed set of random chains."""
    rng = np.random.default_rng(seed)
    right: dict[int, list[bool]] = {}
    greedy: list[bool] = []
    counts: Counter[str] = Counter()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for terms in range(MIN_TERMS, MAX_TERMS + 1):
            traces = make_traces(terms, problems_per_length, CLEAN, rng)
            answers = [response.rpartition("#")[2].removesuffix(EOS) for _, response in traces]
            questions = [question for question, _ in traces]
            sampled = respond(model, questions * samples, do_sample=True)
            right[terms] = [_answer(r) == a for r, a in zip(sampled, answers * samples, strict=True)]
            greedy += [_answer(r) == a for r, a in zip(respond(model, questions), answers, strict=True)]
            for response in sampled:
                _count(response, counts)
    responses = sum(map(len, right.values()))
    return Quality(
        accuracy=sum(map(sum, right.values())) / responses,
        greedy_accuracy=sum(greedy) / len(greedy),
        accuracy_by_terms={terms: sum(marks) / len(marks) for terms, marks in right.items()},
        direct_share=counts["direct"] / responses,
        sign_error_share=counts["sign_error"] / max(1, counts["minus"]),
        slip_share=counts["slip"] / max(1, counts["steps"]),
        response_tokens=counts["tokens"] / responses,
    )


@torch.no_grad()
def respond(model: PreTrainedModel, questions: list[str], *, do_sample: bool = False) -> list[str]:
    """Responses to equally long questions, the end token included where there is one."""
    prompts = encode_traces([(question, "") for question in questions]).input_ids
    generated = model.generate(  # type: ignore[operator]  # transformers types generate loosely
        prompts,
        attention_mask=torch.ones_like(prompts),
        do_sample=do_sample,
        temperature=1.0 if do_sample else None,
        top_k=0 if do_sample else None,
        top_p=1.0 if do_sample else None,
        max_new_tokens=_LONGEST_RESPONSE,
        pad_token_id=SYMBOLS.index(PAD),
        eos_token_id=SYMBOLS.index(EOS),
    )
    return ["".join(SYMBOLS[i] for i in row if SYMBOLS[i] != PAD) for row in generated[:, prompts.shape[1] :].tolist()]


def _answer(response: str) -> str:
    """What stands between the last ``#`` and the end token; "" for a response without one."""
    return response.rpartition("#")[2].removesuffix(EOS) if "#" in response and response.endswith(EOS) else ""


def _count(response: str, counts: Counter[str]) -> None:
    steps = _STEP.findall(response)
    counts["tokens"] += len(response)
    counts["direct"] += not steps
    for left, sign, term, result in steps:
        true = int(left) + int(term) * (1 if sign == "+" else -1)
        wrong = int(result) != true
        as_plus = wrong and sign == "-" and int(result) == int(left) + int(term)
        counts["steps"] += 1
        counts["minus"] += sign == "-" and int(term) != 0
        counts["sign_error"] += as_plus
        counts["slip"] += wrong and not as_plus
