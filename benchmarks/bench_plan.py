"""Planning, lowering and verifying large schedules: time and peak memory, one process per size."""

import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer
from common import JsonOption, Result, show, write_json
from torch.distributed.pipelining import schedules
from torch.distributed.pipelining._utils import generate_stage_to_rank_mapping

from dualpipe_ext.schedule import plan


class Case(NamedTuple):
    """A schedule's size and what it must reach."""

    name: str
    num_ranks: int
    num_microbatches: int
    limit_seconds: float
    limit_gib: float = 4.0

    @property
    def title(self) -> str:
        """The name and the size."""
        return f"{self.name} {self.num_ranks} x {self.num_microbatches}"


CASES = [
    Case("dualpipev", 64, 512, limit_seconds=0.5),
    Case("dualpipe", 64, 512, limit_seconds=0.5),
    Case("dualpipe", 1024, 4096, limit_seconds=15.0),
]


def peak_gib() -> float:
    """Returns the peak resident memory of this process so far, in GiB."""
    status = Path("/proc/self/status").read_text()
    kib = next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(kib) / 2**20


def measure(case: Case, repeats: int) -> Result:
    """Times planning, lowering and verifying, together and separately."""
    parts: dict[str, list[float]] = {"plan": [], "lower": [], "verify": []}
    before = peak_gib()
    for _ in range(repeats):
        times = [time.perf_counter()]
        schedule = plan(case.name, case.num_ranks, case.num_microbatches)
        times.append(time.perf_counter())
        lowered = schedule.lower()
        times.append(time.perf_counter())
        lowered.verify()
        times.append(time.perf_counter())
        for part, (start, end) in zip(parts, pairwise(times), strict=True):
            parts[part].append(end - start)
    totals = [sum(each) for each in zip(*parts.values(), strict=True)]
    facts = {part: statistics.median(seconds) for part, seconds in parts.items()}
    facts |= {"peak_gib": peak_gib(), "gib_before": before}
    facts |= {"limit_seconds": case.limit_seconds, "limit_gib": case.limit_gib}
    return Result(case.title, totals, facts)


def measure_torch(num_ranks: int, num_microbatches: int) -> Result:
    """Times torch's generator and its lowering of DualPipeV; it proves nothing about the result."""
    torch_schedules: Any = schedules  # its annotations and its own use of them differ
    schedule = torch_schedules.ScheduleDualPipeV.__new__(torch_schedules.ScheduleDualPipeV)
    schedule.pp_group_size = num_ranks
    schedule._n_microbatches = num_microbatches
    stage_to_rank = generate_stage_to_rank_mapping(num_ranks, 2 * num_ranks, style="v")
    start = time.perf_counter()
    actions = {rank: schedule._calculate_single_rank_operations(rank) for rank in range(num_ranks)}
    planned = time.perf_counter()
    for rank, row in actions.items():
        unsharded = torch_schedules._add_unshard_reshard(row)
        actions[rank] = torch_schedules._add_reduce_grad(unsharded, num_microbatches)
    torch_schedules._add_send_recv(actions, stage_to_rank.__getitem__, 2 * num_ranks)
    end = time.perf_counter()
    facts = {"plan": planned - start, "lower": end - planned, "peak_gib": peak_gib()}
    return Result(f"torch {num_ranks} x {num_microbatches}", [end - start], facts)


def alone(function: Any, *args: Any) -> Result:
    """Calls a function in a fresh process, so that it has a memory peak of its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as executor:
        result: Result = executor.submit(function, *args).result()
    return result


def main(
    repeats: Annotated[int, typer.Option(min=1, help="Times each size is planned.")] = 3,
    peer_torch: Annotated[
        bool, typer.Option("--peer-torch", help="Also time torch's lowering (17 s).")
    ] = False,
    json: JsonOption = None,
) -> None:
    """Print the time of each step and the peak memory; exit with 1 if a limit is exceeded."""
    results = [alone(measure, case, repeats) for case in CASES]
    if peer_torch:
        results.append(alone(measure_torch, 64, 512))
    show(
        "plan, lower and verify: seconds, peak of memory, time over the first row's",
        results,
        {
            "s": lambda result: f"{result.median:.3f}",
            "plan": lambda result: f"{result.facts['plan']:.3f}",
            "lower": lambda result: f"{result.facts['lower']:.3f}",
            "verify": lambda result: f"{result.facts.get('verify', float('nan')):.3f}",
            "GiB": lambda result: f"{result.facts['peak_gib']:.2f}",
            "ratio": lambda result: f"{result.median / results[0].median:.1f}",
        },
    )
    write_json(json, "plan", {"plan": results})
    over = any(
        result.median > result.facts["limit_seconds"]
        or result.facts["peak_gib"] > result.facts["limit_gib"]
        for result in results
        if "limit_seconds" in result.facts
    )
    raise typer.Exit(over)


if __name__ == "__main__":
    typer.run(main)
