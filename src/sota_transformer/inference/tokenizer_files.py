"""GPT-2's tokenizer and our pad token in the file formats of other programs.

Hugging Face and GGUF write each byte of a token as one printable character. Both need the merges
in rank order, so they are read from the package's own table.
"""

import json
from functools import cache
from importlib.resources import as_file, files
from typing import Any

import numpy as np

from sota_transformer.data.tokenizer import EOT, Tokenizer

EOT_TEXT, PAD_TEXT = "<|endoftext|>", "<|pad|>"


def _characters() -> list[str]:
    """One printable character per byte: itself if printable in Latin-1, else from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


@cache
def vocabulary() -> list[str]:
    """All 50,258 tokens by id, with each byte as a printable character."""
    tokenizer, characters = Tokenizer(), _characters()
    tokens = (tokenizer.decode_bytes([token]) for token in range(EOT))
    return [*("".join(characters[byte] for byte in token) for token in tokens), EOT_TEXT, PAD_TEXT]


@cache
def merges() -> list[tuple[str, str]]:
    """The 50,000 merges, in rank order."""
    tokens = vocabulary()
    packaged = as_file(files("sota_transformer.data") / "gpt2.npz")
    with packaged as path, np.load(path, allow_pickle=False) as table:
        left, right = table["left"].tolist(), table["right"].tolist()
    return [(tokens[a], tokens[b]) for a, b in zip(left, right, strict=True)]


def huggingface_files(context: int) -> dict[str, bytes]:
    """File name -> content of a tokenizer that AutoTokenizer loads, for `context` tokens.

    A special token spelled out in a text becomes its id, unlike in our training data, because
    fine-tuning programs append the end-of-text token and chat markers to a text as strings.
    """
    tokens, pairs = vocabulary(), merges()
    special = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    special["special"] = True
    added = {tokens.index(text): {"content": text} | special for text in (EOT_TEXT, PAD_TEXT)}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
    byte_level["use_regex"] = True
    vocab = {text: token for token, text in enumerate(tokens[:-1])}
    whole = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": token} | entry for token, entry in added.items()],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": byte_level,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": [list(pair) for pair in pairs],
        },
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context,
        # transformers 4 would add token_type_ids, which `generate` refuses.
        "model_input_names": ["input_ids", "attention_mask"],
        "bos_token": EOT_TEXT,
        "eos_token": EOT_TEXT,
        "unk_token": EOT_TEXT,
        "pad_token": PAD_TEXT,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "added_tokens_decoder": added,
    }
    lines = ["#version: 0.2", *(" ".join(pair) for pair in pairs), ""]
    return {
        "tokenizer.json": _json(whole),
        "tokenizer_config.json": _json(settings),
        "vocab.json": _json(vocab),
        "merges.txt": "\n".join(lines).encode(),
    }


def _json(value: Any) -> bytes:
    return (json.dumps(value, ensure_ascii=False, indent=1) + "\n").encode()
