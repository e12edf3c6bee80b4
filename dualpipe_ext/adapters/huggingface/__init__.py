"""Adapters for Hugging Face's transformers models."""

from dualpipe_ext.adapters.huggingface.adapter import HuggingFaceAdapter
from dualpipe_ext.adapters.huggingface.families import FAMILIES, Family

__all__ = ["FAMILIES", "Family", "HuggingFaceAdapter"]
