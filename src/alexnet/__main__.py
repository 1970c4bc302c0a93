"""`alexnet <verb> ...` of an installed package (or `python -m alexnet`): runs scripts/<verb>.py."""

import ast
import runpy
import sys

from alexnet.cli import SCRIPTS


def main() -> None:
    verbs = {path.stem: path for path in sorted(SCRIPTS.glob("*.py"))}
    verb = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if verb in ("-h", "--help"):
        print("alexnet <verb> [key=value ...]; alexnet <verb> --help lists its keys\n")
        for name, path in verbs.items():
            text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
            print(f"  {name:16s} {text.split(':')[0].split('?')[0]}")
        return
    if verb not in verbs:
        print(f"error: {verb} must be one of {', '.join(verbs)}", file=sys.stderr)
        raise SystemExit(2)
    sys.argv = [str(verbs[verb]), *sys.argv[2:]]  # processes that a run starts are started by the script
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
