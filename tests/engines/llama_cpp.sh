#!/bin/sh
# llama.cpp, its server and its example program, from the source that llama-cpp-python brings.
#   sh llama_cpp.sh PYTHON FOLDER
# Needs cmake and a C++ compiler. PYTHON has torch and transformers, which llama.cpp's converter needs; what
# it lacks goes to site-packages.
set -e
VERSION=0.3.36
PIP="$1 -m pip --disable-pip-version-check --quiet"
rm -rf "$2" "$2.tmp"
mkdir -p "$2.tmp"
$PIP download --no-deps --no-binary :all: --dest "$2.tmp" "llama-cpp-python==$VERSION"
tar --extract --gzip --file "$2.tmp/llama_cpp_python-$VERSION.tar.gz" --directory "$2.tmp"
mv "$2.tmp/llama_cpp_python-$VERSION/vendor/llama.cpp" "$2"
rm -rf "$2.tmp"
$PIP install --no-compile --no-deps --target "$2/site-packages" sentencepiece protobuf
cmake -S "$2" -B "$2/build" -DCMAKE_BUILD_TYPE=Release -DLLAMA_CURL=OFF -DLLAMA_BUILD_UI=OFF \
    -DLLAMA_BUILD_TESTS=OFF > "$2/build.log"
cmake --build "$2/build" --parallel "$(getconf _NPROCESSORS_ONLN)" --target llama-server llama-speculative-simple >> "$2/build.log"
echo "of llama-cpp-python $VERSION" > "$2/.ready"
