"""Buckets of mirrored gradients leave as soon as W has made them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dualpipe_ext import DualPipe, DualPipeConfig
from dualpipe_ext.testing import Fault, MessageKind, run_ranks

WIDTH, ROWS, NUM_CHUNKS = 2048, 256, 4
Place = tuple[int, int]  # rank, stage


def stage_with_a_slow_first_layer() -> nn.Sequential:
    """W begins with the last layer and spends nearly all of its time on the first one."""
    return nn.Sequential(
        nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, 8), nn.Linear(8, WIDTH)
    )


class FirstBuckets:
    """Notes how often the slow layers had been added to when first buckets left."""

    def __init__(self) -> None:
        self.slow: dict[Place, nn.Parameter] = {}
        self.when_sent: dict[Place, int] = {}

    def num_additions(self, place: Place) -> int:
        grad = self.slow[place].grad if place in self.slow else None
        return -1 if grad is None else grad._version

    def note(self, source: int, to: int, kind: MessageKind, stage: int, bucket: int) -> Fault:
        if kind in (MessageKind.MIRROR_LOW, MessageKind.MIRROR_HIGH) and bucket == 0:
            self.when_sent[source, stage] = self.num_additions((source, stage))
        return Fault.NONE


@pytest.mark.measures  # a thread of the engine has to run early
@pytest.mark.parametrize("with_hooks", [False, True])
def test_buckets_leave_while_w_makes_the_others(with_hooks: bool) -> None:
    first_buckets = FirstBuckets()

    def rank_fn(rank: int, num_ranks: int) -> dict[Place, int]:
        torch.manual_seed(0)
        stages = [stage_with_a_slow_first_layer() for _ in range(2)]
        if with_hooks:
            for parameter in nn.ModuleList(stages).parameters():
                parameter.register_post_accumulate_grad_hook(lambda _: None)
        model = DualPipe(stages, config=DualPipeConfig(bucket_bytes=1))
        for stage, module in zip(model.stages, stages, strict=True):
            first_buckets.slow[rank, stage] = next(module.parameters())
        batch = torch.randn(ROWS * NUM_CHUNKS // 2, WIDTH)
        model.step(batch, num_chunks=NUM_CHUNKS, criterion=nn.functional.mse_loss, labels=(batch,))
        local = {(rank, stage): first_buckets.num_additions((rank, stage)) for stage in (0, 1)}
        model.zero_grad()
        model.step(
            batch,
            num_chunks=NUM_CHUNKS,
            criterion=nn.functional.mse_loss,
            labels=(batch,),
            sync_gradients=True,
        )
        return local

    all_of_w: dict[Place, int] = {}
    for local in run_ranks(rank_fn, 2, faults=first_buckets.note):
        all_of_w |= local
    assert len(all_of_w) == 4
    early = [place for place, sent in first_buckets.when_sent.items() if sent < all_of_w[place]]
    # Hooks get a gradient at the end of W, and may change it: all buckets leave then. Otherwise it
    # is for the machine to say when the thread that sends runs: at least one must have run early.
    assert bool(early) != with_hooks, (first_buckets.when_sent, all_of_w)
