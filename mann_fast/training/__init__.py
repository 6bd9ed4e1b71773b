"""Training, evaluation and use of classifiers on episodes, and training on sequence tasks and bAbI."""

from .babi import BabiTrainer
from .checkpoint import load_checkpoint, restore_model
from .config import BabiConfig, SequenceConfig, TrainConfig
from .evaluation import InstanceAccuracy, Interrupted, evaluate
from .loop import has_learned, resume_run, start_run, summarise, summarise_babi, summarise_task, train
from .prediction import predict
from .recall import Recall
from .run import TrainingDiverged
from .sequences import SequenceTrainer
from .trainer import Trainer

__all__ = [
    "BabiConfig",
    "BabiTrainer",
    "InstanceAccuracy",
    "Interrupted",
    "Recall",
    "SequenceConfig",
    "SequenceTrainer",
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
    "summarise_babi",
    "summarise_task",
    "train",
]
