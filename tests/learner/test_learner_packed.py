"""Packed rows against padded ones: hidden states, log-probs, values, gradients; and no way from one row to another."""

import copy
from pathlib import Path

import pytest
import torch
from conftest import tiny_policy
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    Lfm2Config,
    Lfm2ForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)

from vapo_async.learner.models import Critic, policy_log_probs
from vapo_async.learner.packed import (
    PACKED_ATTENTION,
    enable_packing,
    pack,
    packed_attention,
    packed_hidden,
    packed_hidden_before_masked,
    unpack,
)
from vapo_async.objectives.logprobs import token_log_probs

VOCAB = 18
LENGTHS = [9, 2, 14, 9, 1, 5]
families = pytest.mark.parametrize("family", ["qwen2", "llama"])  # llama: two query heads to one of keys
dtypes = pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])


def packing_policy(family: str, dtype: torch.dtype) -> PreTrainedModel:
    policy = tiny_policy(VOCAB, family=family).to(dtype)
    assert enable_packing(policy)
    return policy


def rows(lengths: list[int] = LENGTHS, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Right-padded tokens [n, T] and a mask of about two thirds of them, never of a first one."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(lengths), max(lengths))
    tokens = torch.randint(1, VOCAB, shape, generator=generator)
    inside = torch.arange(shape[1]) < torch.tensor(lengths)[:, None]
    mask = (torch.rand(shape, generator=generator) < 0.67) & inside
    mask[:, 0] = False
    return tokens * inside, mask


def padded_hidden_before_masked(backbone: torch.nn.Module, tokens: Tensor, mask: Tensor) -> Tensor:
    return backbone(input_ids=tokens, use_cache=False).last_hidden_state[:, :-1][mask[:, 1:]]


def gradients(module: torch.nn.Module, loss: Tensor) -> dict[str, Tensor]:
    module.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def assert_close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    assert found.shape == expected.shape
    found, expected = found.detach(), expected.detach()
    gap, scale = float((found - expected).abs().max()), max(1.0, float(expected.abs().max()))
    assert gap <= tolerance * scale


def test_pack_by_hand() -> None:
    values = torch.tensor([[1, 2, 0], [3, 0, 0], [4, 5, 6]])
    packed = pack(values, [2, 1, 3])
    assert packed.tolist() == [[1, 2, 3, 4, 5, 6]]
    assert torch.equal(unpack(packed, [2, 1, 3], 3), values)
    assert unpack(packed, [2, 1, 3], 5)[0].tolist() == [1, 2, 0, 0, 0]
    wide = torch.arange(12.0).view(2, 3, 2)
    assert pack(wide, [1, 2]).tolist() == [[[0, 1], [6, 7], [8, 9]]]
    assert unpack(pack(wide, [1, 2]), [1, 2], 3).tolist() == [[[0, 1], [0, 0], [0, 0]], [[6, 7], [8, 9], [0, 0]]]


def test_gradients_go_through_pack_and_unpack() -> None:
    values = torch.ones(2, 3, dtype=torch.float64, requires_grad=True)
    weights = torch.tensor([[1.0, 2.0, 4.0, 8.0], [16.0, 32.0, 64.0, 128.0]], dtype=torch.float64)
    (unpack(pack(values, [3, 1]), [3, 1], 4) * weights).sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == [[1, 2, 4], [16, 0, 0]]


@pytest.mark.parametrize("lengths", [[2, 1], [2, 1, 0], [2, 1, 4]])
def test_lengths_that_do_not_fit(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match="expected 3 lengths between 1 and 3, got"):
        pack(torch.zeros(3, 3), lengths)


@families
@dtypes
def test_hidden_states_are_those_of_padded_rows(family: str, dtype: torch.dtype, tolerance: float) -> None:
    policy = packing_policy(family, dtype)
    tokens, _ = rows()
    expected = tiny_policy(VOCAB, family=family).to(dtype).get_decoder()(input_ids=tokens).last_hidden_state
    assert_close(packed_hidden(policy.get_decoder(), tokens, LENGTHS), pack(expected, LENGTHS), tolerance)


@families
@dtypes
def test_log_probs_and_gradients_are_those_of_padded_rows(family: str, dtype: torch.dtype, tolerance: float) -> None:
    policy, plain = packing_policy(family, dtype), tiny_policy(VOCAB, family=family).to(dtype)
    tokens, mask = rows()
    expected, _ = policy_log_probs(plain, tokens, mask, temperature=0.7, chunk_tokens=64)
    hidden = packed_hidden_before_masked(policy.get_decoder(), tokens, mask, LENGTHS)
    found, _ = token_log_probs(hidden, policy.get_output_embeddings().weight, tokens[mask], temperature=0.7)
    assert_close(found, expected[mask], tolerance)
    weights = torch.linspace(-1, 1, int(mask.sum()), dtype=dtype)
    theirs = gradients(plain, (expected[mask] * weights).sum())
    ours = gradients(policy, (found * weights).sum())
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        assert_close(gradient, theirs[name], tolerance * 10)


@families
@dtypes
def test_values_are_those_of_padded_rows(family: str, dtype: torch.dtype, tolerance: float) -> None:
    critic = Critic.from_policy(tiny_policy(VOCAB, family=family).to(dtype)).to(dtype)
    torch.nn.init.normal_(critic.value_head.weight)
    plain = copy.deepcopy(critic)
    assert enable_packing(critic.backbone)  # type: ignore[arg-type]
    tokens, mask = rows()
    hidden = packed_hidden_before_masked(critic.backbone, tokens, mask, LENGTHS)
    assert_close(hidden, padded_hidden_before_masked(plain.backbone, tokens, mask), tolerance)
    found, expected = (
        critic.value_head(hidden),
        plain.value_head(padded_hidden_before_masked(plain.backbone, tokens, mask)),
    )
    theirs = gradients(plain, expected.square().sum())
    ours = gradients(critic, found.square().sum())
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        assert_close(gradient, theirs[name], tolerance * 10)


@families
def test_no_row_sees_another(family: str) -> None:
    backbone = packing_policy(family, torch.float32).get_decoder()
    tokens, _ = rows()
    before = packed_hidden(backbone, tokens, LENGTHS)[0].split(LENGTHS)
    for changed in range(len(LENGTHS)):
        others = tokens.clone()
        others[changed, 0] = others[changed, 0] % (VOCAB - 1) + 1
        after = packed_hidden(backbone, others, LENGTHS)[0].split(LENGTHS)
        assert [torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [
            row != changed for row in range(len(LENGTHS))
        ]
        assert (before[changed] != after[changed]).any(1).all()  # its own later tokens do see it


def test_no_gradient_goes_from_one_row_to_another() -> None:
    policy = packing_policy("qwen2", torch.float64)
    tokens, _ = rows()
    embedding = policy.get_input_embeddings()
    seen: list[Tensor] = []
    embedding.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    hidden = packed_hidden(policy.get_decoder(), tokens, LENGTHS)[0].split(LENGTHS)
    (gradient,) = torch.autograd.grad(hidden[2].square().sum(), seen)
    touched = [bool(part.any()) for part in gradient[0].split(LENGTHS)]
    assert touched == [False, False, True, False, False, False]


def test_recomputed_layers_are_packed_too() -> None:
    policy = packing_policy("qwen2", torch.float64)
    tokens, mask = rows()
    found = []
    for recompute in (False, True):
        if recompute:
            policy.gradient_checkpointing_enable({"use_reentrant": False})
            policy.train()  # without it Transformers recomputes nothing
        hidden = packed_hidden_before_masked(policy.get_decoder(), tokens, mask, LENGTHS)
        found.append(gradients(policy, hidden.square().sum()))
    for name, gradient in found[0].items():
        assert_close(found[1][name], gradient, 1e-12)


def test_rows_that_are_not_packed_are_computed_as_before() -> None:
    policy, plain = packing_policy("llama", torch.float64), tiny_policy(VOCAB, family="llama").to(torch.float64)
    tokens, _ = rows()
    assert torch.equal(policy(input_ids=tokens).logits, plain(input_ids=tokens).logits)
    left = torch.arange(tokens.shape[1]) >= torch.tensor([5, 0, 1, 2, 3, 4])[:, None]  # padding on the left
    with_mask = {"input_ids": tokens, "attention_mask": left}
    assert torch.equal(policy(**with_mask).logits[left], plain(**with_mask).logits[left])
    prompt = tokens[:2, :4]
    asked = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert torch.equal(policy.generate(prompt, **asked), plain.generate(prompt, **asked))


def test_a_first_token_cannot_be_predicted() -> None:
    policy = packing_policy("qwen2", torch.float32)
    tokens, mask = rows()
    mask[3, 0] = True
    with pytest.raises(ValueError, match=r"mask\[:, 0\] must be False"):
        packed_hidden_before_masked(policy.get_decoder(), tokens, mask, LENGTHS)


def test_attention_that_is_not_packed_is_refused() -> None:
    states = torch.zeros(1, 2, 3, 8)
    ends = torch.tensor([0, 2, 3], dtype=torch.int32)
    with pytest.raises(ValueError, match="no attention with sliding_window, softcap: use padded rows"):
        packed_attention(
            torch.nn.Module(),
            *(states,) * 3,
            None,
            cu_seq_lens_q=ends,
            max_length_q=2,
            sliding_window=4,
            softcap=30.0,
            s_aux=None,
        )


def test_scores_are_scaled_as_the_model_asks() -> None:
    query, key, value = torch.randn(3, 1, 2, 5, 8, generator=torch.Generator().manual_seed(0)).unbind()
    ends = torch.tensor([0, 2, 5], dtype=torch.int32)
    found, _ = packed_attention(
        torch.nn.Module(), query, key, value, None, scaling=0.1, cu_seq_lens_q=ends, max_length_q=3
    )
    scores = (query @ key.mT * 0.1)[..., 2:, 2:].masked_fill(~torch.ones(3, 3).tril().bool(), -torch.inf)
    expected = (scores.softmax(-1) @ value[..., 2:, :]).transpose(1, 2)
    assert_close(found[:, 2:], expected, 1e-6)


SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 256,
    "attn_implementation": "sdpa",
}


@pytest.mark.parametrize(
    ("policy", "works"),
    [
        (lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=None)), True),
        (lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=4)), False),
        (lambda: Lfm2ForCausalLM(Lfm2Config(**SIZES, layer_types=["conv", "full_attention"])), False),
        (lambda: GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_embd=64, n_layer=2, n_head=2, eos_token_id=1)), True),
    ],
    ids=["full attention", "sliding window", "convolution", "learned positions"],
)
def test_models_that_cannot_be_packed_are_left_as_they_were(policy: object, works: bool) -> None:
    torch.manual_seed(0)
    model = policy().eval()  # type: ignore[operator]
    tokens, _ = rows()
    before = model(input_ids=tokens).logits
    assert enable_packing(model) is works
    assert (model.config._attn_implementation == PACKED_ATTENTION) is works
    assert torch.equal(model(input_ids=tokens).logits, before)


