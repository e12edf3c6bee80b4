"""Stages sharded by FSDP2 or by tensor parallelism: parity with the model in one piece."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from sharded_ranks import (
    BESIDE,
    CHUNKS,
    FAILURES,
    HALF,
    PLACES,
    ROWS,
    STEPS,
    SometimesUsed,
    batch,
    criterion,
    everything,
    in_sequence_rows,
    in_sequence_stages,
    sum_of_squares,
    whole_stages,
)
from torch import Tensor, nn

from dualpipe_ext.testing import run_ranks

Found = list[dict[str, Any]]
CASES = [
    "fsdp",
    "fsdp, within",
    "fsdp, 1f1b",
    "fsdp, zb1p",
    "fsdp, recomputed",
    "fsdp, never split",
    "tp",
    "tp, within",
]
CLIPPED_TO = 0.5


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """What four processes came to, by rank."""
    folder = tmp_path_factory.mktemp("sharded")
    return run_ranks(everything, PLACES * BESIDE, "processes", (folder,), timeout=240.0)


def replicas_of(name: str) -> int:
    """FSDP's ranks have their own rows; those of tensor parallelism, parts of one product."""
    return BESIDE if "tp" not in name else 1


def unsplit_loss(model: nn.Module, step: int, num_replicas: int) -> Tensor:
    """The mean over all rows of all replicas, summed as the pipelines do."""
    losses = [
        criterion(model(rows), rows.sin())
        for replica in range(num_replicas)
        for rows in batch(step, replica).split(ROWS)
    ]
    return torch.stack(losses).sum() / num_replicas


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def norm_of(grads: dict[str, Tensor], norm_type: float = 2.0) -> float:
    return float(torch.nn.utils.get_total_norm(grads.values(), norm_type))


def assert_close(
    found: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    rtol: float | None = None,
    atol: float | None = None,
) -> None:
    assert found
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=rtol, atol=atol, msg=_naming(name))


def _naming(name: str) -> Callable[[str], str]:
    return lambda message: f"{name}: {message}"


@pytest.mark.parametrize("name", CASES)
def test_parity(found: Found, name: str) -> None:
    model = nn.Sequential(*whole_stages())
    unsplit_loss(model, 0, replicas_of(name)).backward()
    expected = gradients(model)
    norm = norm_of(expected)
    clipped = {key: grad * (CLIPPED_TO / (norm + 1e-6)) for key, grad in expected.items()}
    for result in (rank[name] for rank in found):
        assert_close(result["grads"], expected)
        assert math.isclose(result["norm"], norm, rel_tol=1e-5)
        assert norm > CLIPPED_TO, "or nothing is clipped"
        assert_close(result["clipped"], clipped)
        assert math.isclose(result["largest"], norm_of(clipped, math.inf), rel_tol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_losses_have_the_bits_of_the_model_in_one_piece(found: Found, name: str) -> None:
    """FSDP gathers the very weights, so that products are the same; not so the parts of TP."""
    model = nn.Sequential(*whole_stages())
    for rank in found:
        loss = rank[name]["loss"]
        if loss is None:
            assert "1f1b" in name or "zb1p" in name
            continue
        own = batch(0, rank["beside"] if replicas_of(name) > 1 else 0)
        expected = torch.stack([criterion(model(rows), rows.sin()) for rows in own.split(ROWS)])
        leaving = (
            expected if len(loss) == CHUNKS else expected.split(CHUNKS // 2)[_half(found, rank)]
        )
        if "tp" in name:
            torch.testing.assert_close(loss, leaving)
        else:
            assert torch.equal(loss, leaving)


def _half(found: Found, rank: dict[str, Any]) -> int:
    """In the first place the second half leaves, and the other way round."""
    return 1 - next(i for i, each in enumerate(found) if each is rank) % PLACES


def test_fsdp_over_tensor_parallelism(found: Found) -> None:
    model = nn.Sequential(*whole_stages())
    unsplit_loss(model, 0, BESIDE).backward()
    expected = gradients(model)
    for rank in found:
        assert_close(rank["twice"]["grads"], expected)
        assert math.isclose(rank["twice"]["norm"], norm_of(expected), rel_tol=1e-5)
        assert rank["twice"]["split"] == rank["fsdp"]["split"]


def test_weights_are_left_to_w(found: Found) -> None:
    """Norms are not deferred, which have 10 of the 59 weights of a block."""
    for rank in found:
        for name in ("fsdp", "tp"):
            assert rank[name]["split"]["native"] == pytest.approx(49 / 59)
        assert rank["fsdp, never split"]["split"]["native"] == 0.0


def test_fsdp_gathers_and_reduces_once_a_step(found: Found) -> None:
    """Each of two blocks in each stage, and not for every micro-batch."""
    for rank in found:
        for name, num_blocks in (("fsdp", 2 * 2), ("fsdp, 1f1b", 2)):
            assert rank[name]["gathers"] == rank[name]["reductions"] == num_blocks


def test_gradients_add_up_over_steps(found: Found) -> None:
    model = nn.Sequential(*whole_stages())
    unsplit_loss(model, 0, BESIDE).backward()
    twice = {name: 2 * grad for name, grad in gradients(model).items()}
    for rank in found:
        assert_close(rank["accumulated"]["grads"], twice)


@pytest.mark.parametrize("name", ["fsdp trained", "tp trained"])
def test_training(found: Found, name: str) -> None:
    model = nn.Sequential(*whole_stages())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    norms = []
    for step in range(STEPS):
        unsplit_loss(model, step, replicas_of(name)).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIPPED_TO)))
        optimizer.step()
        optimizer.zero_grad()
    expected = dict(model.named_parameters())
    rows = batch(STEPS, 0)
    for number, rank in enumerate(found):
        result = rank[name]
        assert result["norms"] == pytest.approx(norms, rel=1e-4)
        assert_close(result["parameters"], expected, rtol=1e-3, atol=1e-5)
        half = rows.split(HALF)[1 - number % PLACES]
        losses = torch.stack([criterion(model(x), x.sin()) for x in half.split(ROWS)])
        torch.testing.assert_close(result["evaluated"], losses, rtol=1e-3, atol=1e-5)
        assert not result["warnings"]


