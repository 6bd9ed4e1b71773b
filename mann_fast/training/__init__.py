"""Training, evaluation and use of classifiers on episodes."""

from .checkpoint import load_checkpoint, restore_model
from .config import TrainConfig
from .evaluation import InstanceAccuracy, Interrupted, evaluate
from .loop import has_learned, resume_run, start_run, summarise, train
from .prediction import predict
from .trainer import Trainer, TrainingDiverged

__all__ = [
    "InstanceAccuracy",
    "Interrupted",
    "TrainConfig",
    "Trainer",
    "TrainingDiverged",
    "evaluate",
    "has_learned",
    "load_checkpoint",
    "predict",
    "restore_model",
    "resume_run",
    "start_run",
    "summarise",
    "train",
]
