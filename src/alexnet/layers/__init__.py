"""The operations of the network: torch's names, arguments and meaning, with gradients derived by hand."""

from alexnet.layers.backend import Backend, Backends
from alexnet.layers.cross_entropy import CrossEntropyLoss, cross_entropy
from alexnet.layers.dropout import Dropout, dropout, dropout_key, dropout_mask
from alexnet.layers.linear import Linear, linear
from alexnet.layers.local_response_norm import LocalResponseNorm, local_response_norm
from alexnet.layers.relu import ReLU, relu
from alexnet.layers.same_map_norm import SameMapNorm, same_map_norm
from alexnet.layers.tanh import Tanh, tanh

__all__ = [
    "Backend",
    "Backends",
    "CrossEntropyLoss",
    "Dropout",
    "Linear",
    "LocalResponseNorm",
    "ReLU",
    "SameMapNorm",
    "Tanh",
    "cross_entropy",
    "dropout",
    "dropout_key",
    "dropout_mask",
    "linear",
    "local_response_norm",
    "relu",
    "same_map_norm",
    "tanh",
]
