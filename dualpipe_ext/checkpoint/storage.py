"""Values on disk, in the format of ``torch.distributed.checkpoint``.

Its own ``save()`` exchanges plans over a torch process group, which ranks that are threads do not
have. So its steps are taken here, with its planners, writer and reader, and what has to be
exchanged travels as texts over the pipeline's group. ``dcp.load()`` can read the resulting folder.

Functions import what they need of it only when they are called: that takes more than a second, a
third of what importing this package and torch takes, and most processes save nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dualpipe_ext._ranks import Ranks

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
    from torch.distributed.checkpoint.planner import SavePlan

__all__ = [
    "DESCRIPTION",
    "FAILURE",
    "Record",
    "read_metadata",
    "read_values",
    "records",
    "shape_of",
    "write_values",
]

FAILURE = "could not save the checkpoint"
DESCRIPTION = ".metadata"  # the file that says what is where in the other files
Record = tuple[str, int, int]  # the bytes of a value: (file, offset, length)


def write_values(ranks: Ranks, folder: Path, values: Mapping[str, Any]) -> list[Record]:
    """Writes the values of all ranks, each key on one rank, and waits until they are on disk.

    Returns:
        Where the values of this rank are.

    Raises:
        Exception: what went wrong on this rank.
        PipelineError: another rank failed.
    """
    from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
    from torch.distributed.checkpoint.filesystem import FileSystemWriter

    planner = DefaultSavePlanner(flatten_state_dict=False)
    writer = FileSystemWriter(folder, single_file_per_rank=True, sync_files=True, overwrite=False)

    def describe() -> SavePlan:
        if not folder.is_dir():
            raise FileNotFoundError(
                f"rank {ranks.rank} does not see {folder}, which rank 0 has made; save to a file "
                f"system that all ranks share"
            )
        planner.set_up_planner(dict(values), writer.storage_meta(), ranks.is_first)
        writer.set_up_storage_writer(ranks.is_first)
        return writer.prepare_local_plan(planner.create_local_plan())

    # Every rank computes the same, so nothing has to be sent back.
    plans, metadata = planner.create_global_plan(ranks.share(describe, FAILURE))
    own = planner.finish_plan(writer.prepare_global_plan(plans)[ranks.rank])
    results = ranks.share(lambda: writer.write_data(own, planner).wait(), FAILURE)
    ranks.from_first(lambda: writer.finish(metadata, results), FAILURE)
    return [_record(result.storage_data) for result in results[ranks.rank]]


def read_metadata(folder: Path) -> Metadata:
    """Reads the metadata of a folder."""
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    return FileSystemReader(folder).read_metadata()


def shape_of(metadata: Metadata, key: str) -> list[int] | None:
    """Returns the shape of a tensor; ``None`` for anything else."""
    entry = _tensor_at(metadata, key)
    return None if entry is None else list(entry.size)


def records(metadata: Metadata, keys: Iterable[str]) -> list[Record]:
    """Returns where the values of these keys are."""
    wanted = set(keys)
    places = metadata.storage_data.items()
    return [_record(place) for index, place in places if index.fqn in wanted]


def read_values(folder: Path, metadata: Metadata, keys: Iterable[str]) -> dict[str, Any]:
    """Reads the values of these keys; tensors are in host memory."""
    from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    values = {key: _blank(metadata, key) for key in keys}
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    reader = FileSystemReader(folder)
    planner.set_up_planner(values, metadata, is_coordinator=True)
    reader.set_up_storage_reader(metadata, is_coordinator=True)
    local = reader.prepare_local_plan(planner.create_local_plan())
    (plan,) = reader.prepare_global_plan(planner.create_global_plan([local]))
    reader.read_data(planner.finish_plan(plan), planner).wait()
    return values


def _record(place: Any) -> Record:
    return place.relative_path, place.offset, place.length


def _blank(metadata: Metadata, key: str) -> torch.Tensor | None:
    entry = _tensor_at(metadata, key)
    return None if entry is None else torch.empty(entry.size, dtype=entry.properties.dtype)


def _tensor_at(metadata: Metadata, key: str) -> TensorStorageMetadata | None:
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    entry = metadata.state_dict_metadata[key]
    return entry if isinstance(entry, TensorStorageMetadata) else None
