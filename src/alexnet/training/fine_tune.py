"""Training that begins with the weights of another network.

Every layer is taken over, but fc8 where the classes differ: it keeps its new random weights. With `freeze=features` the
convolutions stay as they were; they get no gradient. The input is scaled by the statistics of the new images.
"""

from typing import Any

from alexnet.data.store import sha256
from alexnet.errors import UserError
from alexnet.model import AlexNet
from alexnet.training.checkpoint import find, read

HEAD = ("fc8.weight", "fc8.bias")


def take_weights(net: AlexNet, origin: str, classes: list[dict[str, str]]) -> dict[str, Any]:
    """Fills `net` from a checkpoint, a run, an export or torchvision's file; returns what the run's record keeps of it.

    Raises UserError if a layer other than fc8 has another shape, or if there is none of its name.
    """
    path = find(origin)
    content = read(path)
    given = {name.removeprefix("net."): value for name, value in content["state_dict"].items()}
    own = net.state_dict()
    new = HEAD if content["hyper_parameters"]["classes"] != classes else ()
    for name, here in own.items():
        there = given.get(name)
        if name not in new and (there is None or there.shape != here.shape):
            found = "missing" if there is None else f"{tuple(there.shape)}"
            raise UserError(
                f"init_from={origin}: {name} is {found} there and {tuple(here.shape)} here: "
                "choose the model=... it was trained with"
            )
    net.load_state_dict({name: value if name in new else given[name] for name, value in own.items()})
    return {"path": str(path), "sha256": sha256(path), "new_layers": ["fc8"] * bool(new)}
