"""The code blocks of the documents that this project began with run, and train as unsplit models.

The examples that those documents start by name are run by test_examples.py, the bubbles of their
table are those of the simulator in test_schedule_facade.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from seed_blocks import (
    CONFIGURATION,
    YourModel,
    following,
    hugging_face_job,
    loss_of,
    run_block,
    run_core,
    run_trainers,
    texts,
)
from torch.optim import Adam, AdamW, Optimizer

from dualpipe_ext import DualPipeConfig, setup_dual_pipe
from dualpipe_ext.testing import run_ranks

RANKS = 4


@pytest.fixture(scope="module")
def core(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    folder = str(tmp_path_factory.mktemp("core"))
    return run_ranks(run_core, RANKS, "processes", (folder,))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the model of the Hugging Face block."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("trainers")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=11,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "your-model")
    return folder


@pytest.fixture(scope="module")
def trainers(folder: Path) -> list[Any]:
    return run_ranks(run_trainers, 2, "processes", (str(folder),))


def unsplit_losses(optimizer: Optimizer, model: YourModel, steps: int) -> list[float]:
    text = torch.cat(texts())
    losses = []
    for _ in range(steps):
        loss = loss_of(model(text), following(text))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def test_the_adapters_block_computes_the_losses_of_the_model(core: list[Any]) -> None:
    down, up = texts()
    for rank, half in {0: up, RANKS - 1: down}.items():
        whole = loss_of(YourModel()(half), following(half))
        torch.testing.assert_close(core[rank][0].mean(), whole, rtol=1e-5, atol=0.0)
    assert core[1][0] is None and core[2][0] is None


def test_the_integration_guide_trains_as_the_unsplit_model(core: list[Any]) -> None:
    model = YourModel()
    expected = torch.tensor(unsplit_losses(AdamW(model.parameters()), model, 6))
    for _, losses, _ in core:
        torch.testing.assert_close(torch.stack(losses).float(), expected, rtol=1e-5, atol=0.0)


def test_its_configuration_is_that_of_setup_dual_pipe() -> None:
    own = run_block(CONFIGURATION, DualPipeConfig=DualPipeConfig)["setup_dual_pipe"]
    model = YourModel()
    assert setup_dual_pipe(model, RANKS, num_microbatches=0) == own(model, RANKS)


def test_the_profile_has_the_times_of_every_rank(core: list[Any]) -> None:
    for rank, (_, _, profile) in enumerate(core):
        (found,) = profile["ranks"]
        assert (found["rank"], found["kind"], found["steps"]) == (rank, "training", 6)
        spent = found["mean_computing_seconds"] + found["mean_waiting_seconds"]
        assert 0 < spent <= found["mean_step_seconds"]
        assert len(found["last_step_seconds"]) == 6
        counts = {kind: time["count"] for kind, time in found["actions"].items()}
        forwards = sum(count for kind, count in counts.items() if "F" in kind)
        assert forwards == 6 * 8, counts


def test_the_lightning_module_trains_as_the_unsplit_model(trainers: list[Any]) -> None:
    model = YourModel()
    expected = torch.tensor(unsplit_losses(Adam(model.parameters(), lr=1e-3), model, 6))
    for losses, _ in trainers:
        torch.testing.assert_close(torch.tensor(losses), expected, rtol=1e-5, atol=0.0)


def test_the_hugging_face_trainer_trains_as_a_plain_one(trainers: list[Any], folder: Path) -> None:
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    arguments, dataset = hugging_face_job(str(folder))
    model = AutoModelForCausalLM.from_pretrained(folder / "your-model")
    plain = Trainer(model=model, args=TrainingArguments(**arguments), train_dataset=dataset)
    plain.train()
    expected = [log for log in plain.state.log_history if "loss" in log]
    logs = [log for log in trainers[0][1] if "loss" in log]
    assert len(logs) == 4 and logs[-1]["loss"] < logs[0]["loss"]
    for name in ("loss", "grad_norm"):
        found = [log[name] for log in logs]
        assert found == pytest.approx([log[name] for log in expected], rel=1e-5)
    assert all(0 < log["pipeline_step_seconds"] for log in logs)
