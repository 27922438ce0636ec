"""The embedded model's tokenizer: one token per character of a scratchpad trace."""

from typing import Final

from tokenizers import Regex, Tokenizer, decoders
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast

PAD: Final = "<pad>"
EOS: Final = "$"
UNK: Final = "<unk>"
SYMBOLS: Final = (PAD, EOS, UNK, *"0123456789+-=;:#")
"""Every token; its place is its id."""


def build_char_tokenizer() -> PreTrainedTokenizerFast:
    """An ordinary fast tokenizer: ``$`` ends a response, no token is added to what is encoded."""
    backend = Tokenizer(WordLevel({symbol: i for i, symbol in enumerate(SYMBOLS)}, unk_token=UNK))
    backend.pre_tokenizer = Split(Regex("."), behavior="isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNK,
        clean_up_tokenization_spaces=False,
        model_max_length=256,
    )
