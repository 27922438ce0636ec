"""A policy that is sometimes right: what dynamic sampling needs to have anything to keep and anything to refuse."""

import json
from pathlib import Path

import torch
from conftest import tiny_overrides
from transformers import PreTrainedTokenizerBase, Qwen2Config, Qwen2ForCausalLM


def make_guessing_policy(folder: Path, tokenizer: PreTrainedTokenizerBase) -> Path:
    """It says ``0``, ``1`` or ends, a third each, whatever the prompt: "1" is right about every sixth time.

    Every hidden state is the same and the head has three rows that are not zero.
    """
    torch.manual_seed(0)
    policy = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            intermediate_size=32,
            max_position_embeddings=256,
            tie_word_embeddings=False,
        )
    ).eval()
    with torch.no_grad():
        policy.get_input_embeddings().weight.fill_(1.0)
        policy.model.layers[0].self_attn.o_proj.weight.zero_()
        policy.model.layers[0].mlp.down_proj.weight.zero_()
        policy.lm_head.weight.zero_()
        for token in ("0", "1", tokenizer.eos_token):
            policy.lm_head.weight[tokenizer.convert_tokens_to_ids(token)] = 0.3
    policy.generation_config.eos_token_id = tokenizer.eos_token_id
    policy.generation_config.pad_token_id = tokenizer.pad_token_id
    policy.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def guessing_overrides(folder: Path, tmp_path: Path) -> list[str]:
    """The tiny run on problems that all have the answer 1."""
    problems = tmp_path / "problems.jsonl"
    problems.write_text("".join(json.dumps({"q": f"{i}-{i - 1}=", "a": "1"}) + "\n" for i in range(2, 80)))
    task = [
        "task=math",
        f"task.train={problems}",
        "task.heldout=null",
        "task.question_column=q",
        "task.answer_column=a",
        "task.answer_style=last_line",
        'task.template="{question}"',
        "task.max_prompt_tokens=32",
    ]
    return [*tiny_overrides(folder, tmp_path), *task]
