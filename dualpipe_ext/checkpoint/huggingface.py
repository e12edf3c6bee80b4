"""Imports and exports weights from and to folders of Hugging Face's ``save_pretrained``.

Both go through a checkpoint of only the weights, of which each rank writes or reads its own stages:
only rank 0 ever has the whole model, in host memory.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from dualpipe_ext._buffers import average_over
from dualpipe_ext._ranks import Ranks
from dualpipe_ext._replicas import ReplicaRanks
from dualpipe_ext.checkpoint.folders import find_checkpoint
from dualpipe_ext.checkpoint.holdings import Holding
from dualpipe_ext.checkpoint.load import load_checkpoint
from dualpipe_ext.checkpoint.save import save_checkpoint
from dualpipe_ext.checkpoint.saved import Saved
from dualpipe_ext.host_groups import TIMEOUT_S
from dualpipe_ext.pipeline import Pipeline

__all__ = ["export_pretrained", "import_pretrained"]


def export_pretrained(
    folder: str | os.PathLike[str],
    pipeline: Pipeline,
    model: nn.Module,
    *,
    scratch: str | os.PathLike[str] | None = None,
    replicas: dist.ProcessGroup | None = None,
    timeout: float = TIMEOUT_S,
    **options: Any,
) -> None:
    """Writes the weights of a pipeline as the model's ``save_pretrained`` does; all ranks call it.

    As for :func:`save_checkpoint`, buffers with a mean are set to their mean over all copies first.

    Args:
        folder: the folder to write.
        pipeline: a pipeline of a model's partitions.
        model: the model that was cut, or one like it, on any device and possibly without values:
            it provides the class and the configuration, and is not changed.
        scratch: a folder that all ranks share, in which to assemble the weights; by default the
            parent of ``folder``.
        replicas: as for :func:`save_checkpoint`; the first replica writes.
        timeout: seconds to wait for the slowest rank.
        options: further arguments of ``save_pretrained``, such as ``max_shard_size``.

    Raises:
        TypeError: ``model`` is not a transformers model.
        Exception: what went wrong on this rank.
        PipelineError: another rank failed.
    """
    source: Any = model

    def prepare() -> Ranks:
        holding = Holding.of(pipeline, timeout)
        holding.meet()
        ranks = holding.ranks
        ranks.share(lambda: _check(model, "save_pretrained"), _FAILURE)
        pipeline.sync_buffers()
        return ranks

    def write(weights: Path) -> None:
        saved = Saved.at(find_checkpoint(weights))
        values = saved.read("model", saved.keys("model"))
        source.save_pretrained(folder, state_dict=_tied(model, values), **options)

    def export() -> None:
        with _scratch(ranks, scratch or Path(folder).absolute().parent) as weights:
            save_checkpoint(weights, pipeline, step=0, timeout=timeout)
            ranks.from_first(lambda: write(weights), _FAILURE)

    others = ReplicaRanks(replicas)
    ranks = others.together(prepare, _FAILURE)
    average_over(replicas, pipeline.buffers())
    others.from_first(export, _FAILURE)


def import_pretrained(
    folder: str | os.PathLike[str],
    pipeline: Pipeline,
    model: nn.Module,
    *,
    scratch: str | os.PathLike[str] | None = None,
    timeout: float = TIMEOUT_S,
    **options: Any,
) -> None:
    """Loads the weights in a folder of ``save_pretrained`` into a pipeline; all ranks call it.

    Args:
        folder: the folder, or anything else that ``from_pretrained`` takes.
        pipeline: a pipeline of a model's partitions.
        model: as for :func:`export_pretrained`; its class reads the folder, on rank 0.
        scratch: a folder that all ranks share, in which to split the weights; by default the
            system's folder for temporary files, which the ranks of one machine share.
        timeout: seconds to wait for the slowest rank.
        options: further arguments of ``from_pretrained``.

    Raises:
        TypeError: ``model`` is not a transformers model.
        ValueError: the weights are those of another architecture.
        Exception: what went wrong on this rank.
        PipelineError: another rank failed.
    """
    holding = Holding.of(pipeline, timeout)
    holding.meet()
    ranks = holding.ranks
    ranks.share(lambda: _check(model, "from_pretrained"), _FAILURE)

    kind: Any = type(model)

    def read(weights: Path) -> None:
        save_checkpoint(weights, kind.from_pretrained(folder, **options), step=0)

    with _scratch(ranks, scratch or tempfile.gettempdir()) as weights:
        ranks.from_first(lambda: read(weights), _FAILURE)
        load_checkpoint(weights, pipeline, timeout=timeout)


_FAILURE = "could not convert the weights"


def _check(model: nn.Module, method: str) -> None:
    if not callable(getattr(model, method, None)):
        raise TypeError(
            f"a {type(model).__name__} has no {method}(); give the model of transformers that was "
            f"cut, or one of the same class and configuration"
        )
    if any(type(module).__module__.startswith("peft.") for module in model.modules()):
        raise TypeError(
            f"a {type(model).__name__} with layers of peft is no model of transformers any more: "
            f"load a checkpoint of the run into it in one piece (load_checkpoint()), and let peft "
            f"save or merge the adapter, as docs/your_model.md shows"
        )


@contextmanager
def _scratch(ranks: Ranks, parent: str | os.PathLike[str]) -> Iterator[Path]:
    """Provides a temporary folder for the ranks, and removes it afterwards."""
    name = ranks.from_first(lambda: f".weights-{uuid.uuid4().hex}", _FAILURE)
    folder = Path(parent) / name
    try:
        yield folder
    finally:
        if ranks.is_first:
            shutil.rmtree(folder, ignore_errors=True)


def _tied(model: nn.Module, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Makes all names of a parameter refer to one tensor, as ``save_pretrained`` expects."""
    first: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        values[name] = values[first.setdefault(id(parameter), name)]
    return values
