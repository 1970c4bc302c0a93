# Sourced by quickstart.sh and test.sh: makes .venv if it is missing, installs the extras named in $1 if they are not.
extras="$1"
python="${PYTHON:-python3}"
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
  echo "error: $python is missing or older than 3.11: install Python 3.11 or newer, or set PYTHON=<path>" >&2
  exit 2
fi
mark=".venv/.installed-$extras"
# What is installed names the directory it was installed from: a checkout that was moved or copied starts anew.
here='import alexnet, os; raise SystemExit(not os.path.samefile(alexnet.__path__[0], "src/alexnet"))'
if ls .venv/.installed-* > /dev/null 2>&1 && ! .venv/bin/python -c "$here" 2> /dev/null; then
  echo "[1/2] .venv does not belong to this directory (moved or copied?): removing it"
  rm -rf .venv
fi
if [ ! -x .venv/bin/python ]; then
  echo "[1/2] Making .venv"
  "$python" -m venv .venv || {
    echo "error: $python cannot make a virtual environment: install its venv module (Debian: python3-venv)" >&2
    exit 2
  }
fi
if [ ! -e "$mark" ] || [ pyproject.toml -nt "$mark" ]; then
  echo "[1/2] Installing (first time: about 2 minutes and 6 GB, most of it torch)"
  .venv/bin/python -m pip install --quiet --disable-pip-version-check -e ".[$extras]" 2> .venv/install.log || {
    grep -v WARNING .venv/install.log | tail -n 5 >&2
    echo "error: the installation failed (whole log: .venv/install.log)" >&2
    exit 2
  }
  touch "$mark"
else
  echo "[1/2] .venv is there"
fi
# The most common installation complaint of this ecosystem: a torchvision made for another torch.
if ! reason=$(.venv/bin/python -c 'import torch, torchvision' 2>&1); then
  echo "error: torch and torchvision do not fit together ($(echo "$reason" | tail -n 1)): remove .venv and run this again, or install the torchvision release made for this torch" >&2
  exit 2
fi
