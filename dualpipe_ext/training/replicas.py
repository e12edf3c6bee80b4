"""Data parallelism: pipelines side by side, whose gradients are summed."""

from __future__ import annotations

from itertools import chain
from zlib import crc32

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from dualpipe_ext._buffers import average_over
from dualpipe_ext._handshake import collect
from dualpipe_ext._replicas import ReplicaRanks
from dualpipe_ext.host_groups import group_at, reaching
from dualpipe_ext.pipeline import Pipeline
from dualpipe_ext.training.gradient_sums import find_gradients, make_buckets

__all__ = ["Replicas", "split_mesh"]

Groups = tuple[dist.ProcessGroup, dist.ProcessGroup]


def split_mesh(
    mesh: DeviceMesh, process_group: object = None, replica_group: object = None
) -> Groups:
    """Returns the groups of a mesh with axes ``"pp"`` and ``"dp"``: a pipeline and its replicas.

    Args:
        mesh: a mesh of all ranks.
        process_group: a group given besides the mesh, which must be ``None``.
        replica_group: likewise.

    Raises:
        ValueError: the mesh has other axes, or a group was given besides it.
    """
    if process_group is not None or replica_group is not None:
        raise ValueError("mesh= has both groups; leave out process_group= and replica_group=")
    names = mesh.mesh_dim_names or ()
    if sorted(names) != ["dp", "pp"]:
        raise ValueError(
            f"mesh= has the axes {list(names)}; it needs 'pp' and 'dp', as in init_device_mesh('cpu', "
            f"(2, 4), mesh_dim_names=('dp', 'pp')) for two pipelines of four ranks"
        )
    return mesh.get_group("pp"), mesh.get_group("dp")


class Replicas(ReplicaRanks):
    """Pipelines side by side, whose copies of parameters and gradients are kept equal."""

    def begin(self, pipeline: Pipeline) -> None:
        """Overwrites parameters and buffers with those of the first replica.

        Args:
            pipeline: the pipeline of this rank.

        Raises:
            ValueError: the groups are not those of pipelines side by side, or replicas have
                different stages.
            PipelineError: another replica failed.
        """
        if self.group is None:
            return
        group = self.group
        self.together(lambda: _check_places(group, pipeline))
        self._check_alike(pipeline)
        with reaching("another replica"):
            for tensor in (each.detach() for _, each in _tensors(pipeline)):
                dist.broadcast(tensor, group=group_at(group, tensor.device), group_src=0)

    def _check_alike(self, pipeline: Pipeline) -> None:
        """Raises, on all ranks, if replicas hold different tensors on any rank."""
        layout = [(n, str(t.dtype), tuple(t.shape)) for n, t in _tensors(pipeline)]
        differs = len(set(self.gather(float(crc32(repr(layout).encode()))))) > 1
        found = pipeline.group.all_gather_floats([float(differs)], pipeline.config.timeout)
        ranks = [rank for rank, (flag,) in enumerate(found) if flag]
        if ranks:
            raise ValueError(
                f"the replicas have other stages, by their names, shapes or types, on ranks {ranks} "
                f"of their pipelines; give all of them the same model, cut alike"
            )

    def sum_gradients(self, pipeline: Pipeline) -> None:
        """Sums gradients over all copies of each stage, those of replicas and of mirrors, in place.

        All copies get the same bits: each of two mirrors adds the sum over its own replicas, which
        is the same on all of these, and the sum over the other's. A gradient that is ``None`` on
        all copies stays ``None``.

        Raises:
            Exception: what went wrong on this rank, once all ranks of all replicas know of it.
            PipelineError: another rank failed, or cannot be reached.
        """
        try:
            if self.group is not None:
                self._sum_over_replicas(self.group, pipeline)
        except BaseException as error:  # other ranks of this pipeline must not wait for this one
            pipeline.abandon_sum(error)
            raise
        self.together(pipeline.sync_gradients)

    def _sum_over_replicas(self, group: dist.ProcessGroup, pipeline: Pipeline) -> None:
        """Keeps what may fail on one rank apart from collectives, in which others would wait."""
        parameters, num_bytes = list(pipeline.parameters()), pipeline.config.bucket_bytes
        found = find_gradients(parameters, group)
        buckets = self.together(lambda: make_buckets(parameters, found, num_bytes))
        for bucket in buckets:
            bucket.sum(group)

    def average_buffers(self, pipeline: Pipeline) -> None:
        """Sets each buffer that has a mean to its mean over all copies; all ranks call it.

        Such buffers are the statistics of batch norms. What is evaluated or saved must not depend
        on the copy.
        """
        self.together(pipeline.sync_buffers)
        average_over(self.group, pipeline.buffers())


def _tensors(pipeline: Pipeline) -> list[tuple[str, Tensor]]:
    return [*pipeline.named_parameters(), *pipeline.named_buffers()]


def _check_places(replicas: dist.ProcessGroup, pipeline: Pipeline) -> None:
    """Raises, on all ranks, if the groups of any are not those of pipelines side by side."""
    told = collect(
        pipeline.group,
        pipeline.config.timeout,
        lambda: {"replicas": dist.get_process_group_ranks(replicas), "index": replicas.rank()},
        "could not name its replicas",
    )
    by_place: list[list[int]] = [facts["replicas"] for facts in told]
    everybody = list(chain(*by_place))
    if len({len(ranks) for ranks in by_place}) > 1 or len(set(everybody)) < len(everybody):
        raise ValueError(
            f"the replicas of the ranks of this pipeline are {by_place}; each needs a group of "
            f"equally many, and none may be in two of them"
        )
    numbers = [facts["index"] for facts in told]
    if len(set(numbers)) > 1:  # they would take the rows of different replicas
        raise ValueError(
            f"the ranks of this pipeline have the numbers {numbers} among their replicas, which are "
            f"{by_place}: torch numbers the ranks of a group in ascending order; choose pipelines "
            f"whose order is the same in each group, as init_device_mesh() does"
        )
