"""What one rank holds of a model, under the names of the unsplit model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dualpipe_ext._ranks import Ranks, alone
from dualpipe_ext._sharded import check_whole
from dualpipe_ext.adapters import Partition
from dualpipe_ext.pipeline import Pipeline

__all__ = ["Holding", "Piece", "Shapes"]

Shapes = dict[str, "list[int] | None"]  # by name; None for what is not a tensor


@dataclass(frozen=True)
class Piece:
    """One module of a rank.

    Attributes:
        stage: the number of the stage; 0 for an unsplit model.
        module: the stage or the model.
        prefix: the prefix of its names. Partitions have the names of their model. Names of other
            stages begin with the stage, as their names in the model are not known.
        is_saved: whether it is saved here, rather than on the rank that holds its other copy.
    """

    stage: int
    module: nn.Module
    prefix: str
    is_saved: bool

    def state(self) -> dict[str, Any]:
        """Returns parameters, buffers and whatever else the module's ``state_dict()`` has."""
        return {f"{self.prefix}{name}": value for name, value in self.module.state_dict().items()}

    def load(self, values: dict[str, Any]) -> None:
        """Loads the module's own entries of ``values``."""
        own = {name: values[f"{self.prefix}{name}"] for name in self.module.state_dict()}
        self.module.load_state_dict(own)

    def parameters(self) -> Iterable[tuple[str, nn.Parameter]]:
        """Yields parameters with their names; one with several names comes once with each."""
        for name, parameter in self.module.named_parameters(remove_duplicate=False):
            yield f"{self.prefix}{name}", parameter


@dataclass(frozen=True)
class Holding:
    """All modules of a rank, and the ranks that hold the others.

    Attributes:
        architecture: the name of the model's class.
        pieces: the modules of the rank, by stage.
        ranks: the ranks of the pipeline.
        pipeline: the pipeline; ``None`` for an unsplit model.
    """

    architecture: str
    pieces: tuple[Piece, ...]
    ranks: Ranks
    pipeline: Pipeline | None

    @classmethod
    def of(cls, model: nn.Module, timeout: float) -> Holding:
        """Returns what a rank of a pipeline holds, or an unsplit model.

        Raises:
            TypeError: ``model`` is not a module, or is a partition without its pipeline.
            ValueError: a parameter is sharded.
        """
        if isinstance(model, Partition) or not isinstance(model, nn.Module):
            raise TypeError(
                f"a {type(model).__name__} cannot be saved or loaded by itself; give the pipeline, "
                f"or the model in one piece"
            )
        if not isinstance(model, Pipeline):
            whole = Piece(0, model, "", is_saved=True)
            return cls(type(model).__name__, (whole,), Ranks(alone(), timeout), None)
        stages = sorted(zip(model.stages, model.module, strict=True), key=lambda pair: pair[0])
        pieces = tuple(
            Piece(
                stage, module, _prefix(stage, module), not model.is_mirrored or stage == model.rank
            )
            for stage, module in stages
        )
        return cls(_architecture(stages[0][1]), pieces, Ranks(model.group, timeout), model)

    def meet(self) -> None:
        """Meets the other ranks as at the beginning of a step; every rank calls it.

        Raises:
            ValueError: another rank calls something else; raised on all of them.
            PipelineError: another rank does not join within ``config.timeout`` seconds, or a message
                of the last step failed.
        """
        if self.pipeline is not None:
            self.pipeline.synchronize()

    def check_whole(self) -> None:
        """Raises if this rank holds parts of parameters.

        Raises:
            ValueError: it does.
        """
        for piece in self.pieces:
            check_whole(
                piece.module,
                "checkpoints of dualpipe_ext hold whole parameters",
                "save and load shards with torch.distributed.checkpoint",
            )

    @property
    def device(self) -> torch.device:
        """The device of the modules."""
        parameters = (p for piece in self.pieces for _, p in piece.parameters())
        return next((p.device for p in parameters), torch.device("cpu"))

    @property
    def seed(self) -> int | None:
        """The seed of the pipeline's random numbers, such as dropout's."""
        return None if self.pipeline is None else self.pipeline.config.seed

    def saved_state(self) -> dict[str, Any]:
        """Returns the state that this rank saves."""
        pieces = [piece for piece in self.pieces if piece.is_saved]
        return {name: value for piece in pieces for name, value in piece.state().items()}

    def state_names(self) -> list[str]:
        """Returns all names in the state of this rank's modules."""
        return [name for piece in self.pieces for name in piece.state()]

    def shapes(self) -> dict[int, Shapes]:
        """Returns the same names with the shapes of tensors, by stage."""
        return {
            piece.stage: {
                name: list(value.shape) if isinstance(value, Tensor) else None
                for name, value in piece.state().items()
            }
            for piece in self.pieces
        }

    def names(self) -> dict[int, list[str]]:
        """Returns all names of each parameter, by its id; that of the lowest stage comes first."""
        found = defaultdict(list)
        for piece in self.pieces:
            for name, parameter in piece.parameters():
                found[id(parameter)].append(name)
        return found

    def saved_names(self) -> dict[int, str]:
        """Returns the name, by id, of each parameter whose optimizer state this rank saves."""
        saved = {name for piece in self.pieces if piece.is_saved for name, _ in piece.parameters()}
        return {key: names[0] for key, names in self.names().items() if names[0] in saved}


def _prefix(stage: int, module: nn.Module) -> str:
    return "" if isinstance(module, Partition) else f"stages.{stage}."


def _architecture(module: nn.Module) -> str:
    return module.plan.architecture if isinstance(module, Partition) else "pipeline of own stages"
