"""Small tokenizers that split the same text in different ways."""

from functools import cache

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from .places import SHARED, shared_path

CORPUS = [
    "Tom has 12 apples and 7 pears.",
    "Question: How many are there in all?\nAnswer: 12 + 7 = 19.",
    "naïve 你好 😀",
] * 8

TEXTS = {
    "ascii": "Question: Tom has 12 apples.\n\n  How many\tare left?  ",
    "emoji": "😀 two 👩‍👩‍👧 faces 😀😀.",
    "chinese": "你好，世界。今天 12 个苹果 are left.",
    "accents": "naïve café déjà vu ŷŷ",
    "marks": "e\u0301te\u0301 and 각",
    "mixed": "😀你好\n\n\nx 1234567890 ##▁ <0x41> end",
}

TURNS = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""A chat template as ChatML has it."""

HEADERS = (
    "{{ bos_token }}{% for message in messages %}<|start|>{{ message.role }}<|header|>\n\n{{ message.content | trim }}"
    "<|stop|>{% endfor %}{% if add_generation_prompt %}<|start|>assistant<|header|>\n\n{% endif %}"
)
"""One with headers, as Llama 3 has it."""


@cache
def byte_level(merges: int = 60, trim: bool = False, template: str | None = TURNS) -> PreTrainedTokenizerFast:
    """A byte-level BPE with the control tokens of `TURNS`."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.post_processor = processors.ByteLevel(trim_offsets=trim)
    controls = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    size = len(controls) + len(alphabet) + merges
    made.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=size, special_tokens=controls, initial_alphabet=alphabet)
    )
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|endoftext|>", chat_template=template)


@cache
def sentence_pieces(template: str | None = HEADERS) -> PreTrainedTokenizerFast:
    """A BPE as Llama 2 has it: a space before the text, bytes for what it does not know, `<s>` in front."""
    bytes_of = [f"<0x{number:02X}>" for number in range(256)]
    pieces = ["<unk>", "<s>", "</s>", *bytes_of, "▁", *"abcdefghijklmnopqrstuvwxyzQAT.,:?", "ap", "an", "▁a", "on"]
    merges = [("a", "p"), ("a", "n"), ("▁", "a"), ("o", "n")]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    made = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    controls = [AddedToken(name, special=True) for name in ("<|start|>", "<|header|>", "<|stop|>")]
    made.add_special_tokens([AddedToken(name, special=True) for name in ("<unk>", "<s>", "</s>")])
    made.add_special_tokens(controls)
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=template
    )


@cache
def real(name: str) -> PreTrainedTokenizerFast:
    """`qwen`, `smollm2` or `stories`: the tokenizer of a real model; the test is skipped where it is not here."""
    if name == "smollm2":
        folder = SHARED.parent / "smollm2"
        if not folder.exists():
            pytest.skip(f"{folder} is not here")
        return AutoTokenizer.from_pretrained(folder)
    return AutoTokenizer.from_pretrained(
        shared_path("models", {"qwen": "qwen2.5-tokenizer", "stories": "stories260k"}[name])
    )


MADE = {
    "bytes": byte_level,
    "few merges": lambda: byte_level(5),
    "trimmed": lambda: byte_level(40, trim=True),
    "pieces": sentence_pieces,
}

_OF_SIGN = {sign: number for number, sign in bytes_to_unicode().items()}


def bytes_of_tokens(tokenizer: PreTrainedTokenizerFast, text: str) -> list[tuple[int, set[int]]]:
    """The tokens of a text, each with the numbers of the bytes that it stands for, by its own letters alone."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces = tokenizer.convert_ids_to_tokens(ids)
    pre_tokenizer = tokenizer.backend_tokenizer.pre_tokenizer
    if pre_tokenizer is not None:
        parts = [bytes(_OF_SIGN[sign] for sign in piece) for piece in pieces]
    else:
        parts = [
            bytes([int(piece[3:5], 16)]) if len(piece) == 6 and piece[:3] == "<0x" else piece.encode()
            for piece in pieces
        ]
        parts = [part.replace("▁".encode(), b" ") for part in parts]
    whole = b"".join(parts)
    skipped = whole.find(text.encode()) if pre_tokenizer is None else 0
    assert whole[skipped:] == text.encode()
    found, place = [], -skipped
    for token, part in zip(ids, parts, strict=True):
        found.append((token, {number for number in range(place, place + len(part)) if number >= 0}))
        place += len(part)
    return found
