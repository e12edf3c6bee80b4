"""Models of nobody's library, as people write them, for adapters that follow their forward."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from models import Block
from torch import Tensor, nn

WIDTH = 8
VOCABULARY = 11
TIME = 6
CLASSES = 4


class GPT(nn.Module):
    """Embeddings, blocks, a norm and a tied head, all in one forward; an optional argument."""

    def __init__(self, num_blocks: int = 4, tied: bool = True) -> None:
        super().__init__()
        self.token = nn.Embedding(VOCABULARY, WIDTH)
        self.position = nn.Parameter(torch.randn(TIME, WIDTH))
        self.drop = nn.Dropout(0.0)
        self.blocks = nn.ModuleList(Block() for _ in range(num_blocks))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        if tied:
            self.head.weight = self.token.weight

    def forward(self, text: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        batch, time = text.shape
        assert time <= TIME, "too long"
        if time > TIME:
            raise ValueError("too long")
        x = self.drop(self.token(text) + self.position[torch.arange(time, device=text.device)])
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x)).view(batch, time, VOCABULARY)
        loss = None
        if targets is not None:
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return logits, loss


class WithConstants(nn.Module):
    """Makes tensors of numbers within its forward, and keeps one that is no buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(4))
        self.scale = torch.full((WIDTH,), 0.5)

    def forward(self, text: Tensor) -> Tensor:
        x: Tensor = self.embedding(text) * torch.tensor(2.0)
        for block in self.blocks:
            x = block(x) * self.scale + torch.ones(WIDTH)
        return x


class WithOptions(nn.Module):
    """May be given a mask, and asks in one of two ways for it; ignores something."""

    def __init__(self, asks_for_tensor: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(4))
        self.asks_for_tensor = asks_for_tensor

    def forward(
        self, x: Tensor, ignored: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        if self.asks_for_tensor:
            x = x * mask[..., None] if isinstance(mask, Tensor) else x
        elif mask is not None:
            x = x * mask[..., None]
        for block in self.blocks:
            x = block(x)
        return x


class MaskedBlock(nn.Module):
    """Attention that takes a mask and a table of positions besides the hidden states."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, mask: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        query, key, value = self.qkv(self.norm(x)).chunk(3, -1)
        mixed = F.scaled_dot_product_attention(query * table, key * table, value, attn_mask=mask)
        return x + self.out(mixed), mixed.detach().mean()


class Body(nn.Module):
    def __init__(self, num_blocks: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(MaskedBlock() for _ in range(num_blocks))


class MaskedEncoder(nn.Module):
    """Its mask and table are made once and used by every block; blocks are in an inner module."""

    table: Tensor
    scale: Tensor

    def __init__(self, num_blocks: int = 5) -> None:
        super().__init__()
        self.body = Body(num_blocks)
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)
        self.register_buffer("table", torch.rand(TIME, WIDTH), persistent=False)
        self.register_buffer("scale", torch.ones(()))

    def forward(self, text: Tensor, padding: Tensor) -> Tensor:
        allowed = padding[:, None, :].expand(-1, text.shape[1], -1).bool()
        table = self.table[: text.shape[1]].cos()
        x = self.embedding(text) * self.scale
        for layer in self.body.layers:
            x, _ = layer(x, allowed, table)
        weight = padding.to(x.dtype)
        pooled = (x * weight[:, :, None]).sum(1) / weight.sum(1, keepdim=True)
        y: Tensor = self.head(pooled)
        return y


class Residual(nn.Module):
    """The basic block of a residual network."""

    def __init__(self, channels_in: int, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, padding=1, bias=False)
        self.norm1 = nn.GroupNorm(2, channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(2, channels)
        self.project = nn.Conv2d(channels_in, channels, 1) if channels_in != channels else None

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.project is None else self.project(x)
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(y + shortcut)


class ResNet(nn.Module):
    """A stem, four lists of residual blocks with pooling in between, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.layer1 = nn.Sequential(Residual(4, 4), Residual(4, 4))
        self.layer2 = nn.Sequential(Residual(4, 8))
        self.layer3 = nn.Sequential(Residual(8, 8), Residual(8, 8))
        self.pool = nn.MaxPool2d(2)
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer1(F.relu(self.stem(x)))
        x = self.layer2(self.pool(x))
        x = self.layer3(self.pool(x))
        y: Tensor = self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))
        return y


