"""Train a byte-level GPT on real text with DualPipe.

python examples/train_gpt.py                        # four ranks on this machine
python examples/train_gpt.py --schedule 1f1b        # the same model, another schedule
python examples/train_gpt.py --resume --steps 400   # go on from the checkpoint
torchrun --nproc-per-node 4 examples/train_gpt.py   # on one node or, with --nnodes, on several
"""

import os
import sys
from pathlib import Path
from typing import Annotated

import torch
import torch.distributed as dist
import typer

from dualpipe_ext.schedule import schedules
from dualpipe_ext.testing import run_ranks

sys.path.insert(0, str(Path(__file__).resolve().parent))
from gpt.checkpoint import check as check_checkpoint
from gpt.model import GPTConfig
from gpt.options import Options, join_world, world
from gpt.run import train_rank, train_unsplit
from gpt.training import StepRecord

SCHEDULES = ", ".join(each.name for each in schedules())


def launch(options: Options) -> list[StepRecord]:
    """Run all ranks here, or the one that torchrun made this process; return rank 0's records."""
    if world() is None:
        print(f"starting {options.ranks} ranks ...", flush=True)
        by_rank: list[list[StepRecord]] = run_ranks(
            train_rank, options.ranks, ranks="processes", args=(options,)
        )
        return by_rank[0]
    join_world()
    try:
        return train_rank(dist.get_rank(), options.ranks, options)
    finally:
        dist.destroy_process_group()


def compare(pipelined: list[StepRecord], unsplit: list[StepRecord]) -> None:
    """Print how far the two loss curves are apart."""
    pairs = [
        (abs(ours - theirs), theirs)
        for a, b in zip(pipelined, unsplit, strict=True)
        for ours, theirs in zip(a.losses, b.losses, strict=True)
    ]
    difference, loss = max(pairs)
    is_first_equal = pipelined[0].losses == unsplit[0].losses
    print(
        f"largest difference of a micro-batch's loss from the unsplit model over {len(unsplit)} "
        f"steps: {difference:.2e} nats ({difference / loss:.1e} of it); first step "
        f"{'bit-equal' if is_first_equal else 'not bit-equal'}"
    )


def introduce(options: Options) -> None:
    """Say what is about to run, and on what."""
    model = options.model
    print(
        f"GPT of {model.layers} blocks, width {model.width}, context {model.context}; "
        f"{options.schedule} with {options.plan().num_stages} stages on {options.ranks} ranks; "
        f"{options.microbatches} micro-batches of {options.rows} sequences: "
        f"{options.batch_tokens} bytes a step"
    )
    if torch.cuda.is_available():
        print("this machine has GPUs; this example trains on its CPU")
    cores = os.cpu_count() or 1
    if world() is None and options.ranks > cores:
        print(
            f"{options.ranks} ranks share {cores} cores, so the measured bubble includes waiting "
            f"for a core"
        )


def main(
    schedule: Annotated[str, typer.Option(help=f"Pipeline schedule: {SCHEDULES}.")] = "dualpipe",
    ranks: Annotated[int, typer.Option(help="Pipeline ranks; torchrun's number wins.")] = 4,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps of the whole run.")] = 200,
    stop_after: Annotated[int, typer.Option(min=0, help="End at this step; 0: at --steps.")] = 0,
    microbatches: Annotated[int, typer.Option(min=1, help="Micro-batches of a step.")] = 8,
    rows: Annotated[int, typer.Option(min=1, help="Sequences of a micro-batch.")] = 8,
    layers: Annotated[int, typer.Option(min=1, help="Transformer blocks.")] = 8,
    width: Annotated[int, typer.Option(min=1, help="Size of the residual stream.")] = 128,
    heads: Annotated[int, typer.Option(min=1, help="Attention heads of a block.")] = 4,
    context: Annotated[int, typer.Option(min=1, help="Bytes of a sequence.")] = 64,
    learning_rate: Annotated[float, typer.Option(min=0, help="Peak learning rate.")] = 4e-3,
    warmup: Annotated[int, typer.Option(min=0, help="Steps until the peak.")] = 20,
    seed: Annotated[int, typer.Option(min=0, help="Of weights and batches.")] = 0,
    evaluate_every: Annotated[int, typer.Option(min=1, help="Steps between evaluations.")] = 25,
    save_every: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")] = 100,
    checkpoint: Annotated[Path, typer.Option(help="Where the run is kept.")] = Path(
        "checkpoints/gpt.pt"
    ),
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint.")] = False,
    data: Annotated[
        Path | None,
        typer.Option(exists=True, file_okay=False, help="Python files to read, not the stdlib."),
    ] = None,
    losses: Annotated[Path | None, typer.Option(help="Write a line of JSON a step.")] = None,
    sample_bytes: Annotated[int, typer.Option(min=0, help="Text to write at the end.")] = 240,
    reference: Annotated[
        bool, typer.Option("--reference", help="Train unsplit too, and compare the losses.")
    ] = False,
) -> None:
    """Train a byte-level GPT on Python's own sources with a pipeline of ranks."""
    rank, num_ranks = world() or (0, ranks)
    options = Options(
        model=GPTConfig(context=context, layers=layers, width=width, heads=heads),
        schedule=schedule,
        ranks=num_ranks,
        steps=steps,
        stop_after=stop_after,
        microbatches=microbatches,
        rows=rows,
        learning_rate=learning_rate,
        warmup=warmup,
        seed=seed,
        evaluate_every=evaluate_every,
        save_every=save_every,
        checkpoint=checkpoint,
        resume=resume,
        data=data,
        losses=losses,
        sample_bytes=sample_bytes,
    )
    try:
        if reference and resume:
            raise ValueError("--reference compares runs from their start: leave out --resume")
        options.check()
        if resume and rank == 0:
            check_checkpoint(checkpoint, options)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    if rank == 0:
        introduce(options)
    records = launch(options)
    if reference and rank == 0:
        compare(records, train_unsplit(options, len(records)))


if __name__ == "__main__":
    typer.run(main)
