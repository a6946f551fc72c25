"""The tokenizer that an OpenCUA checkpoint ships, read without its remote code and without tiktoken."""

from __future__ import annotations

import base64
import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

# Spec: the pattern by which Kimi's tokenizers split text before their byte pairs (moonshotai, tokenization_*.py).
_CASED = r"\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_TAIL = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
PATTERN = "|".join(
    [
        r"[\p{Han}]+",
        rf"[^\r\n\p{{L}}\p{{N}}]?[\p{{Lu}}\p{{Lt}}{_CASED}*[\p{{Ll}}{_CASED}+{_TAIL}",
        rf"[^\r\n\p{{L}}\p{{N}}]?[\p{{Lu}}\p{{Lt}}{_CASED}+[\p{{Ll}}{_CASED}*{_TAIL}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)
NAMED = ("bos_token", "eos_token", "pad_token", "unk_token")
MEDIA = ("<|media_begin|>", "<|media_content|>", "<|media_placeholder|>", "<|media_end|>")

# Where a checkpoint ships no template of its own; its turns are Kimi's.
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_' + message['role'] + '|>' + message['role'] + '<|im_middle|>' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] in ['image', 'image_url'] %}"
    "<|media_begin|>image<|media_content|><|media_placeholder|><|media_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_assistant|>assistant<|im_middle|>{% endif %}"
)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a folder: tokenizer.json, else tiktoken.model with the special tokens of tokenizer_config.json.

    Raises:
        FileNotFoundError: neither is there.
        ValueError: no ids of special tokens, an id that two tokens claim, or a damaged file.
    """
    folder = Path(folder)
    about = _json(folder / "tokenizer_config.json")
    named = {name: _content(about[name]) for name in NAMED if about.get(name)}
    named |= {"chat_template": _template(folder, about), "padding_side": "left"}
    if (folder / "tokenizer.json").is_file():
        return PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), **named)
    path = folder / "tiktoken.model"
    if not path.is_file():
        raise FileNotFoundError(f"{folder}: no tokenizer.json and no tiktoken.model")
    special = {int(i): _content(token) for i, token in (about.get("added_tokens_decoder") or {}).items()}
    if not special:
        raise ValueError(
            f"{folder}/tokenizer_config.json: no added_tokens_decoder, which has the ids of special tokens"
        )
    return PreTrainedTokenizerFast(tokenizer_object=_byte_pairs(read_ranks(path), special), **named)


def read_ranks(path: Path) -> dict[bytes, int]:
    """Ranks of a tiktoken file: a line for each token, its bytes in base64 and its rank.

    Raises:
        ValueError: a line of another form; it is named.
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: not a token in base64 and its rank") from error
    return ranks


def _byte_pairs(ranks: dict[bytes, int], special: dict[int, str]) -> Tokenizer:
    vocab, merges = vocabulary(ranks)
    taken = set(vocab.values())
    if twice := sorted(taken & set(special)):
        raise ValueError(f"ids {twice} belong to plain and to special tokens; the two files are not of one checkpoint")
    vocab |= {token: index for index, token in special.items()}
    tokenizer = Tokenizer(BPE(vocab, merges, fuse_unk=False, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for _, token in sorted(special.items())]
    )
    return tokenizer


def vocabulary(ranks: dict[bytes, int]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Tokens in byte-level BPE's alphabet with their ids, and its merges: each token from every pair of tokens it splits into."""
    letters = _letters()
    spelled = {token: "".join(letters[byte] for byte in token) for token in ranks}
    merges = []
    for token in sorted(ranks, key=ranks.__getitem__):
        pairs = [(token[:i], token[i:]) for i in range(1, len(token))]
        pairs = [(a, b) for a, b in pairs if a in ranks and b in ranks]
        merges += [
            (spelled[a], spelled[b]) for a, b in sorted(pairs, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
        ]
    return {spelled[token]: rank for token, rank in ranks.items()}, merges


def _letters() -> list[str]:
    """The letter that stands for each byte: itself where it is printable, else one from 256 on (GPT-2)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def _template(folder: Path, about: dict) -> str:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text()
    shipped = about.get("chat_template") or _json(folder / "chat_template.json").get("chat_template")
    return shipped or TEMPLATE


def _json(path: Path) -> dict:
    return json.loads(path.read_text()) if path.is_file() else {}


def _content(token) -> str:
    return token["content"] if isinstance(token, dict) else token
