"""From a prompt to context: words weighted by brackets, prompts longer than the text tower, clip skip.

The syntax is the one of AUTOMATIC1111's web UI (modules `prompt_parser`, `sd_hijack_clip` and `sd_emphasis` of version
1.8): `(cat)` weighs a word 1.1, `[cat]` 1 / 1.1, `(cat:1.3)` 1.3; brackets nest; `\\(` is a bracket that is meant; and
BREAK goes on in a new chunk. Prompt editing `[cat:dog:0.5]`, alternation `[cat|dog]` and AND have no meaning here:
their brackets weigh 1 / 1.1, and the rest is read as words.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from itertools import groupby, zip_longest
from operator import itemgetter
from typing import Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from . import checks
from .tokenizer import WORD_END, Tokenizer

PIECE = re.compile(
    r"""\\(?P<escaped>[()\[\]\\])
      | (?P<opens>[(\[])
      | :\s*(?P<weight>[+-]?(?:[.\d]+|nan|inf(?:inity)?))\s*\)
      | (?P<closes>[)\]])
      | [^\\()\[\]:]+ | .""",
    re.VERBOSE | re.DOTALL | re.IGNORECASE,
)
BREAK = "BREAK"
TAG = re.compile(r"<(?:lora|lyco|hypernet):[^<>]*>", re.IGNORECASE)
FACTOR = {"(": 1.1, "[": 1 / 1.1}
MAX_WEIGHT = 1e6  # far beyond sense, and safe in float32
BACKTRACK = 20

Token = tuple[int, float]  # an id and its weight


def parse(prompt: str) -> list[tuple[str, float | None]]:
    """The texts of a prompt and their weights: `"a (red:1.3) cat"` is `[("a ", 1), ("red", 1.3), (" cat", 1)]`.

    A word's weight is the product of the brackets round it. Neighbours of equal weight are one text. BREAK is a text of
    its own, without a weight. A bracket that closes nothing is text; one that is never closed lasts to the end,
    with a warning. Takes linear time. Raises ValueError where a weight is no number or beyond a million.
    """
    pieces = list(PIECE.finditer(prompt))
    opens, closes = _match_brackets(pieces)
    products = {"(": [1.0], "[": [1.0]}  # of the brackets that are open, one entry a depth
    parts: list[tuple[str, float | None]] = []
    for i, piece in enumerate(pieces):
        if i in opens:
            product = products[piece[0]]
            product.append(product[-1] * opens[i])
        elif i in closes:
            products[closes[i]].pop()
        else:
            weight = math.prod(product[-1] for product in products.values())
            if not abs(weight) <= MAX_WEIGHT:  # or not a number
                raise ValueError(
                    f"the weight of {piece[0][:40]!r} is {weight}; it must be a number from {-MAX_WEIGHT:g} to "
                    f"{MAX_WEIGHT:g}, as in (blue eyes:1.3)"
                )
            *ended, last = re.split(rf"\b{BREAK}\b\s*", piece["escaped"] or piece[0])
            for text in ended:
                parts += [(text.rstrip(), weight), (BREAK, None)]
            parts.append((last, weight))
    merged = [("".join(text for text, _ in same), weight) for weight, same in groupby(parts, key=itemgetter(1))]
    return merged or [("", 1.0)]


def _match_brackets(pieces: Sequence[re.Match]) -> tuple[dict[int, float], dict[int, str]]:
    """Which pieces open a bracket and what it multiplies by; which pieces close one, and its kind."""
    opens: dict[int, float] = {}
    closes: dict[int, str] = {}
    waiting: dict[str, list[int]] = {"(": [], "[": []}
    for i, piece in enumerate(pieces):
        kind = "[" if piece[0] == "]" else "("
        if piece["opens"]:
            waiting[piece[0]].append(i)
            opens[i] = FACTOR[piece[0]]
        elif (piece["closes"] or piece["weight"]) and waiting[kind]:
            opened = waiting[kind].pop()
            closes[i] = kind
            if piece["weight"]:
                opens[opened] = _number(piece["weight"])
    if unclosed := sum(map(len, waiting.values())):
        checks.warn(
            f"brackets never closed: {unclosed}; they last to the end of the prompt. Write \\( or \\[ for a bracket "
            "that is meant"
        )
    return opens, closes


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"the weight {text[:40]!r} is no number; write it as in (blue eyes:1.3)") from None


def chunks(tokenizer: Tokenizer, prompt: str, backtrack: int = BACKTRACK) -> list[list[Token]]:
    """A prompt's tokens, weighted, in chunks that the text tower has room for: at least one, and each may be empty.

    BREAK ends a chunk, inside brackets too (the web UI reads it as a word there). A chunk that is full ends at its last
    comma, if at most `backtrack` tokens are pushed on to the next chunk with it. Tags that load something elsewhere,
    such as `<lora:name:0.8>`, are left out, with a warning.
    """
    if tags := TAG.findall(prompt):
        checks.warn(f"{', '.join(tags)[:200]}: tags load nothing here and are left out of the prompt")
    sections: list[list[Token]] = [[]]
    for text, weight in parse(TAG.sub("", prompt)):
        if weight is None:
            sections.append([])
        else:
            sections[-1] += [(i, weight) for i in tokenizer.encode(text)]
    if len(sections) > 1 and not sections[-1]:  # nothing after the last BREAK
        sections.pop()
    comma = tokenizer.ids["," + WORD_END]
    return [chunk for section in sections for chunk in _cut(section, tokenizer.room, comma, backtrack)]


def _cut(tokens: list[Token], room: int, comma: int, backtrack: int) -> list[list[Token]]:
    cut, start = [], 0
    while (end := start + room) < len(tokens):
        if tokens[end][0] != comma:
            near = range(end - 1, max(start, end - backtrack) - 1, -1)
            end = next((i + 1 for i in near if tokens[i][0] == comma), end)
        cut.append(tokens[start:end])
        start = end
    return [*cut, tokens[start:]]


def rows(tokenizer: Tokenizer, batch: Sequence[list[Token]]) -> tuple[Int64[Tensor, "b n"], Float[Tensor, "b n"]]:
    """What the text tower reads of each chunk, start, tokens, end, padding, and the weight of every place."""
    ids, weights = [], []
    for chunk in batch:
        padding = tokenizer.room - len(chunk)
        ids.append([tokenizer.start, *(i for i, _ in chunk), tokenizer.end] + [tokenizer.pad] * padding)
        weights.append([1.0, *(weight for _, weight in chunk), 1.0] + [1.0] * padding)
    return torch.tensor(ids), torch.tensor(weights)


def weigh(context: Float[Tensor, "b n d"], weights: Float[Tensor, "b n"]) -> Float[Tensor, "b n d"]:
    """Multiplies every place by its weight, then each chunk by `mean before / mean after` (the web UI's "Original").

    The web UI takes both means over the whole batch; here each chunk has its own, so that a picture doesn't depend on
    those drawn with it. They are taken in float32 or better.
    """
    weighted = context * weights[..., None]
    growth = weighted.mean((1, 2)) / context.mean((1, 2), dtype=weighted.dtype)
    # Where the means of all places have one sign, this is an average of the weights. Where they cancel out it could be
    # anything, and the context would vanish or turn over: so it is kept between the least and the greatest weight, and
    # where the least is no more than 0, above half of the weights' mean size.
    growth = growth.clamp(torch.maximum(weights.amin(1), weights.abs().mean(1) / 2), weights.amax(1))
    return (weighted / growth[:, None, None]).to(context.dtype)


def encode(
    tower: nn.Module,
    tokenizer: Tokenizer,
    prompts: str | Sequence[str],
    long_prompts: Literal["cut", "chunk"] = "cut",
    skip_last: int | None = None,
) -> Float[Tensor, "b n d"]:
    """The context of each prompt: its chunks, each read by the text tower on its own and weighted, one after another.

    long_prompts: "cut" keeps the first chunk, filled to the last place, and warns of what is dropped; "chunk" keeps
    all, so that n is 77 times the chunks of the longest prompt, and fills shorter prompts up with empty chunks.
    skip_last: how many of the tower's last blocks to leave out; None: as its config says.

    Raises ValueError for prompts that are no text and for weights that are no numbers.
    """
    prompts = checks.prompts(prompts)
    if long_prompts not in ("cut", "chunk"):
        raise ValueError(f"long_prompts is {long_prompts!r}; it must be 'cut' or 'chunk'")
    split = chunks if long_prompts == "chunk" else _first_chunk
    known = {prompt: split(tokenizer, prompt) for prompt in dict.fromkeys(prompts)}
    device = next(tower.parameters()).device
    context = []
    for column in zip_longest(*(known[prompt] for prompt in prompts), fillvalue=[]):
        ids, weights = (tensor.to(device) for tensor in rows(tokenizer, column))
        z = tower(ids, skip_last)
        context.append(z if (weights == 1).all() else weigh(z, weights))
    return torch.cat(context, dim=1)


def _first_chunk(tokenizer: Tokenizer, prompt: str) -> list[list[Token]]:
    first, *others = chunks(tokenizer, prompt, backtrack=0)
    dropped = [i for chunk in others for i, _ in chunk]
    if dropped:
        checks.warn(
            f"kept {len(first)} of {len(first) + len(dropped)} tokens, dropped {tokenizer.decode(dropped)[:200]!r}; "
            'long_prompts="chunk" keeps all'
        )
    return [first]
