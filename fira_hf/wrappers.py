"""Optimizers inside the wrappers of training libraries."""

from __future__ import annotations

from typing import Any


def unwrapped(optimizer: Any) -> Any:
    """The optimizer inside the wrappers of accelerate's `prepare`, Lightning and Fabric; another as it is.

    What `FiraAdamW` has beyond other optimizers (`process_group`, `track_statistics`, `summary`, `config`,
    `pop_statistics`) is to be set and read there: a wrapper keeps to itself what is set on it.
    """
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer
