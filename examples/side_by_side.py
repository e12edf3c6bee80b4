"""What examples print that train over a pipeline and in one piece."""

from collections.abc import Sequence


def print_losses(pipeline: Sequence[float], unsplit: Sequence[float]) -> None:
    """The loss of every tenth step, twice, and the largest difference of all steps."""
    print("step   pipeline    in one piece")
    for step, (ours, theirs) in enumerate(zip(pipeline, unsplit, strict=True), 1):
        if step == 1 or step % 10 == 0 or step == len(unsplit):
            print(f"{step:4}   {ours:.6f}    {theirs:.6f}")
    largest = max(abs(a - b) / b for a, b in zip(pipeline, unsplit, strict=True))
    print(f"largest difference of a step's loss: {largest:.1e} of it")
