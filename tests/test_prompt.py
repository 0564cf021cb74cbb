"""Prompts against the web UI's own parse and chunks, weights and clip skip against their definitions and a peer."""

import json
import math
import re
import time
import warnings
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peers import randomise, text_peer
from tiny import tiny

from minisd.clip import TextTower
from minisd.config import TextConfig
from minisd.prompt import MAX_WEIGHT, chunks, encode, parse, rows, weigh
from minisd.tokenizer import Tokenizer

ROOT = Path(__file__).parents[1]
GOLDEN = json.loads((ROOT / "tests/fixtures/a1111_prompt_parsing.json").read_text(encoding="utf-8"))
CLIP = Tokenizer.load(ROOT / "assets/vocab/bpe_simple_vocab_16e6.txt.gz")
LETTERS = Tokenizer([])  # a token a letter
TOWER = randomise(TextTower(TextConfig(vocabulary=514, width=16, layers=3, heads=2)))

unclosed = pytest.mark.filterwarnings("ignore:brackets never closed")


def context(prompts, **settings):
    return encode(TOWER, LETTERS, prompts, **settings)


# Parsing


@unclosed
@pytest.mark.parametrize("case", GOLDEN["attention"], ids=[case["text"][:24] for case in GOLDEN["attention"]])
def test_texts_and_weights_are_those_of_the_web_ui(case):
    parsed = [(text, None if text == "BREAK" else weight) for text, weight in case["parsed"]]  # it has -1 there
    assert parse(case["text"]) == parsed


def plain_parse(prompt):
    """The weight of every letter by definition: a bracket that closes multiplies all since it was opened. Quadratic."""
    letters, waiting, i = [], {"(": [], "[": []}, 0

    def multiply(kind, factor):
        for letter in letters[waiting[kind].pop() :]:
            letter[1] *= factor

    while i < len(prompt):
        mark, number = prompt[i], re.match(r":\s*([+-]?[.\d]+)\s*\)", prompt[i:])
        if mark == "\\" and prompt[i + 1 : i + 2] in tuple("()[]\\"):
            letters.append([prompt[i + 1], 1.0])
            i += 1
        elif mark in waiting:
            waiting[mark].append(len(letters))
        elif number and waiting["("]:
            multiply("(", float(number[1]))
            i += number.end() - 1
        elif mark == ")" and waiting["("]:
            multiply("(", 1.1)
        elif mark == "]" and waiting["["]:
            multiply("[", 1 / 1.1)
        else:
            letters.append([mark, 1.0])
        i += 1
    for kind in waiting:
        while waiting[kind]:
            multiply(kind, 1.1 if kind == "(" else 1 / 1.1)
    return letters


@unclosed
@given(st.text("ab ()[]\\", max_size=40) | st.lists(st.sampled_from(["(", ")", "[", "]", "a", ":1.5)", ": 2 )"])))
def test_weights_are_the_product_of_the_brackets_round_a_word(prompt):
    prompt = "".join(prompt)
    letters = [(letter, weight) for text, weight in parse(prompt) for letter in text]
    expected = plain_parse(prompt)
    assert [letter for letter, _ in letters] == [letter for letter, _ in expected]
    assert all(math.isclose(a, b, rel_tol=1e-13) for (_, a), (_, b) in zip(letters, expected, strict=True))


@unclosed
@given(st.text(max_size=60) | st.text("ab ()[]\\:.1-+eBREAKnaif", max_size=60))
def test_any_text_is_parsed_or_refused(prompt):
    try:
        parts = parse(prompt)
    except ValueError:
        return
    assert parts and all(abs(weight) <= MAX_WEIGHT for _, weight in parts)
    assert all(before[1] != after[1] for before, after in pairwise(parts))


@given(st.text(st.characters(exclude_characters="()[]\\"), max_size=60).filter(lambda text: "BREAK" not in text))
def test_a_prompt_without_marks_is_one_text(prompt):
    assert parse(prompt) == [(prompt, 1.0)]


@given(st.text("ab: ()[]\\1.", max_size=40))
def test_escaped_text_is_taken_as_it_stands(text):
    assert parse(re.sub(r"([()\[\]\\])", r"\\\1", text)) == [(text, 1.0)]


def test_editing_alternation_and_AND_are_words():
    assert parse("[cat:dog:0.5]") == [("cat:dog:0.5", 1 / 1.1)]
    assert parse("[cat|dog]") == [("cat|dog", 1 / 1.1)]
    assert parse("a cat AND a dog :1.2") == [("a cat AND a dog :1.2", 1.0)]


