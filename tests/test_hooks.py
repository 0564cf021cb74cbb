"""Attention looked at and changed while a network runs."""

import pytest
import torch
from tiny import tiny

from minisd.hooks import cross_attention


@pytest.fixture(scope="module")
def sd():
    return tiny()


def call(sd, words=("a cat", "a dog")):
    x = torch.randn(len(words), 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return sd.unet(x, torch.full((len(words),), 500.0), sd.encode_text(list(words)))


def test_what_is_shown_are_shares_of_words_and_showing_them_changes_nothing(sd):
    seen, before = {}, call(sd)
    with cross_attention(sd.unet, lambda name, p: seen.update({name: p})):
        assert call(sd).equal(before)
    assert [*seen] == [name for name, _ in sd.unet.named_modules() if name.endswith("cross_attention")] != []
    for name, shares in seen.items():
        heads, side = sd.unet.get_submodule(name).heads, round(shares.shape[2] ** 0.5)
        assert shares.shape == (2, heads, side**2, 77) and side in (4, 8)
        torch.testing.assert_close(shares.sum(-1), torch.ones(shares.shape[:-1]))


def test_shares_that_are_returned_are_used(sd):
    before = call(sd)
    with cross_attention(sd.unet, lambda name, p: p):
        torch.testing.assert_close(call(sd), before)

    def only_the_start(name, p):
        return torch.nn.functional.one_hot(torch.zeros(p.shape[:-1], dtype=torch.long), p.shape[-1]).to(p)

    with cross_attention(sd.unet, only_the_start):  # the start mark knows no word that follows
        first, second = call(sd, ("a cat", "a cat")), call(sd, ("a dog", "a dog"))
    torch.testing.assert_close(first, second)
    assert not torch.allclose(first, before)


def test_guidance_puts_the_unprompted_half_first(sd):
    x, sigma = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor(1.0)
    guided, plain = [], []
    with torch.no_grad():
        cat, nothing = sd.encode_text(["a cat", ""]).split(1)
        with cross_attention(sd.unet, lambda name, p: guided.append(p)):
            sd.denoiser(cat, nothing, guidance=3.0).predict(x, sigma)
        with cross_attention(sd.unet, lambda name, p: plain.append(p)):
            sd.denoiser(nothing).predict(x, sigma)
    assert not torch.allclose(guided[0][0], guided[0][1])
    torch.testing.assert_close(guided[0][:1], plain[0])


def test_half_precision_is_shown_in_full(sd):
    seen = []
    half = tiny().to(dtype=torch.bfloat16)
    with cross_attention(half.unet, lambda name, p: seen.append(p) or p), torch.no_grad():
        half.unet(torch.zeros(1, 4, 8, 8, dtype=torch.bfloat16), torch.tensor([500.0]), half.encode_text("a cat"))
    assert all(p.dtype == torch.float32 for p in seen) and seen


def test_it_ends_with_its_block_even_after_an_error(sd):
    before, seen = call(sd), []

    def fail(name, p):
        seen.append(name)
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"), cross_attention(sd.unet, fail):
        call(sd)
    assert len(seen) == 1 and call(sd).equal(before) and len(seen) == 1


def test_a_network_without_words_is_refused(sd):
    with pytest.raises(ValueError, match="no attention"), cross_attention(torch.nn.Identity(), lambda *_: None):
        pass
