"""Vision models: residual networks, whose blocks are in several lists, and vision transformers."""

from __future__ import annotations

from dualpipe_ext.adapters.transformer import TransformerLayerAdapter

__all__ = ["VisionModelAdapter"]


class VisionModelAdapter(TransformerLayerAdapter):
    """For ResNet-like models and vision transformers, with blocks in one list or in several.

    Works as :class:`TransformerLayerAdapter` does. A layer is a whole residual block, so that no
    skip connection is cut. What is between lists (pooling, a convolution) goes with the block
    before.
    """
