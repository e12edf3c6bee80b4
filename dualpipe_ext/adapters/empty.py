"""Models larger than memory: their structure, without the values of their parameters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

from torch import nn

__all__ = ["empty_parameters"]


@contextmanager
def empty_parameters() -> Iterator[None]:
    """Gives modules that are made within it parameters on the meta device, and real buffers.

    For a model that is partitioned before its weights are loaded::

        with empty_parameters():
            model = MyModel(config)
        partition = get_model_adapter(model).partition(num_partitions)[rank]
        partition.to_empty(device="cuda").load_state_dict(own_weights)

    Under ``torch.device("meta")``, buffers that are in no ``state_dict()`` (rotary tables, say)
    would be lost. This affects the whole process: make no other modules meanwhile.
    """
    register = nn.Module.register_parameter

    def register_empty(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        register(module, name, param)
        if param is not None and not param.is_meta:
            empty = nn.Parameter(param.detach().to("meta"), requires_grad=param.requires_grad)
            module._parameters[name] = empty

    with mock.patch.object(nn.Module, "register_parameter", register_empty):
        yield