def test_a_model_that_counts_positions_itself_is_left_as_it_was() -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_embd=64, n_layer=2, n_head=2, eos_token_id=1)).eval()
    torch.nn.init.normal_(model.transformer.wpe.weight)

    def drop(_module: object, args: tuple[object, ...], kwargs: dict[str, object]) -> tuple[object, object]:
        return args, {key: value for key, value in kwargs.items() if key != "position_ids"}

    model.transformer.register_forward_pre_hook(drop, with_kwargs=True)
    before = model.config._attn_implementation
    assert not enable_packing(model)
    assert model.config._attn_implementation == before


def test_the_attention_is_not_saved_with_the_model(tmp_path: Path) -> None:
    policy = packing_policy("qwen2", torch.float32)
    policy.save_pretrained(tmp_path)
    assert PACKED_ATTENTION not in (tmp_path / "config.json").read_text()
    assert copy.deepcopy(policy).config._attn_implementation == PACKED_ATTENTION  # but goes with a copy


@pytest.mark.gpu
@families
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.05)])
def test_on_a_gpu(family: str, dtype: torch.dtype, tolerance: float) -> None:
    policy = tiny_policy(VOCAB, family=family).to("cuda", dtype)
    assert enable_packing(policy)
    tokens, mask = (tensor.cuda() for tensor in rows())
    expected = padded_hidden_before_masked(tiny_policy(VOCAB, family=family).cuda().get_decoder(), tokens, mask)
    found = packed_hidden_before_masked(policy.get_decoder(), tokens, mask, LENGTHS)
    assert_close(found.float(), expected, tolerance)
    found.float().square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in policy.get_decoder().parameters())
