"""Ranks as threads that share one GPU: what they compute, and what they do about failures.

NCCL needs version 2.30 and NCCL_MULTI_RANK_GPU_ENABLE=1 for it. benchmarks/gpu_check.sh runs these.
"""

from __future__ import annotations

import pytest
import torch
from busy_machine import holds_in_one_of
from gpu_ranks import (
    DEVICE,
    ON_CPU,
    TRANSPORTS,
    a_stage_that_fails_once,
    check_more_buckets_than_a_channel_takes,
    exact_weight_gradients,
    gpu_job,
    main_grads,
    ranks_in_threads,
    reported_imbalance,
    timed_step,
    trained,
    trained_in_one_piece,
)
from parity import Job, check_equal, check_job, run_job, unsplit
from places import Place, place_of
from test_parity import THREAD_CASES

from dualpipe_ext.adapters import Cost
from dualpipe_ext.adapters.balance import step_seconds
from dualpipe_ext.schedule import parse_action
from dualpipe_ext.testing import run_ranks

pytestmark = [pytest.mark.gpu, TRANSPORTS]
BF16 = torch.bfloat16
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=["float32", "bf16"])
IN_BF16 = ["linear", "attention", "tied", "odd", "cut", "checkpoint_reentrant"]


@pytest.mark.parametrize("rows", [64, 8192])
def test_nothing_is_read_or_written_too_early(transport: str, rows: int) -> None:
    """Kernels are late, and memory is full of NaN until they have written it."""
    num_ranks = ranks_in_threads(transport)
    many = (rows,) * 2 * num_ranks  # sums over them need float64 to be comparable
    check_job(gpu_job(transport, "late", num_ranks=num_ranks, rows=many, dtype=torch.float64))


def test_live_activations(transport: str) -> None:
    job = gpu_job(transport, "bias")
    for result in run_job(job):
        assert result.stats.peak_live_activations == job.num_ranks + 1


@pytest.fixture(scope="module")
def place() -> Place:
    """Made once: it measures the device's clock, which ranks at work would disturb."""
    return place_of(DEVICE.partition(":")[0])


def test_times_are_those_of_the_device(transport: str, place: Place) -> None:
    num_ranks = ranks_in_threads(transport)
    for stats, trace in run_ranks(timed_step, num_ranks, args=(transport, place)):
        assert stats.clock == ("host" if ON_CPU else "device")
        kinds = [[part.op for part in parse_action(event.action)] for event in trace]
        forwards = [
            event.end - event.start - event.wait
            for event, kind in zip(trace, kinds, strict=True)
            if kind == ["F"]
        ]
        assert len(forwards) == 8 and min(forwards) > 0.0025, forwards
        ends = [event.end for event in trace]
        assert ends == sorted(ends) and ends[-1] <= stats.step_seconds
        assert 8 * 0.0025 < stats.busy_seconds <= stats.step_seconds


def test_times_of_stages_whose_messages_go_by_the_host(transport: str, place: Place) -> None:
    for stats, _ in run_ranks(timed_step, 2, args=("host", place)):
        assert stats.clock == ("host" if ON_CPU else "device")
        assert 8 * 0.0025 < stats.busy_seconds <= stats.step_seconds


def test_an_imbalance_is_reported(transport: str, place: Place) -> None:
    now, then = (step_seconds([Cost(n) for n in layers], 12) for layers in ([3, 1, 2, 2], [2] * 4))
    exact = 1 - then / now  # 9.7 %: layers are all alike, and little but their forwards takes time

    def check() -> None:
        for report in run_ranks(reported_imbalance, 4, args=(transport, place)):
            assert report.better_sizes == (2, 2, 2, 2), str(report)
            assert report.gain == pytest.approx(exact, rel=0.25), str(report)

    holds_in_one_of(5, check)


def test_weight_gradients_in_float32_of_weights_in_bf16(transport: str) -> None:
    """Products of bf16 are summed in float32, and rounded nowhere before."""
    job = gpu_job(transport, "linear", dtype=BF16)
    expected = exact_weight_gradients(job.stages(), job)
    for found in run_ranks(main_grads, job.num_ranks, args=(job,)):
        for stage, named in found.items():
            for name, sums in named.items():
                exact = expected[stage][name]
                error = float((sums.double() - exact).norm() / exact.norm())
                assert sums.dtype == torch.float32 and error < 1e-5, (stage, name, error)


def test_more_buckets_than_a_channel_takes_messages(transport: str) -> None:
    check_more_buckets_than_a_channel_takes(transport, "threads")


@pytest.mark.parametrize("in_backward", [False, True])
def test_a_failure_ends_all_ranks_and_the_next_step_works(
    transport: str, in_backward: bool
) -> None:
    job = gpu_job(transport, "attention")
    for endings in run_ranks(a_stage_that_fails_once, job.num_ranks, args=(job, in_backward)):
        assert endings[0] == endings[2] == "fine", endings
        assert "out of luck" in endings[1], endings


@pytest.mark.parametrize("case", THREAD_CASES)
def test_models(transport: str, case: str) -> None:
    check_job(gpu_job(transport, case, sync="within"))


@pytest.mark.parametrize("case", IN_BF16)
def test_models_in_bf16(transport: str, case: str) -> None:
    check_job(gpu_job(transport, case, dtype=BF16))


def test_float64(transport: str) -> None:
    check_job(gpu_job(transport, "gpt", dtype=torch.float64))


@pytest.mark.parametrize("schedule", ["1f1b", "zb1p", "zbv", "gpipe", "interleaved_1f1b"])
def test_planners(transport: str, schedule: str) -> None:
    stages = 2 if schedule == "interleaved_1f1b" else 0
    check_job(gpu_job(transport, "attention", schedule, stages_per_rank=stages))


@DTYPES
def test_gradients_that_nobody_defers_have_the_bits_of_the_unsplit_model(
    transport: str, dtype: torch.dtype
) -> None:
    config = {"split_weight_gradients": False}
    job = gpu_job(transport, "bias", "dualpipev", dtype=dtype, config=config)
    expected = unsplit(job).gradients
    for result in run_job(job):
        for stage, gradients in result.gradients.items():
            check_equal(tuple(gradients.values()), tuple(expected[stage].values()), str(stage))


def test_rows_that_do_not_come_out_even(transport: str) -> None:
    rows = {2: (3, 2, 2, 1), 4: (3, 3, 3, 2, 3, 3, 2, 2)}[ranks_in_threads(transport)]
    check_job(gpu_job(transport, "attention", rows=rows))


def test_shapes_that_are_described_each_time(transport: str) -> None:
    check_job(gpu_job(transport, "many", config={"dynamic_shapes": True}))


def test_messages_in_host_memory(transport: str) -> None:
    check_job(Job("attention", "dualpipe", 4, 8, device=DEVICE, config={"transport": "host"}))


def test_a_whole_model_is_trained(transport: str) -> None:
    expected = trained_in_one_piece()
    for losses in run_ranks(trained, ranks_in_threads(transport), args=(transport,)):
        assert losses == pytest.approx(expected, rel=1e-4)
