"""Adapters, which cut a whole model into the stages of a pipeline."""

from dualpipe_ext.adapters.base import ModelAdapterBase
from dualpipe_ext.adapters.cost import Cost
from dualpipe_ext.adapters.empty import empty_parameters
from dualpipe_ext.adapters.imbalance import Imbalance, report_imbalance
from dualpipe_ext.adapters.partition import Partition
from dualpipe_ext.adapters.plan import PartitionPlan, Stage, StagePlan
from dualpipe_ext.adapters.registry import get_model_adapter, register_adapter
from dualpipe_ext.adapters.transformer import TransformerLayerAdapter
from dualpipe_ext.adapters.vision import VisionModelAdapter

__all__ = [
    "Cost",
    "Imbalance",
    "ModelAdapterBase",
    "Partition",
    "PartitionPlan",
    "Stage",
    "StagePlan",
    "TransformerLayerAdapter",
    "VisionModelAdapter",
    "empty_parameters",
    "get_model_adapter",
    "register_adapter",
    "report_imbalance",
]
