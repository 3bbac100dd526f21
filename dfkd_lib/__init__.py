"""Distilling Without Data: data-free knowledge distillation, one module per paper."""

__version__ = "0.1.0"