@pytest.mark.parametrize("prompt, count", [("((((", 4), ("([cat", 2), ("(cat))(", 1)])
def test_a_bracket_never_closed_is_said(prompt, count):
    with pytest.warns(UserWarning, match=rf"never closed: {count};.*\\\("):
        parse(prompt)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        parse(r"(cat)) [:-] \( a\b")


@unclosed
@pytest.mark.parametrize(
    "prompt, message",
    [
        ("a (cat:nan)", "weight of 'cat' is nan.*from -1e.06 to 1e.06.*blue eyes"),
        ("(cat:-Inf)", "'cat' is -inf"),
        ("(cat:infinity)", "'cat' is inf"),
        (f"(cat:{'9' * 400})", "'cat' is inf"),
        ("(cat:1000001)", "'cat' is 1000001"),
        ("((cat:2000):2000)", "'cat' is 4000000"),
        ("(" * 200 + "cat", "'cat' is 1899052"),
        ("(" * 20_000 + "cat", "'cat' is inf"),
        ("(cat:1..2)", "'1..2' is no number.*blue eyes"),
    ],
    ids=lambda text: text[:16],
)
def test_weights_that_cannot_be_are_refused(prompt, message):
    with pytest.raises(ValueError, match=message):
        parse(prompt)


LONG = {
    "opened": lambda n: "(" * n,
    "nested": lambda n: "(" * (n // 2) + ")" * (n // 2),
    "words at every depth": lambda n: "(a[b" * (n // 4),
    "side by side": lambda n: "(a)" * (n // 3),
    "backslashes": lambda n: "\\" * n,
    "a colon and blanks": lambda n: ":" + " " * n,
    "digits": lambda n: "(a:" + "1" * n,
    "blanks before BREAK": lambda n: "a" + " " * n + "BREAK",
    "BREAKs": lambda n: "BREAK " * (n // 6),
}


@unclosed
@pytest.mark.parametrize("kind", LONG)
def test_long_prompts_take_linear_time(kind):
    def seconds(text):
        begun = time.process_time()
        parse(text)
        return time.process_time() - begun

    text = LONG[kind](100_000 if kind != "words at every depth" else 10_000)
    # quadratic work takes 16 times as long for 4 times the text; half a second is for the garbage collector
    assert seconds(text) < 8 * seconds(text[: len(text) // 4]) + 0.5


# Chunks


@pytest.mark.parametrize("case", GOLDEN["chunks"], ids=[case["text"][:24] or "empty" for case in GOLDEN["chunks"]])
def test_chunks_are_those_of_the_web_ui(case):
    ids, weights = rows(CLIP, chunks(CLIP, case["text"], case["comma_padding_backtrack"]))
    assert ids.tolist() == [chunk["tokens"] for chunk in case["chunks"]]
    assert torch.equal(weights, torch.tensor([chunk["multipliers"] for chunk in case["chunks"]]))


def test_rows_are_the_tokenizers():
    for pad in ("end", "zero"):
        tokenizer = Tokenizer(CLIP.merges, pad=pad)
        for prompt in ("", "a cat", "cat " * 75):
            assert torch.equal(rows(tokenizer, chunks(tokenizer, prompt))[0], tokenizer(prompt))


@pytest.mark.parametrize(
    "commas, kept",
    [([53], 75), ([54], 75), ([55], 56), ([55, 60], 61), ([73], 74), ([74], 75), ([75], 75), ([60, 75], 75)],
    ids=str,
)
def test_a_full_chunk_ends_at_a_comma_at_most_20_tokens_back(commas, kept):
    words = ["," if i in commas else "cat" for i in range(100)]
    assert [len(chunk) for chunk in chunks(CLIP, " ".join(words))] == [kept, 100 - kept]


@pytest.mark.parametrize(
    "prompt, lengths",
    [
        ("BREAK", [0]),
        ("cat BREAK", [1]),
        ("BREAK cat", [0, 1]),
        ("cat " * 75 + "BREAK cat", [75, 1]),
        ("(a BREAK b c:1.3)", [1, 2]),
        ("a break BREAKS", [3]),
    ],
)
def test_BREAK_ends_a_chunk(prompt, lengths):
    assert [len(chunk) for chunk in chunks(CLIP, prompt)] == lengths


@unclosed
@given(st.text("abc ,()[]:1", max_size=400), st.integers(0, 75))
def test_no_token_is_lost_between_chunks(prompt, backtrack):
    cut = chunks(LETTERS, prompt, backtrack)
    assert [i for chunk in cut for i, _ in chunk] == [i for text, _ in parse(prompt) for i in LETTERS.encode(text)]
    assert all(75 - backtrack < len(chunk) <= 75 for chunk in cut[:-1])


# Weights


def test_weights_and_the_mean_restored_are_those_of_the_web_ui():
    # it takes one mean over two chunks of three places, ours over one chunk: so it is given one of six places
    golden = {
        name: torch.tensor(value, dtype=torch.float64) for name, value in GOLDEN["emphasis"].items() if name != "note"
    }
    weighted = weigh(golden["z_in"].reshape(1, 6, 4), golden["multipliers"].reshape(1, 6))
    torch.testing.assert_close(weighted.reshape(2, 3, 4), golden["z_out_original"], rtol=0, atol=1e-14)


def test_weights_of_one_change_nothing():
    plain = TOWER(LETTERS(["a cat", "a dog"]))
    assert torch.equal(context(["a cat", "a dog"]), plain)
    assert torch.equal(context(["(a cat:1)", "(a dog:1.0)"]), plain)
    assert torch.equal(context(["a cat", "(a dog:1.3)"])[0], plain[0])  # nor does another prompt's weight


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.3, 2.0])
def test_a_weight_moves_the_context_of_its_words_only(weight):
    plain, weighted = context("a cat on a mat")[0], context(f"a (cat:{weight}) on a mat")[0]
    growth = weighted / plain  # a factor a place: the weight, times what restores the mean
    inside = torch.zeros(77, dtype=torch.bool)
    inside[2:5] = True  # start, a, c, a, t, ...
    common = (plain.mean() / (plain.mean() + (weight - 1) * plain[inside].sum() / plain.numel())).item()
    assert torch.allclose(growth[~inside], torch.tensor(common), rtol=1e-5)
    assert torch.allclose(growth[inside], torch.tensor(weight * common), rtol=1e-5)
    assert torch.isclose(weighted.mean(), plain.mean(), rtol=1e-5)


def test_means_that_cancel_out_neither_blow_up_nor_turn_over():
    z = torch.tensor([[[1.0, 2.0], [-1.0, -1.9]]])  # its mean is 0.025, and -0.86 with the weights
    weights = torch.tensor([[1.0, 1.6]])
    assert torch.equal(weigh(z, weights), z * weights[..., None])  # the quotient is kept at the least weight


def test_a_weighted_context_is_the_same_in_every_batch():
    z = 0.2 + torch.randn(3, 77, 16, generator=torch.Generator().manual_seed(0))
    weights = torch.ones(3, 77)
    weights[0, 5], weights[1, 3:9] = 1.5, 0.7
    torch.testing.assert_close(weigh(z, weights)[:1], weigh(z[:1], weights[:1]), rtol=1e-6, atol=0)
    assert torch.equal(weigh(z, weights)[2], z[2])


@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 2e-3), (torch.bfloat16, 1.6e-2)])
def test_half_precision_is_weighted_in_float32(dtype, tolerance):
    z = 1 + torch.randn(1, 77, 16, generator=torch.Generator().manual_seed(0))
    weights = torch.ones(1, 77).index_fill(1, torch.tensor([3, 4]), 1.3)
    half = weigh(z.to(dtype), weights)
    assert half.dtype == dtype
    assert torch.allclose(half.float(), weigh(z.to(dtype).float(), weights), rtol=tolerance, atol=0)


# Contexts


def test_each_chunk_is_read_on_its_own():
    parts = ["a cat", "(a dog:1.2)", ""]
    whole = context(" BREAK ".join(parts) + " BREAK", long_prompts="chunk")
    assert whole.shape == (1, 231, 16)
    assert torch.equal(whole, torch.cat([context(part) for part in parts], dim=1))
    long = context("1" * 75 + "2" * 75 + "3", long_prompts="chunk")
    assert torch.equal(long, torch.cat([context(digits) for digits in ("1" * 75, "2" * 75, "3")], dim=1))


def test_shorter_prompts_are_filled_up_with_empty_chunks():
    both = context(["x" * 80, "a cat"], long_prompts="chunk")
    assert both.shape == (2, 154, 16)
    torch.testing.assert_close(both[1], torch.cat([context("a cat"), context("")], dim=1)[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(both[:1], context("x" * 80, long_prompts="chunk"), rtol=0, atol=1e-6)


def test_what_is_cut_is_named():
    with pytest.warns(UserWarning, match=r"kept 75 of 78 tokens, dropped '9 8 7'.*chunk"):
        kept = context(", " * 60 + "1" * 15 + "9(87)")
    assert torch.equal(kept, context(", " * 60 + "1" * 15))  # filled to the last place, not ended at a comma
    with pytest.warns(UserWarning, match=r"kept 2 of 4 tokens, dropped 'no'"):
        assert torch.equal(context("hi BREAK no"), context("hi"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        context(["a" * 75, "a BREAK"])
        context("a" * 80 + " BREAK b", long_prompts="chunk")


@pytest.mark.parametrize("skipped", [0, 1, 2])
def test_skipped_blocks_equal_transformers(skipped):
    """The web UI's clip skip N and diffusers' clip_skip N - 1: hidden_states[-N], then the final norm."""
    peer = text_peer(TOWER)(LETTERS(["a cat"]), output_hidden_states=True)
    expected = TOWER.final_norm(peer.hidden_states[-1 - skipped])
    torch.testing.assert_close(context("a cat", skip_last=skipped), expected, rtol=0, atol=1e-6)
    if skipped:
        assert (expected - peer.last_hidden_state).abs().max() > 0.1


@pytest.mark.parametrize("prompts", [None, [], 7, ["a cat", None], "a cat \ud83d"])
def test_prompts_that_are_no_text_are_refused(prompts):
    with pytest.raises(ValueError, match="prompt"):
        context(prompts)


# The pipeline


def test_the_pipeline_encodes_plain_prompts_as_its_text_tower_does():
    sd = tiny()
    prompts = ["a cat", "", "an orange: dog, 3 cats!", "a" * 75]
    assert torch.equal(sd.encode_text(prompts), sd.text(sd.tokenizer(prompts)))
    long = "cat, " * 30
    with pytest.warns(UserWarning, match="kept 75 of 120 tokens, dropped ', cat ,"):
        assert torch.equal(sd.encode_text(long), sd.text(sd.tokenizer(long)))


def test_the_pipeline_weighs_chunks_and_skips():
    sd = tiny()
    sd.text = TOWER
    prompts = ["a (cat:1.3) BREAK a dog", "mud"]
    for clip_skip, skip_last in ((None, None), (1, 0), (2, 1), (3, 2)):
        encoded = sd.encode_text(prompts, long_prompts="chunk", clip_skip=clip_skip)
        assert torch.equal(encoded, context(prompts, long_prompts="chunk", skip_last=skip_last))
    cond, negative = encoded.chunk(2)
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert sd.denoiser(cond, negative, guidance=3.0)(x, torch.tensor(1.0)).shape == x.shape


@pytest.mark.parametrize("clip_skip", [0, 4, -1, 1.5, True, "2"])
def test_a_clip_skip_that_cannot_be_is_refused(clip_skip):
    sd = tiny()
    sd.text = TOWER
    with pytest.raises(ValueError, match=f"clip_skip is {clip_skip!r}.*from 1 to 3"):
        sd.encode_text("a cat", clip_skip=clip_skip)


@pytest.mark.parametrize("long_prompts", ["truncate", None, True])
def test_a_way_with_long_prompts_that_does_not_exist_is_refused(long_prompts):
    with pytest.raises(ValueError, match=f"long_prompts is {long_prompts!r}.*'cut' or 'chunk'"):
        context("a cat", long_prompts=long_prompts)


def test_BREAK_ends_a_chunk_at_weight_zero_too():
    assert parse("(a BREAK b:0)") == [("a", 0.0), ("BREAK", None), ("b", 0.0)]
    assert [[weight for _, weight in chunk] for chunk in chunks(LETTERS, "(a BREAK b:0)")] == [[0.0], [0.0]]


@pytest.mark.parametrize("tag", ["<lora:fluffy:0.8>", "<LORA:a b:1:0.5>", "<hypernet:cats:1>", "<lyco:x>"])
def test_tags_of_other_tools_are_left_out_and_it_is_said(tag):
    with pytest.warns(UserWarning, match=re.escape(tag)):
        assert chunks(LETTERS, f"a {tag} cat") == chunks(LETTERS, "a  cat")
    assert chunks(LETTERS, "a <3 lora:b> cat") != chunks(LETTERS, "a  cat")  # not a tag


@pytest.mark.parametrize("weight", [0.0, -1.0])
def test_contexts_stay_finite_and_as_large_at_weights_of_zero_and_less(weight):
    generator = torch.Generator().manual_seed(0)
    for words in range(1, 76, 6):
        z, weights = torch.randn(20, 77, 16, generator=generator), torch.ones(20, 77)
        weights[:, 1 : 1 + words] = weight
        growth = (weigh(z, weights) / z)[:, 0, 0]  # of a place of weight 1: what the mean's restoring does
        assert ((growth >= 1 - 1e-6) & (growth <= 2 * 77 / weights.abs().sum(1) + 1e-6)).all()


def test_zero_weights_restore_the_mean_as_the_web_ui_does():
    z, weights = torch.rand(1, 77, 16, generator=torch.Generator().manual_seed(0)), torch.ones(1, 77)
    weights[0, 2:5] = 0
    expected = z * weights[..., None]
    torch.testing.assert_close(weigh(z, weights), expected * z.mean() / expected.mean())
