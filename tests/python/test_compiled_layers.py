"""Layers compiled by ``layer.compile()``, before the model is cut or after: the same numbers."""

from __future__ import annotations

import pytest
from compiled_runs import NUM_MICROBATCHES, Memory, train

from dualpipe_ext.testing import run_ranks


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("memory", ["none", "activation_checkpoint", "offload"])
def test_compiled_layers_train_as_others(memory: Memory, when: str) -> None:
    plain = run_ranks(train, 2, "processes", (memory, "never"), timeout=100.0)
    compiled = run_ranks(train, 2, "processes", (memory, when), timeout=100.0)
    num_runs = 2 if memory == "activation_checkpoint" else 1
    for (losses, _), (found, (num_compiled, num_calls)) in zip(plain, compiled, strict=True):
        assert found == pytest.approx(losses, rel=1e-6)
        assert num_compiled > 0
        assert num_calls == num_runs * NUM_MICROBATCHES / 2  # half of them go each way
