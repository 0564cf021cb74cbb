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
    assert len(seen) == sum(name.endswith("cross_attention") for name, _ in sd.unet.named_modules()) > 0
    for shares in seen.values():
        assert shares.shape[0] == 2 and shares.shape[-1] == 77
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


def test_it_ends_with_its_block_even_after_an_error(sd):
    before, seen = call(sd), []

    def fail(name, p):
        seen.append(name)
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"), cross_attention(sd.unet, fail):
        call(sd)
    assert len(seen) == 1 and call(sd).equal(before) and len(seen) == 1


def test_a_network_without_words_is_refused(sd):
    with pytest.raises(ValueError, match="no cross-attention"), cross_attention(sd.vae, lambda *_: None):
        pass
