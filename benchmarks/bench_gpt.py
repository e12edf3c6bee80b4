"""Tokens per second of a small GPT on two ranks, over those of one process with the whole model.

Every contender trains on the same micro-batches from the same weights, with one torch thread per
rank, and with the gradients of both copies of a stage summed if there are two. The unsplit model
runs on rank 0 while rank 1 waits in a barrier, which costs no processor time. Two copies of it that
never communicate show what two processes can reach at most: they share caches and memory.
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import torch
import torch.distributed as dist
import typer
from common import (
    Contender,
    JsonOption,
    PeerOption,
    RepeatsOption,
    Result,
    on_ranks,
    show,
    take_turns,
    write_json,
)
from peers import (
    build_torch_1f1b,
    build_torch_dualpipev,
    build_upstream,
    load_upstream,
)
from store_linear import use_store
from torch import Tensor, nn

from dualpipe_ext import DualPipe

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
from gpt.model import GPTConfig, GPTStage, loss_fn

CONFIG = GPTConfig(vocab_size=4096, context=128, layers=8, width=256, heads=4)
NUM_CHUNKS = 8
ROWS = 4  # of a micro-batch
TOKENS = NUM_CHUNKS * ROWS * CONFIG.context
# Head and loss cost as much as two blocks, the embedding almost nothing: these cuts are even.
TWO_STAGES = [range(5), range(5, 8)]
FOUR_STAGES = [range(3), range(3, 5), range(5, 7), range(7, 8)]
# DualPipe on two ranks: both do the same at the same time, so every cut is even. The one with few
# weights in the first stage, whose gradients are complete last, leaves the least to sum at the end.
MIRRORED_STAGES = [range(3), range(3, 8)]


def batch() -> tuple[Tensor, Tensor]:
    """Returns tokens and targets of a step."""
    generator = torch.Generator().manual_seed(0)
    shape = (NUM_CHUNKS * ROWS, CONFIG.context + 1)
    windows = torch.randint(CONFIG.vocab_size, shape, generator=generator)
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


def message() -> Tensor:
    """Returns a tensor like the activations that stages exchange."""
    return torch.zeros(ROWS, CONFIG.context, CONFIG.width, requires_grad=True)


def contenders(rank: int, num_ranks: int, peer_dualpipe: Path | None) -> list[Contender]:
    """Builds every contender on this rank."""
    built = [unsplit(rank), both_halves(rank), ours(rank)]
    if peer_dualpipe is not None:
        built.append(upstream(rank, load_upstream(peer_dualpipe)))
    return [*built, torch_dualpipev(rank, num_ranks), torch_1f1b(rank, num_ranks)]


def stages(cuts: Sequence[range]) -> list[GPTStage]:
    """Builds stages that hold the given blocks."""
    return [GPTStage(CONFIG, blocks) for blocks in cuts]


def unsplit(rank: int) -> Contender:
    """Builds the whole model, which runs micro-batch by micro-batch on rank 0 only."""
    model = GPTStage(CONFIG, range(CONFIG.layers))
    tokens, targets = batch()

    def step() -> None:
        if rank != 0:
            return
        clear(model)
        for x, y in zip(tokens.chunk(NUM_CHUNKS), targets.chunk(NUM_CHUNKS), strict=True):
            loss_fn(model(x), y).backward()

    return Contender("one process, unsplit", step)


def both_halves(rank: int) -> Contender:
    """Builds the whole model on each rank, for half of the micro-batches: the machine's limit."""
    model = GPTStage(CONFIG, range(CONFIG.layers))
    tokens, targets = (side.chunk(NUM_CHUNKS)[rank::2] for side in batch())

    def step() -> None:
        clear(model)
        for x, y in zip(tokens, targets, strict=True):
            loss_fn(model(x), y).backward()

    return Contender("two processes, nothing between them", step)


def ours(rank: int) -> Contender:
    """Builds our DualPipe, with plain ``nn.Linear`` modules and the overlapped mirror sum."""
    modules = stages(MIRRORED_STAGES[:: 1 if rank == 0 else -1])
    model = DualPipe(modules)
    x, labels = halves(rank)

    def step() -> None:
        clear(*modules)
        model.step(
            x, num_chunks=NUM_CHUNKS, criterion=loss_fn, labels=(labels,), sync_gradients=True
        )

    return Contender("dualpipe_ext DualPipe", step, is_ours=True)


