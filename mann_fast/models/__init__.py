"""Whole models: MANN, and the LSTM that it is compared with."""

from .lstm import LSTMClassifier
from .mann import MANN

__all__ = ["MANN", "LSTMClassifier"]
