"""Small stages of many kinds, with the data and the criterion that go with them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

WIDTH = 8
TIME = 3
VOCABULARY = 11

Criterion = Callable[..., Tensor]
_random = threading.Lock()  # ranks that are threads share torch's generator


class Microbatch(NamedTuple):
    """What enters at the first stage, and what the criterion is given besides the outputs."""

    inputs: tuple[Tensor | None, ...]
    labels: tuple[Tensor | None, ...]


@dataclass(frozen=True)
class Case:
    """A model in stages: ``stage(i, num_stages)`` makes the i-th; ``tie`` shares parameters."""

    name: str
    stage: Callable[[int, int], nn.Module]
    microbatch: Callable[[int], Microbatch]
    criterion: Criterion
    tie: Callable[[list[nn.Module]], None] | None = None
    context: Callable[[str], AbstractContextManager[object]] = nullcontext  # of a type of device
    has_float64: bool = True

    def stages(self, num_stages: int, dtype: torch.dtype = torch.float32) -> list[nn.Module]:
        """The stages of the whole model; the same numbers every time."""
        with _random, torch.random.fork_rng(devices=[]):
            torch.manual_seed(17)
            stages = [self.stage(i, num_stages) for i in range(num_stages)]
        if self.tie is not None and num_stages > 1:
            self.tie(stages)
        return list(nn.ModuleList(stages).to(dtype)) if dtype != torch.float32 else stages

    def microbatches(
        self, rows: list[int], seed: int = 3, dtype: torch.dtype = torch.float32
    ) -> list[Microbatch]:
        """One micro-batch for each number of rows; the same numbers every time."""
        with _random, torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            made = [self.microbatch(count) for count in rows]
        return [Microbatch(_cast(m.inputs, dtype), _cast(m.labels, dtype)) for m in made]


def _cast(tensors: tuple[Tensor | None, ...], dtype: torch.dtype) -> tuple[Tensor | None, ...]:
    return tuple(t.to(dtype) if t is not None and t.is_floating_point() else t for t in tensors)


def regression(rows: int) -> Microbatch:
    return Microbatch((torch.randn(rows, WIDTH),), (torch.randn(rows, WIDTH),))


def sequences(rows: int) -> Microbatch:
    return Microbatch((torch.randn(rows, TIME, WIDTH),), (torch.randn(rows, TIME, WIDTH),))


def tokens(rows: int) -> Microbatch:
    text = torch.randint(VOCABULARY, (rows, TIME + 1))
    return Microbatch((text[:, :-1].contiguous(),), (text[:, 1:].contiguous(),))


def squared_error(output: Tensor, target: Tensor) -> Tensor:
    return F.mse_loss(output.to(target.dtype), target)


def next_token(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), target.flatten())


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        y: Tensor = self.out(mixed.transpose(1, 2).flatten(-2))
        return y


class Block(nn.Module):
    """A transformer block with LayerNorm, biases and, on demand, dropout."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(WIDTH)
        self.attention = Attention()
        self.norm2 = nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(
            nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Dropout(dropout), nn.Linear(2 * WIDTH, WIDTH)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        y: Tensor = x + self.mlp(self.norm2(x))
        return y


class Checkpointed(nn.Module):
    """A block whose activations are computed again in the backward pass."""

    def __init__(self, use_reentrant: bool, dropout: float = 0.0) -> None:
        super().__init__()
        self.use_reentrant = use_reentrant
        self.outside = nn.Linear(WIDTH, WIDTH)
        self.block = Block(dropout)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = checkpoint(self.block, self.outside(x), use_reentrant=self.use_reentrant)
        return y


class TokensIn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Embedding(VOCABULARY, WIDTH)
        self.position = nn.Embedding(TIME, WIDTH)
        self.block = Block()

    def forward(self, text: Tensor) -> Tensor:
        places = torch.arange(text.shape[1], device=text.device)
        y: Tensor = self.block(self.token(text) + self.position(places))
        return y


class LogitsOut(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.logits = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.logits(self.norm(x))
        return y


def gpt_stage(i: int, num_stages: int) -> nn.Module:
    return TokensIn() if i == 0 else LogitsOut() if i == num_stages - 1 else Block()


def tie_embeddings(stages: list[nn.Module]) -> None:
    first, last = stages[0], stages[-1]
    assert isinstance(first, TokensIn)
    assert isinstance(last, LogitsOut)
    last.logits.weight = first.token.weight


class AutocastInside(nn.Module):
    """Casts within itself, and hands on float32."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block()

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16):
            y: Tensor = self.block(x).float()
        return y


class FullPrecisionInside(nn.Module):
    """Within autocast, a product in float32: its backward is one as well."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block()
        self.matrix = nn.Parameter(torch.randn(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(x)
        with torch.autocast(x.device.type, enabled=False):
            y: Tensor = x.float() @ self.matrix
        return y


class Frozen(nn.Module):
    """A frozen layer between layers that learn, or frozen altogether."""

    def __init__(self, entirely: bool) -> None:
        super().__init__()
        self.before = nn.Linear(WIDTH, WIDTH)
        self.fixed = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.after = nn.Linear(WIDTH, WIDTH)
        self.after.weight.requires_grad_(False)
        if entirely:
            self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.after(self.fixed(torch.tanh(self.before(x)))))


class Turned(nn.Module):
    """Hands on a view of its result, which is not contiguous."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.linear(x), x], dim=-1)[..., 0]


def odd_stage(i: int, num_stages: int) -> nn.Module:
    """Linear, no parameters, the identity, a view, frozen in part, frozen entirely."""
    kinds: list[Callable[[], nn.Module]] = [
        lambda: nn.Linear(WIDTH, WIDTH),
        nn.Tanh,
        lambda: Frozen(entirely=False),
        nn.Identity,
        Turned,
        lambda: Frozen(entirely=True),
    ]
    return kinds[i % len(kinds)]() if i < num_stages - 1 else nn.Linear(WIDTH, WIDTH)


class ManyTensors(nn.Module):
    """Several tensors between stages, with ``None`` and integers among them.

    (x, counts of int64, None, double, unused): ``unused`` never gets a gradient.
    """

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.wide = nn.Linear(WIDTH, 2)

    def forward(
        self, x: Tensor, *rest: Tensor | None
    ) -> tuple[Tensor, Tensor, None, Tensor, Tensor]:
        y = torch.tanh(self.linear(x))
        if not rest:
            counts = torch.arange(len(x), device=x.device)
            return y, counts, None, self.wide(y).double(), y * 2
        counts_in, none, double, _ = rest
        assert counts_in is not None and double is not None
        assert none is None
        assert counts_in.dtype == torch.int64 and not counts_in.requires_grad
        y = y + counts_in.to(x.dtype)[:, None] * 0.01
        return y, counts_in + 1, None, double * 1.5 + self.wide(y).double(), y * 3


def many_error(
    x: Tensor, counts: Tensor, none: None, double: Tensor, unused: Tensor, target: Tensor
) -> Tensor:
    assert none is None
    return F.mse_loss(x, target) + double.square().mean().to(x.dtype) + counts.sum() * 1e-3


class Cast(nn.Module):
    """Computes with weights of one type, and hands its result on in another."""

    def __init__(self, weights: torch.dtype, result: torch.dtype) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH, dtype=weights)
        self.result = result

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(x.to(self.linear.weight.dtype))).to(self.result)


class Cut(nn.Module):
    """What it returns requires no gradient, so nothing before it learns."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x).detach()
        return y


def mlp(bias: bool) -> nn.Module:
    return nn.Sequential(
        nn.Linear(WIDTH, 2 * WIDTH, bias=bias), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH, bias=bias)
    )


def mixed_stage(i: int, num_stages: int) -> nn.Module:
    weights = [torch.float32, torch.float64]
    results = [torch.bfloat16, torch.float64, torch.float16, torch.float32]
    return Cast(weights[i % 2], results[i % 4] if i < num_stages - 1 else torch.float32)


def autocast(device_type: str) -> AbstractContextManager[object]:
    return torch.autocast(device_type, torch.bfloat16)


class _Late(torch.autograd.Function):
    """The identity, late: reads its input and writes its output at the end of a long kernel.

    Until then the output is full of NaN, and so is whatever memory was free a moment before. What is
    read, sent, or given to somebody else too early does not stay unnoticed.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, seconds: float) -> Tensor:
        ctx.seconds = seconds
        return _late_copy(x, seconds)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _late_copy(grads[0], ctx.seconds), None


def _late_copy(x: Tensor, seconds: float) -> Tensor:
    poisoned = [torch.full_like(x, torch.nan) for _ in range(4)]
    copy = poisoned.pop()
    if x.is_cuda:
        torch.cuda._sleep(round(seconds * 1.8e9))  # about: GPUs have clocks of 1.2 to 2 GHz
    else:
        time.sleep(seconds)
    return copy.copy_(x)


def late(x: Tensor, seconds: float) -> Tensor:
    y: Tensor = _Late.apply(x, seconds)  # type: ignore[no-untyped-call]
    return y


class Late(nn.Module):
    """Late at both ends, by a time that changes from call to call and from stage to stage."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.count = number

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        before, after = (self.count * step % 7 * 1e-4 for step in (3, 5))
        return late(torch.tanh(self.linear(late(x, before))), after)


_ALL = [
    Case("linear", lambda i, n: mlp(bias=False), regression, squared_error),
    Case("bias", lambda i, n: mlp(bias=True), regression, squared_error),
    Case("attention", lambda i, n: Block(), sequences, squared_error),
    Case("gpt", gpt_stage, tokens, next_token),
    Case("tied", gpt_stage, tokens, next_token, tie=tie_embeddings),
    Case("dropout", lambda i, n: Block(dropout=0.3), sequences, squared_error),
    Case("checkpoint", lambda i, n: Checkpointed(False), sequences, squared_error),
    Case("checkpoint_reentrant", lambda i, n: Checkpointed(True), sequences, squared_error),
    Case("checkpoint_dropout", lambda i, n: Checkpointed(False, 0.3), sequences, squared_error),
    Case(
        "autocast",
        lambda i, n: Block(),
        sequences,
        squared_error,
        context=autocast,
        has_float64=False,
    ),
    Case(
        "autocast_inside",
        lambda i, n: AutocastInside(),
        sequences,
        squared_error,
        has_float64=False,
    ),
    Case(
        "autocast_outside",
        lambda i, n: FullPrecisionInside(),
        sequences,
        squared_error,
        context=autocast,
        has_float64=False,
    ),
    Case("odd", odd_stage, regression, squared_error),
    Case("many", lambda i, n: ManyTensors(), regression, many_error, has_float64=False),
    Case("mixed", mixed_stage, regression, squared_error, has_float64=False),
    Case("late", lambda i, n: Late(i), regression, squared_error),
    Case("cut", lambda i, n: Cut() if i == (n - 1) // 2 else mlp(True), regression, squared_error),
]
CASES = {case.name: case for case in _ALL}
