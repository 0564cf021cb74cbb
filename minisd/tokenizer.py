"""Text to numbers: byte-pair encoding as CLIP does it, trained here or read from CLIP's own vocabulary.

A word is spelled in bytes, its last byte marked as the end of a word. Neighbours are joined, the pair learnt first
going first, until no learnt pair is left: "dreambeach" becomes `dream` `beach</w>`, "dream beach" `dream</w>`
`beach</w>`. Since every byte is a token, nothing is unknown. Sennrich et al. 2016, "Neural Machine Translation of Rare
Words with Subword Units"; on bytes: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners".
"""

from __future__ import annotations

import gzip
import heapq
import html
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Literal

import ftfy
import regex
import torch
from jaxtyping import Int64
from torch import Tensor

Pair = tuple[str, str]

START, END = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"
WORD = regex.compile(
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+", regex.IGNORECASE
)


def byte_symbols() -> list[str]:
    """One printable character for each of the 256 bytes: itself where Latin-1 has one, else the next from U+0100 on."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    spare = iter(range(256, 512))
    return [chr(byte if byte in printable else next(spare)) for byte in range(256)]


BYTES = byte_symbols()
BYTE_OF = {symbol: byte for byte, symbol in enumerate(BYTES)}


def clean(text: str) -> str:
    """Mends mis-decoded letters, curly quotes and HTML entities, makes any white space one blank, lowers the case."""
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return regex.sub(r"\s+", " ", text).strip().lower()


def words(text: str) -> list[str]:
    """Splits text into words, digits and runs of other marks, each spelled in byte symbols."""
    return ["".join(BYTES[byte] for byte in word.encode()) for word in WORD.findall(clean(text))]


def spell(word: str) -> tuple[str, ...]:
    """The symbols of a word, the last one marked as its end: `cat` is `c a t</w>`."""
    return (*word[:-1], word[-1] + WORD_END)


def join(parts: Sequence[str], pair: Pair) -> tuple[str, ...]:
    """Joins every occurrence of a pair, from left to right."""
    joined: list[str] = []
    for part in parts:
        if joined and (joined[-1], part) == pair:
            joined[-1] += part
        else:
            joined.append(part)
    return tuple(joined)


class Tokenizer:
    """Byte-pair encoding with CLIP's layout of ids: 256 bytes, 256 bytes that end a word, the merges, start, end.

    `tokenizer(texts)` gives the rows a text encoder reads: start, at most `room` tokens, end, padding. What did not fit
    is `tokenizer.decode(tokenizer.encode(text)[tokenizer.room:])`.

    merges: pairs of symbols, the first learnt first; no two may join to the same token.
    pad: what fills a row: "end", the end mark again (Stable Diffusion 1), or "zero", token 0 (Stable Diffusion 2).
    places: the length of a row; `room` is two less.
    """

    def __init__(self, merges: Iterable[Pair], *, pad: Literal["end", "zero"] = "end", places: int = 77):
        self.merges = list(merges)
        symbols = sorted(BYTES)
        self.tokens = [*symbols, *(s + WORD_END for s in symbols), *("".join(m) for m in self.merges), START, END]
        self.ids = {token: i for i, token in enumerate(self.tokens)}
        assert len(self.ids) == len(self.tokens), "two merges join to the same token"
        if pad not in ("end", "zero"):
            raise ValueError(f"pad is {pad!r}; it is 'end' (Stable Diffusion 1) or 'zero' (Stable Diffusion 2)")
        self.ranks = {pair: rank for rank, pair in enumerate(self.merges)}
        self.start, self.end = self.ids[START], self.ids[END]
        self.pad = self.end if pad == "end" else 0
        self.places, self.room = places, places - 2
        self._known: dict[str, tuple[int, ...]] = {START: (self.start,), END: (self.end,)}

    def __len__(self) -> int:
        return len(self.tokens)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, **layout) -> Tokenizer:
        """Learns merges from texts: the most frequent pair of neighbours becomes a token, again and again.

        vocab_size: tokens in all, at least 514 (bytes, bytes that end a word, start, end); fewer come out where the
        texts run out of pairs. Words are counted first, so that time goes with different words, not with texts.
        """
        merges: list[Pair] = []
        wanted = vocab_size - len(cls([]))
        if wanted < 0:
            raise ValueError(f"vocab_size is {vocab_size}; bytes and marks alone take {len(cls([]))} tokens")
        counts = Counter(word for text in texts for word in words(text))
        spelled = {word: spell(word) for word in counts if word not in (START, END)}
        known: set[str] = set()
        while len(merges) < wanted:
            pairs: Counter[Pair] = Counter()
            for word, parts in spelled.items():
                for pair in pairwise(parts):
                    pairs[pair] += counts[word]
            fresh = [pair for pair in pairs if "".join(pair) not in known]  # a second way to a token would waste an id
            if not fresh:
                break
            best = min(fresh, key=lambda pair: (-pairs[pair], pair))  # a tie goes by the alphabet
            merges.append(best)
            known.add("".join(best))
            spelled = {word: join(parts, best) for word, parts in spelled.items()}
        return cls(merges, **layout)

    @classmethod
    def load(cls, path: str | Path, vocab_size: int = 49_408, **layout) -> Tokenizer:
        """Reads merges from a text file, gzipped or not: a header, then one pair a line, as CLIP publishes them.

        At most vocab_size tokens are made: CLIP's file goes on after the 48,894 merges that CLIP uses.
        """
        path = Path(path)
        try:
            raw = path.read_bytes()
            _, *lines = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode().splitlines()
        except (ValueError, EOFError, gzip.BadGzipFile) as error:
            raise ValueError(f"{path} is not a vocabulary of merges: {error}") from error
        bare = cls([])
        known, merges = set(bare.tokens), []
        for number, line in enumerate(lines[: vocab_size - len(bare)], start=2):
            merge = tuple(line.split())
            if len(merge) != 2 or not known.issuperset(merge):
                raise ValueError(f"{path}, line {number}: expected a merge of two known symbols, found {line[:80]!r}")
            known.add("".join(merge))
            merges.append(merge)
        return cls(merges, **layout)

    def save(self, path: str | Path) -> None:
        """Writes the merges as text, one pair a line after a header."""
        lines = ["#version: 0.2, byte-pair merges of minisd", *(" ".join(merge) for merge in self.merges)]
        Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without start and end and however many they are."""
        if not isinstance(text, str):
            raise ValueError(f"a prompt is text, not {type(text).__name__}: {text!r}")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"the prompt holds half a character, {text[error.start]!r}, at position {error.start}; remove it"
            ) from None
        return [i for word in words(text) for i in self._encode_word(word)]

    def _encode_word(self, word: str) -> tuple[int, ...]:
        if word not in self._known:
            self._known[word] = tuple(self.ids[part] for part in self._merge(word))
        return self._known[word]

    def _merge(self, word: str) -> list[str]:
        """Joins the pair learnt first until none is left, in n log n: a heap of pairs over a linked list of parts."""
        parts = list(spell(word))
        size = len(parts)
        before, after = list(range(-1, size - 1)), list(range(1, size + 1))
        heap: list[tuple[int, int]] = []

        def rank(i: int) -> int | None:
            return self.ranks.get((parts[i], parts[after[i]])) if i >= 0 and after[i] < size else None

        def offer(i: int) -> None:
            if (found := rank(i)) is not None:
                heapq.heappush(heap, (found, i))

        for i in range(size):
            offer(i)
        while heap:
            learnt, i = heapq.heappop(heap)
            if rank(i) != learnt:  # the left or the right half has been joined to another since
                continue
            gone = after[i]
            parts[i] += parts[gone]
            parts[gone] = ""
            after[i] = after[gone]
            if after[i] < size:
                before[after[i]] = i
            offer(before[i])
            offer(i)
        return [part for part in parts if part]

    def decode(self, ids: Iterable[int]) -> str:
        """The cleaned text of ids, but for its blanks: one now stands after every word, digit and run of marks."""
        symbols = "".join(self.tokens[i] for i in ids).replace(WORD_END, " ")
        return bytes(BYTE_OF.get(symbol, ord(" ")) for symbol in symbols).decode(errors="replace").strip()

    def __call__(self, texts: str | Sequence[str]) -> Int64[Tensor, "b places"]:
        """Rows of ids, each start, at most `room` tokens of a text, end, padding."""
        texts = [texts] if isinstance(texts, str) else texts
        rows = []
        for text in texts:
            row = [self.start, *self.encode(text)[: self.room], self.end]
            rows.append(row + [self.pad] * (self.places - len(row)))
        return torch.tensor(rows, dtype=torch.int64).reshape(len(rows), self.places)
