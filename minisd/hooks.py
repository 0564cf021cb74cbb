"""Look at attention while a network draws, and change it: what a pixel looks at, word by word."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .layers import Attention

Probabilities = Float[Tensor, "b heads pixels words"]
See = Callable[[str, Probabilities], Probabilities | None]


@contextmanager
def cross_attention(network: nn.Module, see: See) -> Iterator[None]:
    """While it lasts, each attention of the network that has a context shows `see(name, probabilities)` where it looks.

    Each pixel's probabilities sum to 1 over the words; pixels come row by row. What `see` returns is used in their
    place; None leaves the network's own result as it is. `name` is the module's in the network. With guidance a batch
    holds the unprompted half first. Not to be nested: the inner one works on the network's own probabilities.

    (Showing them by word: Tang et al. 2022, "What the DAAM", section 2; changing them: Hertz et al. 2022,
    "Prompt-to-Prompt", section 3.) Raises ValueError for a network without attention.
    """

    def hook(name: str) -> Callable:
        def run(module: Attention, args: tuple, output: Tensor) -> Tensor | None:
            x, context = (*args, None)[:2]
            if context is None:  # self-attention
                return None
            q, k, v = (
                proj(y).unflatten(-1, (module.heads, -1)).transpose(1, 2)
                for proj, y in ((module.q, x), (module.k, context), (module.v, context))
            )
            scores = (q / q.shape[-1] ** 0.5) @ k.mT  # divided first, lest half precision overflows
            changed = see(name, scores.softmax(dim=-1, dtype=torch.float32))
            return None if changed is None else module.out((changed.to(v) @ v).transpose(1, 2).flatten(-2))

        return run

    found = [(name, module) for name, module in network.named_modules() if isinstance(module, Attention)]
    if not found:
        raise ValueError(f"{type(network).__name__} has no attention to look at")
    handles = [module.register_forward_hook(hook(name)) for name, module in found]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
