"""What the processes of test_transport.py run: importable by name, as started processes need it."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore
from transport_checks import CHECKS, Ends, outcome_of, tensor

from dualpipe_ext import _C

Outcomes = dict[str, str]


def run_all_in_a_process(rank: int, num_ranks: int) -> Outcomes:
    """All checks on one of two processes, each over a pipeline of its own."""
    exchange = _C.StoreExchange(dist.group.WORLD, rank)
    outcomes: Outcomes = {}
    for name, check in CHECKS.items():
        transport, control = _C.process_group_ends(dist.group.WORLD, rank, [0, 1], [1 - rank])
        ends = Ends(rank, transport, control, lambda: exchange.all_gather("", 30.0))
        outcomes[name] = outcome_of(check, ends)
        exchange.all_gather("", 60.0)
    return outcomes


def mapped_ring(rank: int, num_ranks: int) -> list[str]:
    """Rank r of the pipeline is rank 2 - r of the group; every rank sends to the next one."""
    pipeline_rank = num_ranks - 1 - rank
    peers = [(pipeline_rank + 1) % num_ranks, (pipeline_rank - 1) % num_ranks]
    transport, _ = _C.process_group_ends(dist.group.WORLD, pipeline_rank, [2, 1, 0], peers)
    kind = _C.MessageKind.ACTIVATION
    received = b""
    for step in range(20):
        transport.begin_step(step, 1, "a ring")
        receive = transport.receive(peers[1], kind, 0, step)
        transport.send(peers[0], kind, 0, step, [(0, False, [1], bytes([pipeline_rank]))])
        (message,) = receive.wait()
        assert message is not None
        received = message[3]
        transport.end_step()
    texts = _C.StoreExchange(dist.group.WORLD, pipeline_rank).all_gather(f"at {rank}", 30.0)
    return [str(received[0]), *texts]


def gloo_loop_policies(rank: int, num_ranks: int) -> list[list[int]]:
    """The scheduling policies of gloo's event loops, before and after a transport is made."""

    def policies() -> list[int]:
        tasks = Path("/proc/self/task").iterdir()
        loops = [t for t in tasks if (t / "comm").read_text().strip() == "gloo_tcp_loop"]
        return sorted({os.sched_getscheduler(int(task.name)) for task in loops})

    before = policies()
    _C.process_group_ends(dist.group.WORLD, rank, [0, 1], [1 - rank])
    return [before, policies()]


def blocked(ends: Ends, microbatch: int) -> tuple[str, float]:
    """What a wait for a message that never comes throws, and when (Unix time)."""
    with pytest.raises(_C.PipelineError) as caught:
        ends.receive(microbatch).wait()
    return str(caught.value), time.time()


def die(folder: Path) -> None:
    """Ends this process without a word to anybody."""
    (folder / "died_at").write_text(str(time.time()))
    os.kill(os.getpid(), signal.SIGKILL)


def survive(ends: Ends, folder: Path) -> None:
    """Waits for the victim, which also hosts the store."""
    ends.send(0, [tensor(100_000)])
    text, noticed_at = blocked(ends, 3)
    assert text.startswith("rank 1 waits for the activation of micro-batch 3 for stage 1 from rank")
    assert "Connection closed by peer" in text
    assert noticed_at - float((folder / "died_at").read_text()) < 3.0
    with pytest.raises(_C.PipelineError, match=r"the rank that hosts .* store is gone"):
        ends.control.poll()
    ends.transport.recover()
    with pytest.raises(_C.PipelineError, match="rank 1 cannot reach rank 0"):
        ends.transport.begin_step(2, 1, "after the death")


def run_to_death(rank: int, port: int, folder: Path) -> None:
    """A process of the test below."""
    store = TCPStore("127.0.0.1", port, 2, is_master=rank == 0, wait_for_workers=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    transport, control = _C.process_group_ends(dist.group.WORLD, rank, [0, 1], [1 - rank])
    ends = Ends(rank, transport, control, lambda: None)
    transport.begin_step(1, 1, "a step")
    if rank == 0:
        ends.receive(0).wait()
        time.sleep(0.3)
        die(folder)
    survive(ends, folder)
    (folder / "survived").touch()
    os._exit(0)  # torch's own shutdown would wait for the dead
