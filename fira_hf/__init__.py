"""Fira (arXiv 2410.01623) for Hugging Face Trainer and PEFT: full-rank training with low-rank optimizer memory."""

from .callbacks import FiraCallback
from .config import PRESETS, PUBLISHED, FiraConfig
from .factory import fira_adamw, get_fira_optimizer
from .optimizer import FiraAdamW
from .trainer import register
from .wrappers import unwrapped

__version__ = "0.1.0"
__all__ = [
    "PRESETS",
    "PUBLISHED",
    "FiraAdamW",
    "FiraCallback",
    "FiraConfig",
    "fira_adamw",
    "get_fira_optimizer",
    "register",
    "unwrapped",
]

register()
