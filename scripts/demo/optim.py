"""Muon for the hidden matrices and AdamW for the rest, with a schedule over wall-clock time.

Muon: momentum, made orthogonal by five Newton–Schulz steps, scaled to the size of an Adam step
(0.2·√max(rows, columns)), so that both share one scale of learning rates.
"""

from collections import defaultdict

import torch
from torch import Tensor, nn


def orthogonal(g: Tensor) -> Tensor:
    """[k, rows, columns] → about the nearest orthogonal matrices."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g.bfloat16() if g.is_cuda else g.float()
    flip = x.shape[1] > x.shape[2]
    if flip:
        x = x.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if flip else x).to(g.dtype)


class Muon:
    """Updates matrices of the same shape together."""

    def __init__(self, parameters: list[nn.Parameter], momentum: float = 0.95, decay: float = 0.05):
        """All of `parameters` are two-dimensional."""
        self.momentum, self.decay = momentum, decay
        groups: dict[tuple[int, ...], list[nn.Parameter]] = defaultdict(list)
        for p in parameters:
            groups[tuple(p.shape)].append(p)
        self.groups = list(groups.values())
        self.buffers = [torch.zeros(len(g), *g[0].shape, device=g[0].device) for g in self.groups]

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """One update from the gradients there are."""
        for group, buffer in zip(self.groups, self.buffers, strict=True):
            gradient = torch.stack([p.grad for p in group])
            buffer.lerp_(gradient, 1 - self.momentum)
            update = orthogonal(gradient.lerp(buffer, self.momentum))
            scale = 0.2 * max(group[0].shape) ** 0.5
            torch._foreach_mul_(group, 1 - rate * self.decay)
            torch._foreach_add_(group, list(update.unbind(0)), alpha=-rate * scale)


class Optimizer:
    """Both of them, and clipping."""

    def __init__(self, network: nn.Module, kind: str = "muon"):
        """`kind`: muon, or adamw for everything."""

        def hidden(name: str, p: nn.Parameter) -> bool:
            return p.ndim == 2 and "embed" not in name

        named = list(network.named_parameters())
        self.parameters = [p for _, p in named]
        chosen = [p for n, p in named if hidden(n, p)] if kind == "muon" else []
        self.muon = Muon(chosen) if chosen else None
        taken = {id(p) for p in chosen}
        rest = [p for p in self.parameters if id(p) not in taken]
        groups = [
            {"params": [p for p in rest if p.ndim > 1], "weight_decay": 0.05},
            {"params": [p for p in rest if p.ndim == 1], "weight_decay": 0.0},
        ]
        fused = rest[0].is_cuda
        self.adam = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), eps=1e-9, fused=fused)

    def step(self, rate: float, muon_rate: float) -> None:
        """Clips the gradients to norm 1, updates, and forgets them."""
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for group in self.adam.param_groups:
            group["lr"] = rate
        self.adam.step()
        if self.muon:
            self.muon.step(muon_rate)
        self.adam.zero_grad(set_to_none=True)
        for p in self.parameters:
            p.grad = None


def schedule(step: int, done: float, warm: int = 150, turn: float = 0.4) -> float:
    """Rises over `warm` steps, stays, and falls in a line from the share `turn` of the time."""
    fall = min(1.0, max(0.0, (1 - done) / (1 - turn)))
    return min(1.0, (step + 1) / warm) * max(fall, 0.01)
