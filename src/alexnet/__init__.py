"""AlexNet (Krizhevsky, Sutskever and Hinton, 2012) with every gradient derived by hand.

`AlexNet`, `ModelConfig` and `load` (a checkpoint as a trained network) are imported when they are first used.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["AlexNet", "ModelConfig", "load"]

if TYPE_CHECKING:
    from alexnet.model import AlexNet, ModelConfig
    from alexnet.training.checkpoint import load


def __getattr__(name: str) -> Any:
    from importlib import import_module

    owners = {"AlexNet": "model", "ModelConfig": "model", "load": "training.checkpoint"}
    if name not in owners:
        raise AttributeError(f"module 'alexnet' has no attribute {name!r}")
    return getattr(import_module(f"alexnet.{owners[name]}"), name)
