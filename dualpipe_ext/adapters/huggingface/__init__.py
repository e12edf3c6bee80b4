"""Adapters for models of Hugging Face's transformers."""

from dualpipe_ext.adapters.huggingface.adapter import HuggingFaceAdapter
from dualpipe_ext.adapters.huggingface.families import FAMILIES, Family

__all__ = ["FAMILIES", "Family", "HuggingFaceAdapter"]