def upstream(rank: int, package: ModuleType) -> Contender:
    """Builds upstream's DualPipe, with linear layers that use its store."""
    modules = stages(MIRRORED_STAGES[:: 1 if rank == 0 else -1])
    for module in modules:
        use_store(module, package.WeightGradStore)
    model = build_upstream(package, modules, tuple(message().shape))
    x, labels = halves(rank)

    def step() -> None:
        clear(*modules)
        model.step(x, num_chunks=NUM_CHUNKS, criterion=loss_fn, labels=(labels,))
        sum_mirrors(modules, rank)

    return Contender("upstream DualPipe", step)


def halves(rank: int) -> tuple[Tensor, Tensor]:
    """Returns this end's inputs and the labels of the other end's inputs."""
    tokens, targets = batch()
    return tokens.chunk(2)[rank], targets.chunk(2)[1 - rank]


def sum_mirrors(modules: Sequence[nn.Module], rank: int) -> None:
    """Sums the gradients of both copies of each stage, parameter by parameter after the step."""
    for stage in range(2):
        for parameter in modules[(stage + rank) % 2].parameters():
            dist.all_reduce(parameter.grad)


def torch_dualpipev(rank: int, num_ranks: int) -> Contender:
    """Builds torch's DualPipeV on four stages."""
    mine = stages([FOUR_STAGES[rank], FOUR_STAGES[3 - rank]])
    tokens, targets = batch()
    logits = torch.zeros(ROWS, CONFIG.context, CONFIG.vocab_size, requires_grad=True)
    first = (tokens[:ROWS], message()) if rank == 0 else (message(), message())
    second = (message(), logits) if rank == 0 else (message(), message())
    schedule = build_torch_dualpipev(mine, rank, num_ranks, NUM_CHUNKS, loss_fn, [first, second])
    args, target = ((tokens,), targets) if rank == 0 else ((), None)
    return Contender("torch DualPipeV", torch_step(schedule.step, mine, args, target))


def torch_1f1b(rank: int, num_ranks: int) -> Contender:
    """Builds torch's 1F1B on two stages."""
    mine = stages([TWO_STAGES[rank]])
    tokens, targets = batch()
    logits = torch.zeros(ROWS, CONFIG.context, CONFIG.vocab_size, requires_grad=True)
    example = (tokens[:ROWS], message()) if rank == 0 else (message(), logits)
    schedule = build_torch_1f1b(mine[0], rank, num_ranks, NUM_CHUNKS, loss_fn, example)
    args, target = ((tokens,), None) if rank == 0 else ((), targets)
    return Contender("torch 1F1B", torch_step(schedule.step, mine, args, target))


def torch_step(
    step: Callable[..., object],
    modules: Sequence[nn.Module],
    args: tuple[Tensor, ...],
    target: Tensor | None,
) -> Callable[[], None]:
    """Returns a step of a torch schedule that starts from cleared gradients."""

    def run() -> None:
        clear(*modules)
        step(*args, target=target, losses=[], return_outputs=False)

    return run


def clear(*modules: nn.Module) -> None:
    """Zeroes gradients in place, as an optimizer with resident gradients does."""
    for module in modules:
        module.zero_grad(set_to_none=False)


def measure(rank: int, num_ranks: int, peer_dualpipe: Path | None, repeats: int) -> list[Result]:
    """Builds and times all contenders; runs on every rank."""
    return take_turns(contenders(rank, num_ranks, peer_dualpipe), repeats)


def main(
    repeats: RepeatsOption = 7, peer_dualpipe: PeerOption = None, json: JsonOption = None
) -> None:
    """Measure a small GPT on two ranks against one process and against the peers."""
    results = on_ranks(measure, 2, peer_dualpipe, repeats)
    alone = results[0].median
    columns = {
        "step ms": lambda result: f"{result.median * 1e3:.0f}",
        "tokens/s": lambda result: f"{TOKENS / result.median:.0f}",
        "over one process": lambda result: f"{alone / result.median:.3f}",
    }
    show(f"GPT, P=2, N={NUM_CHUNKS}, {TOKENS} tokens a step", results, columns)
    write_json(json, "gpt", {"P=2": results})


if __name__ == "__main__":
    typer.run(main)
