"""Data parallelism: pipelines side by side train as the model does in one piece."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from replicas import BATCH, SAMPLES, WITHOUT_LABELS, die, load_sharded, train, train_unsplit
from saved_runs import check_same, joined

from dualpipe_ext.testing import run_ranks
from dualpipe_ext.training import ReplicaBatchSampler, collate_rows

PIPELINE = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("replicas")


@pytest.fixture(scope="module")
def found(folder: Path) -> list[dict[str, Any]]:
    """What two pipelines of four ranks came to, by rank of the default group."""
    return run_ranks(train, 2 * PIPELINE, "processes", (folder,), timeout=150.0)


def test_trains_as_in_one_piece(found: list[dict[str, Any]]) -> None:
    expected = train_unsplit()
    assert len(expected["losses"]) == 8
    for result in found:
        assert result["losses"] == pytest.approx(expected["losses"], rel=1e-5)
        assert result["norms"] == pytest.approx(expected["norms"], rel=1e-4)
        assert result["evaluated"] == pytest.approx(expected["evaluated"], rel=1e-5)
        for (_, name), value in result["state"].items():
            wanted = expected["state"][name]
            torch.testing.assert_close(value, wanted, rtol=1e-4, atol=1e-5, msg=name)


def test_all_copies_have_the_same_bits(found: list[dict[str, Any]]) -> None:
    first: dict[Any, torch.Tensor] = {}
    for result in found:
        assert result["losses"] == found[0]["losses"]
        for key, value in result["state"].items():
            assert torch.equal(value, first.setdefault(key, value)), key


def test_ends_that_read_their_own_rows_change_no_number(found: list[dict[str, Any]]) -> None:
    for result in found:
        mirrored, single = result["halves"]["dualpipe"], result["halves"]["1f1b"]
        assert mirrored == pytest.approx(single, rel=1e-6)
        assert mirrored[:-1] == pytest.approx(result["losses"][:WITHOUT_LABELS], rel=1e-6)


def test_optimizer_states_in_shards_change_no_number(found: list[dict[str, Any]]) -> None:
    for result in found:
        assert result["sharded"]["losses"] == pytest.approx(result["losses"], rel=1e-6)
        assert 0.2 < result["sharded"]["share"] < 0.8


def test_a_gradient_that_is_not_finite_is_one_of_all_replicas(found: list[dict[str, Any]]) -> None:
    for result in (each["sharded"] for each in found):
        check_same(result["after"], result["before"])
        assert (result["scale"], result["updates"]) == (2.0**9, len(result["losses"]) // 2)


def test_shards_of_replicas_go_on_in_a_smaller_pipeline(
    found: list[dict[str, Any]], folder: Path
) -> None:
    loaded = run_ranks(load_sharded, 2, args=(folder,))
    saved = [each["sharded"] for each in found]
    check_same(joined([state for state, _, _ in loaded]), joined([each["after"] for each in saved]))
    for _, updates, scale in loaded:
        assert (scale, updates) == (saved[0]["scale"], saved[0]["updates"])


def test_a_killed_rank_is_told_in_all_replicas(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"rank 3 died with exit code -9"):
        run_ranks(die, 4, "processes", (tmp_path,), timeout=100.0)
    for rank in range(3):
        error, seconds, text = (tmp_path / str(rank)).read_text().split(": ", 2)
        assert error == "PipelineError" and float(seconds) < 20.0, (rank, text)


def test_a_failure_is_one_of_all_replicas(found: list[dict[str, Any]]) -> None:
    """Each with its own words, within seconds; training goes on."""
    for rank, result in enumerate(found):
        batch, stage, different, summed, update, predict, construction = result["failures"]
        assert batch.is_a("ValueError" if rank == 1 else "PipelineError"), (rank, batch)
        assert stage.is_a("PipelineError"), (rank, stage)
        assert different.is_a("ValueError" if rank < PIPELINE else "PipelineError"), (
            rank,
            different,
        )
        assert predict.error == ("ValueError" if rank == 1 else "PipelineError"), predict
        assert result["num_steps"] == found[0]["num_steps"]  # of which random numbers depend
        for outcome in (summed, update):
            assert outcome.error == ("RuntimeError" if rank == 1 else "PipelineError"), outcome
        assert construction.is_a("ValueError" if rank == 1 else "PipelineError"), construction
        assert "reduction='median'" in construction.text
        assert "found [3, 8]" in batch.text and "out of luck" in stage.text
        assert "out of luck" in summed.text and "out of luck" in update.text
        if rank >= PIPELINE:
            for outcome in (stage, different, summed, update, predict, construction):
                assert "replica 0 has failed" in outcome.text
        assert max(outcome.seconds for outcome in result["failures"]) < 10.0
        assert result["evaluated again"] == result["evaluated"]


def test_predictions_do_not_depend_on_the_replica(found: list[dict[str, Any]]) -> None:
    for rank, result in enumerate(found):
        ends = rank % PIPELINE in (0, PIPELINE - 1)
        assert (result["predicted"] is not None) == ends
        if ends:
            assert torch.equal(result["predicted"], found[0]["predicted"])


def test_exported_statistics_are_those_of_all_replicas(found: list[dict[str, Any]]) -> None:
    means = [mean for result in found for mean in result["exported"][0]]
    assert len(means) == 4 and not torch.allclose(means[0], means[-1])
    for result in found:
        torch.testing.assert_close(result["exported"][1], torch.stack(means).mean(0))


def test_an_export_that_one_replica_cannot_make(found: list[dict[str, Any]]) -> None:
    for rank, result in enumerate(found):
        outcome = result["exported"][2]
        assert outcome.is_a("PipelineError" if rank < PIPELINE else "TypeError"), outcome
        assert "a Linear has no save_pretrained()" in outcome.text and outcome.seconds < 10


def test_replicas_are_cut_alike(found: list[dict[str, Any]]) -> None:
    """By what the first one has measured; those of other models are refused."""
    assert all(rank["cut"] == found[0]["cut"] for rank in found)
    assert sum(len(layers) for layers in found[0]["cut"]) == 8
    for rank in found:
        outcome = rank["other stages"]
        assert outcome.is_a("ValueError") and outcome.seconds < 10, outcome
        assert "replicas" in outcome.text


def shares(num_replicas: int, **options: Any) -> list[list[list[int]]]:
    return [
        list(
            ReplicaBatchSampler(
                SAMPLES, BATCH, replica=replica, num_replicas=num_replicas, **options
            )
        )
        for replica in range(num_replicas)
    ]


@pytest.mark.parametrize("drop_last", [False, True])
def test_replicas_share_the_batches_of_one(drop_last: bool) -> None:
    (whole,) = shares(1, drop_last=drop_last)
    assert len(whole) == len(ReplicaBatchSampler(SAMPLES, BATCH, drop_last=drop_last))
    four = shares(4, drop_last=drop_last)
    assert [list(chain(*parts)) for parts in zip(*four, strict=True)] == whole
    assert drop_last or sorted(chain(*whole)) == list(range(SAMPLES))
    assert {len(batch) for batch in four[0][:2]} == {5} and {len(b) for b in four[3][:2]} == {4}


def test_a_replica_may_have_no_last_batch() -> None:
    samplers = [
        ReplicaBatchSampler(9, 4, replica=replica, num_replicas=2, drop_last=False)
        for replica in range(2)
    ]
    assert [len(sampler) for sampler in samplers] == [3, 2]
    assert [[len(batch) for batch in sampler] for sampler in samplers] == [[2, 2, 1], [2, 2]]
    assert collate_rows([]) is None


def test_epochs_have_orders_of_their_own() -> None:
    sampler = ReplicaBatchSampler(SAMPLES, BATCH)
    first = list(sampler)
    sampler.set_epoch(1)
    assert list(sampler) != first
    sampler.set_epoch(0)
    assert list(sampler) == first
    in_order = ReplicaBatchSampler(SAMPLES, BATCH, shuffle=False, drop_last=False)
    assert list(chain(*in_order)) == list(range(SAMPLES))


def test_a_part_of_the_rows() -> None:
    sampler = ReplicaBatchSampler(SAMPLES, BATCH, rows=lambda rows: range(rows // 2, rows))
    assert list(sampler) == [batch[9:] for batch in ReplicaBatchSampler(SAMPLES, BATCH)]


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"replica": 2, "num_replicas": 2}, "replica=2: it must be from 0 to 1"),
        ({"batch_size": 1, "num_replicas": 2}, "batch_size=1"),
        ({"batch_size": 99}, "45 samples"),
    ],
)
def test_wrong_shares(options: dict[str, Any], part: str) -> None:
    with pytest.raises(ValueError, match=part):
        ReplicaBatchSampler(SAMPLES, **{"batch_size": BATCH, **options})


def test_a_mesh_of_other_axes(found: list[dict[str, Any]]) -> None:
    for result in found:
        outcome = result["wrong mesh"]
        assert outcome.is_a("ValueError")
        assert "['dp', 'tp']; it needs 'pp' and 'dp'" in outcome.text


def test_groups_that_are_no_mesh(found: list[dict[str, Any]]) -> None:
    for result in found:
        assert result["wrong groups"].is_a("ValueError"), result["wrong groups"]
        assert "none may be in two of them" in result["wrong groups"].text
        assert "leave out process_group= and replica_group=" in result["mesh and groups"].text
