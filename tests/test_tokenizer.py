"""The tokenizer against OpenAI's own ids, against the plain definition of byte-pair encoding, and with bad input."""

import hashlib
import json
import random
import time
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minisd.tokenizer import BYTES, Tokenizer, clean, join, spell, words

ROOT = Path(__file__).parents[1]
VOCABULARY = ROOT / "assets/vocab/bpe_simple_vocab_16e6.txt.gz"
GOLDEN = json.loads((ROOT / "tests/fixtures/clip_tokens.json").read_text(encoding="utf-8"))["cases"]
CLIP = Tokenizer.load(VOCABULARY)
CAPTIONS = ["an orange cat on a beach", "a black cat, wearing a red collar", "an orange dog", "café & dog: 2 dogs!"] * 5
OURS = Tokenizer.train(CAPTIONS, 540)


def test_vocabulary_is_the_published_file():
    digest = hashlib.sha256(VOCABULARY.read_bytes()).hexdigest()
    assert digest in (VOCABULARY.parent / "README.md").read_text()
    assert len(CLIP) == 49_408
    assert (CLIP.start, CLIP.end, CLIP.ids["!"], CLIP.ids[",</w>"], CLIP.ids["cat</w>"]) == (49406, 49407, 0, 267, 2368)


@pytest.mark.parametrize("case", GOLDEN, ids=[case["prompt"][:24] or "empty" for case in GOLDEN])
def test_ids_are_those_of_openai(case):
    assert CLIP.encode(case["prompt"]) == case["ids"]


def test_a_row_is_start_tokens_end_padding():
    short, full = "a cat", " ".join(["cat"] * 80)
    rows = CLIP([short, full])
    assert rows.shape == (2, 77) and str(rows.dtype) == "torch.int64"
    assert rows[0].tolist() == [49406, 320, 2368] + [49407] * 74
    assert rows[1].tolist() == [49406] + [2368] * 75 + [49407]
    zero = Tokenizer.load(VOCABULARY, pad="zero")
    assert zero([short, full])[0].tolist() == [49406, 320, 2368, 49407] + [0] * 73
    assert zero(full)[0].tolist() == [49406] + [2368] * 75 + [49407]


def test_the_caller_can_say_what_was_cut():
    ids = CLIP.encode("cat " * 75 + "in a hat")
    assert len(ids) == 78 and CLIP.decode(ids[CLIP.room :]) == "in a hat"


def plain_merge(tokenizer, word):
    """Byte-pair encoding by its definition, pass after pass over the word: quadratic, and easy to believe."""
    parts = spell(word)
    while learnt := [pair for pair in pairwise(parts) if pair in tokenizer.ranks]:
        parts = join(parts, min(learnt, key=tokenizer.ranks.get))
    return list(parts)


@given(st.text("abcdehinorst'é猫", min_size=1, max_size=40))
def test_the_heap_merges_as_the_definition_says(text):
    for word in words(text):
        assert CLIP._merge(word) == plain_merge(CLIP, word)
        assert OURS._merge(word) == plain_merge(OURS, word)


@pytest.mark.parametrize("tokenizer", [CLIP, OURS], ids=["CLIP", "ours"])
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_decode_gives_back_the_cleaned_text(tokenizer, text):
    ids = tokenizer.encode(text)
    assert "".join(tokenizer.decode(ids).split()) == "".join(clean(text).split())


def test_training_joins_the_most_frequent_pair_first():
    # "aab" twice and "ab" three times: a b</w> five times, a a twice, then nothing but aa|b</w> is left
    learnt = Tokenizer.train(["aab ab", "ab AB aab"], 1000)
    assert learnt.merges == [("a", "b</w>"), ("a", "ab</w>")]
    assert len(learnt) == 516 and learnt.encode("ab aab") == [512, 513]


def test_frequent_words_become_one_token():
    trained = Tokenizer.train(CAPTIONS, 1000)
    assert [len(trained.encode(word)) for word in ("cat", "orange", "dog", "beach")] == [1, 1, 1, 1]
    assert len(OURS) == 540
    assert len(trained) == 550  # the texts hold no further pair


def test_saved_and_loaded_is_the_same(tmp_path):
    OURS.save(tmp_path / "vocabulary.txt")
    again = Tokenizer.load(tmp_path / "vocabulary.txt")
    assert again.merges == OURS.merges and again.tokens == OURS.tokens


def test_byte_symbols_are_256_visible_characters():
    assert len(set(BYTES)) == 256 and all(symbol.isprintable() and not symbol.isspace() for symbol in BYTES)


LONG = {
    "one word": lambda n: "".join(random.Random(0).choices("abcdefghijklmnopqrstuvwxyz", k=n)),
    "one letter": lambda n: "x" * n,
    "brackets": lambda n: "(" * n,
    "emoji": lambda n: "😀" * n,
    "mis-decoded": lambda n: "Ã©" * (n // 2),
}


@pytest.mark.parametrize("kind", LONG)
def test_long_prompts_take_linear_time(kind):
    def seconds(text):
        fresh = Tokenizer(CLIP.merges)  # remembers no word
        begun = time.process_time()
        fresh.encode(text)
        return time.process_time() - begun

    text = LONG[kind](40_000)
    # quadratic work takes 16 times as long for 4 times the text
    assert seconds(text) < 8 * seconds(text[: len(text) // 4]) + 0.1
    assert CLIP(text).shape == (1, 77)


@pytest.mark.parametrize(
    "prompt, message",
    [
        (None, "not NoneType"),
        (7, "not int"),
        (b"cat", "not bytes"),
        ("a cat \ud83d", "position 6"),
        ("\udc00", "position 0"),
    ],
)
def test_a_prompt_that_is_no_text_is_refused(prompt, message):
    with pytest.raises(ValueError, match=message):
        CLIP([prompt])


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "not a vocabulary"),
        (b"\xff\xfe", "not a vocabulary"),
        (b"#version\nc a\nca t</w>\nonly-one\n", "line 4"),
        (b"<!DOCTYPE html>\n<html lang>\n", "line 2"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:92\nsize 1\n", "line 2"),
    ],
)
def test_a_file_that_is_no_vocabulary_is_refused(tmp_path, content, message):
    path = tmp_path / "vocabulary.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        Tokenizer.load(path)
    assert str(path) in str(caught.value)


def test_a_broken_gzip_is_refused(tmp_path):
    path = tmp_path / "vocabulary.txt.gz"
    path.write_bytes(VOCABULARY.read_bytes()[:1000])
    with pytest.raises(ValueError, match="not a vocabulary"):
        Tokenizer.load(path)


def test_a_layout_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="514"):
        Tokenizer.train(CAPTIONS, 512)
    with pytest.raises(ValueError, match="'end'"):
        Tokenizer([], pad="left")
