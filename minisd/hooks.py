"""Look at attention while a network draws, and change it: what a pixel looks at, word by word."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from jaxtyping import Float
from torch import Tensor, nn

from .layers import Attention

Probabilities = Float[Tensor, "b heads pixels words"]
See = Callable[[str, Probabilities], Probabilities | None]


@contextmanager
def cross_attention(network: nn.Module, see: See) -> Iterator[None]:
    """While it lasts, each cross-attention of the network shows `see(name, probabilities)` where its pixels look.

    Each pixel's probabilities sum to 1 over the words. What `see` returns is used in their place; None leaves them as
    they are. `name` is the module's in the network. With guidance a batch holds the unprompted half first.

    (Showing them per word: Tang et al. 2022, "What the DAAM"; changing them: Hertz et al. 2022, "Prompt-to-Prompt".)
    """

    def hook(name: str) -> Callable:
        def run(module: Attention, args: tuple, output: Tensor) -> Tensor | None:
            x, context = args
            q, k, v = (
                proj(y).unflatten(-1, (module.heads, -1)).transpose(1, 2)
                for proj, y in ((module.q, x), (module.k, context), (module.v, context))
            )
            changed = see(name, (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(dim=-1))
            return None if changed is None else module.out((changed @ v).transpose(1, 2).flatten(-2))

        return run

    found = [(n, m) for n, m in network.named_modules() if isinstance(m, Attention) and n.endswith("cross_attention")]
    if not found:
        raise ValueError(f"{type(network).__name__} has no cross-attention to look at")
    handles = [module.register_forward_hook(hook(name)) for name, module in found]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