class VisionTransformer(nn.Module):
    """Patches, a class token, positions, blocks in a Sequential, and a head for the token."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, 4, stride=4)
        self.token = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.position = nn.Parameter(torch.randn(1, 5, WIDTH))
        self.blocks = nn.Sequential(*(Block() for _ in range(4)))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, pictures: Tensor) -> Tensor:
        x = self.patches(pictures).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1) + self.position
        y: Tensor = self.head(self.norm(self.blocks(x))[:, 0])
        return y


class Skipping(nn.Module):
    """One block's output is added again behind a later one."""

    def __init__(self, num_blocks: int = 4, source: int = 0, target: int = 2) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(num_blocks))
        self.source = source
        self.target = target

    def forward(self, x: Tensor) -> Tensor:
        early = x
        for index, block in enumerate(self.blocks):
            x = block(x)
            if index == self.source:
                early = x
            if index == self.target:
                x = x + early
        return x


class Remembering(nn.Module):
    """Counts its calls in a buffer, or keeps what a block has computed."""

    steps: Tensor

    def __init__(self, what: str) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(4))
        self.register_buffer("steps", torch.zeros(()))
        self.hidden: Tensor | None = None
        self.notes: list[Tensor] = []
        self.what = what

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        if self.what == "steps":
            self.steps = self.steps + 1
        elif self.what == "notes":
            self.notes.append(x)
        else:
            self.hidden = x
        return x


class Deciding(nn.Module):
    """Looks at the values of its tensors between blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            if x.sum() > 0:
                x = block(x)
        return x


class Wasteful(nn.Module):
    """Has a parameter that its forward does not use."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(4))
        self.forgotten = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class Shared(nn.Module):
    """One norm is used behind every block."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(4))
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = self.norm(block(x))
        return x


class WithoutHead(nn.Module):
    """Its logits are products with the embedding, under the embedding's name."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(4))

    def forward(self, text: Tensor) -> Tensor:
        x = self.embedding(text)
        for block in self.blocks:
            x = block(x)
        return F.linear(x, self.embedding.weight)


class ModeDependent(nn.Module):
    """Drops out between blocks, by a function."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = F.dropout(block(x), 0.1, self.training)
        return x


class Surrounded(nn.Module):
    """Begins with something that a graph of its operations does not show."""

    def __init__(self, begin: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(4))
        self.begin = begin

    def forward(self, x: Tensor) -> Tensor:
        x = self.begin(self.first, x)
        for block in self.blocks:
            x = block(x)
        return x


def without_gradients(first: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        y: Tensor = first(x)
    return y


def in_bfloat16(first: nn.Module, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        y: Tensor = first(x)
    return y.float()


def with_noise(first: nn.Module, x: Tensor) -> Tensor:
    y: Tensor = first(x) + torch.randn(WIDTH)
    return y


def surrounded() -> nn.Module:
    return Surrounded(lambda first, x: first(x))


def hooked() -> nn.Module:
    model = surrounded()
    model.register_forward_hook(lambda module, args, out: out * 2)
    return model


def patched() -> nn.Module:
    model = surrounded()
    forward = model.forward
    model.__dict__["forward"] = lambda x: forward(x) * 2
    return model


def patched_within() -> nn.Module:
    model = MaskedEncoder()
    model.body.__dict__["forward"] = lambda x: x
    return model


def compiled() -> nn.Module:
    model = surrounded()
    model.compile(backend="eager")
    return model