def test_bf16_with_sums_in_float32(found: Found) -> None:
    """Parity to bf16's own precision, with types as FSDP's policy has them."""
    model = nn.Sequential(*whole_stages())
    unsplit_loss(model, 0, BESIDE).backward()
    expected = gradients(model)
    for rank in found:
        assert rank["bf16"]["dtypes"] == {"torch.float32"}
        assert_close(rank["bf16"]["grads"], expected, rtol=0.1, atol=0.02)


def test_a_step_after_failed_ones(found: Found) -> None:
    """Every failure is one of all replicas, and nothing of it is left in FSDP's hands."""
    model = nn.Sequential(*whole_stages())
    unsplit_loss(model, 0, BESIDE).backward()
    for rank in found:
        mistaken, *failures = rank["after failures"]["failures"]
        told = "failed on another replica" if rank["beside"] else "num_microbatches is 9"
        assert told in mistaken.text
        if rank["beside"]:  # the other one has abandoned a step
            assert "failed on another replica" in failures.pop(0).text
        for (_, replicas, _, _), failure in zip(FAILURES, failures, strict=True):
            assert failure.error == "PipelineError"
            ours = rank["beside"] in replicas
            assert ("no more" if ours else "failed on another replica") in failure.text
        assert_close(rank["after failures"]["grads"], gradients(model))


def test_a_failure_where_some_ranks_hold_whole_stages(found: Found) -> None:
    model = nn.Sequential(*whole_stages())
    unsplit_loss(model, 0, BESIDE).backward()
    for rank in found:
        result = rank["one place fails"]
        assert result["failure"].error == "PipelineError"
        told = "no more" if rank["beside"] else "failed on another replica"
        assert told in result["failure"].text
        if result["grads"]:
            assert_close(result["grads"], gradients(model))


@pytest.mark.parametrize(("name", "factor"), [("halved", 0.5), ("quartered", 0.25)])
def test_a_step_has_the_weights_of_its_beginning(found: Found, name: str, factor: float) -> None:
    model = nn.Sequential(*whole_stages())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(factor)
    unsplit_loss(model, 0, BESIDE).backward()
    for rank in found:
        assert_close(rank["current"][name], gradients(model))


def test_partial_sums_are_added_first(found: Found) -> None:
    model = nn.Sequential(*in_sequence_stages())
    for rows in in_sequence_rows().split(ROWS):
        sum_of_squares(model(rows), rows.sin()).backward()
    expected = gradients(model)
    for rank in found:
        assert rank["partial"]["grads"].keys() == expected.keys()
        assert_close(rank["partial"]["grads"], expected, rtol=1e-3, atol=1e-3)
        assert math.isclose(rank["partial"]["norm"], norm_of(expected), rel_tol=1e-4)


def test_a_gradient_of_one_copy_alone(found: Found) -> None:
    model = nn.Sequential(*(SometimesUsed(stage) for stage in whole_stages()))
    for replica in range(BESIDE):
        rows = found[replica * PLACES]["unused"]["whole"]
        for part in rows.split(ROWS):
            (criterion(model(part), part.sin()) / BESIDE).backward()
    expected = gradients(model)
    for rank in found:
        result = rank["unused"]
        assert set(result["placements"]) == {"(Shard(dim=0),)"}
        assert_close(
            {k: g for k, g in result["grads"].items() if g is not None},
            expected,
            rtol=1e-4,
            atol=1e-4,
        )
        assert all(result["grads"][f"{stage}.scale.weight"] is not None for stage in range(PLACES))


def test_copies_that_differ_in_a_shard(found: Found) -> None:
    for rank in found:
        before, after = rank["copies"]
        assert before.is_a("ValueError")
        assert "two copies of stage" in before.text
        assert not after.error


def test_copies_that_are_held_in_other_ways(found: Found) -> None:
    for rank in found:
        assert rank["one place"].is_a("ValueError")
        assert "sharded S(0) on (2,)" in rank["one place"].text


@pytest.mark.parametrize(
    ("what", "remedy"),
    [
        ("save", "torch.distributed.checkpoint"),
        ("wrapper", "loop of your own"),
        ("output", r"to_local()"),
        ("late", "call fully_shard() on stages first"),
        ("ddp", "is wrapped in DistributedDataParallel"),
        ("replicate", "was given to replicate()"),
        ("main_grad", "is sharded and has a main_grad"),
        ("fsdp1", "is wrapped in FullyShardedDataParallel"),
    ],
)
def test_what_cannot_be_sharded_says_so(found: Found, what: str, remedy: str) -> None:
    for rank in found:
        assert remedy in rank["refused"][what].text


def test_shards_are_saved_and_loaded_by_torch(found: Found) -> None:
    model = dict(nn.Sequential(*whole_stages()).named_parameters())
    for rank in found:
        saved, loaded = rank["resumed"]["saved"], rank["resumed"]["loaded"]
        assert saved.keys() == loaded.keys()
        for name in saved:
            assert torch.equal(saved[name], loaded[name])
            assert not torch.equal(saved[name], model[name])
