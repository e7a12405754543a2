#!/bin/sh
# llama.cpp, its server and its example program, from the source that llama-cpp-python brings.
#   sh llama_cpp.sh PYTHON FOLDER
# Needs cmake and a C++ compiler. PYTHON has torch and transformers, which llama.cpp's converter needs; what
# it lacks goes to site-packages.
set -eu
VERSION=0.3.36
python=$1 folder=${2:?sh llama_cpp.sh PYTHON FOLDER}
if [ -e "$folder" ] && [ ! -e "$folder/.ready" ] && [ ! -e "$folder/.begun" ]; then
    echo "error: $folder is not ours: choose another folder, or remove it first" >&2
    exit 2
fi
pip() { "$python" -m pip --disable-pip-version-check --quiet "$@"; }
rm -rf "$folder" "$folder.tmp"
mkdir -p "$folder.tmp"
pip download --no-deps --no-binary llama-cpp-python --dest "$folder.tmp" "llama-cpp-python==$VERSION"
tar --extract --gzip --file "$folder.tmp/llama_cpp_python-$VERSION.tar.gz" --directory "$folder.tmp"
mv "$folder.tmp/llama_cpp_python-$VERSION/vendor/llama.cpp" "$folder"
touch "$folder/.begun"
rm -rf "$folder.tmp"
pip install --no-compile --no-deps --target "$folder/site-packages" sentencepiece protobuf
# GCC drops most of the tile configuration that llama.cpp sets up for AMX, and the first product is an illegal
# instruction (llama.cpp's pull request 26954). Without the macro its products are those of AVX-512.
no_amx=-U__AMX_INT8__
cmake -S "$folder" -B "$folder/build" -DCMAKE_BUILD_TYPE=Release -DLLAMA_CURL=OFF -DLLAMA_BUILD_UI=OFF \
    -DLLAMA_BUILD_TESTS=OFF "-DCMAKE_C_FLAGS=$no_amx" "-DCMAKE_CXX_FLAGS=$no_amx" > "$folder/build.log"
cmake --build "$folder/build" --parallel "$(getconf _NPROCESSORS_ONLN)" --target llama-server \
    llama-speculative-simple >> "$folder/build.log"
echo "of llama-cpp-python $VERSION" > "$folder/.ready"
