"""Pretrain your own GPT-2-class language model on the one machine you have."""

__version__ = "0.1.0"
