"""Models with layers of peft: trained in stages, and their adapters saved whole."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_models import ARCHITECTURES
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from torch.optim import AdamW

from dualpipe_ext import DualPipe, TrainingWrapper, setup_dual_pipe
from dualpipe_ext.adapters import get_model_adapter
from dualpipe_ext.checkpoint import export_pretrained, load_checkpoint
from dualpipe_ext.testing import run_ranks

# peft asks transformers by a name that is going away.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

CONFIG = LoraConfig(r=2, target_modules=["q_proj", "v_proj"])


def make_base() -> Any:
    torch.manual_seed(0)
    return ARCHITECTURES["llama"].make()


def adapted() -> Any:
    model = make_base()
    torch.manual_seed(1)
    return get_peft_model(model, CONFIG)


def batch(model: Any) -> dict[str, Tensor]:
    text = torch.randint(
        model.config.vocab_size, (8, 6), generator=torch.Generator().manual_seed(2)
    )
    return {"input_ids": text, "labels": text}


def test_an_adapter_is_saved_whole(tmp_path: Path) -> None:
    made = adapted()

    def train(rank: int, size: int) -> float:
        with_adapter = copy.deepcopy(made)
        model = with_adapter.get_base_model()
        config = setup_dual_pipe(model, num_stages=size)
        training = TrainingWrapper(model, config, AdamW, optimizer_options={"lr": 1e-2})
        for _ in range(3):
            training.train_step(batch(model))
        place = training.save_checkpoint(tmp_path / "run")
        if rank == 0:
            load_checkpoint(place, model)
            with_adapter.save_pretrained(tmp_path / "adapter")
        return float(training.evaluate(batch(model)))

    size = 4
    losses = run_ranks(train, size)
    again = PeftModel.from_pretrained(make_base(), tmp_path / "adapter").eval()
    trained = [p for name, p in again.named_parameters() if "lora_B" in name]
    assert len(trained) >= 2 * size and all(bool(p.any()) for p in trained)
    with torch.no_grad():
        assert losses == pytest.approx([float(again(**batch(again)).loss)] * size, rel=1e-5)


def test_the_model_around_it_is_refused() -> None:
    with pytest.raises(ValueError, match=r"PeftModel\w*\) wraps .* pass model\.get_base_model\(\)"):
        get_model_adapter(adapted())


def test_it_is_not_exported_as_one_of_transformers(tmp_path: Path) -> None:
    def export(rank: int, size: int) -> None:
        model = adapted().get_base_model()
        partition = get_model_adapter(model).partition(size, show=False)[rank]
        pipeline = DualPipe([partition, partition])
        with pytest.raises(TypeError, match=r"layers of peft .*load_checkpoint\(\)"):
            export_pretrained(tmp_path / "model", pipeline, model)

    run_ranks(export, 2)
