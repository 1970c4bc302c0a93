"""The operations of the network: torch's names, arguments and meaning, with gradients derived by hand."""

from alexnet.layers.backend import Backend, Backends
from alexnet.layers.conv2d import Conv2d, conv2d
from alexnet.layers.cross_entropy import CrossEntropyLoss, cross_entropy
from alexnet.layers.dropout import Dropout, dropout, dropout_key, dropout_mask
from alexnet.layers.linear import Linear, linear
from alexnet.layers.local_response_norm import LocalResponseNorm, local_response_norm
from alexnet.layers.max_pool2d import MaxPool2d, max_pool2d
from alexnet.layers.relu import ReLU, relu
from alexnet.layers.relu_lrn_pool import ReluLrnPool, relu_lrn_pool
from alexnet.layers.same_map_norm import SameMapNorm, same_map_norm
from alexnet.layers.tanh import Tanh, tanh

__all__ = [
    "Backend",
    "Backends",
    "Conv2d",
    "CrossEntropyLoss",
    "Dropout",
    "Linear",
    "LocalResponseNorm",
    "MaxPool2d",
    "ReLU",
    "ReluLrnPool",
    "SameMapNorm",
    "Tanh",
    "conv2d",
    "cross_entropy",
    "dropout",
    "dropout_key",
    "dropout_mask",
    "linear",
    "local_response_norm",
    "max_pool2d",
    "relu",
    "relu_lrn_pool",
    "same_map_norm",
    "tanh",
]
