"""Weights in another form: python scripts/export.py checkpoint=<file or run directory> [format=safetensors].

format=safetensors|torch_export|onnx. What was written is read again and must compute the same logits.
"""

from alexnet.cli import command
from alexnet.export import Export, export


@command("export", Export)
def main(config: Export) -> None:
    export(config)


if __name__ == "__main__":
    main()
