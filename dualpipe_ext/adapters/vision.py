"""Vision models: residual networks, whose blocks are in several lists, and vision transformers."""

from __future__ import annotations

from dualpipe_ext.adapters.transformer import TransformerLayerAdapter

__all__ = ["VisionModelAdapter"]


class VisionModelAdapter(TransformerLayerAdapter):
    """ResNet-like models and vision transformers: their blocks, in one list or in several.

    As :class:`TransformerLayerAdapter`; a layer is a whole residual block, so that no skip
    connection is cut. What lies between lists (pooling, a convolution) goes with the block before.
    """
