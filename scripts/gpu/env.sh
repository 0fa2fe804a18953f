# Sourced on the GPU machine: installs the wheels of .whl once and puts them before the rest.
#   . scripts/gpu/env.sh && python3 scripts/bench.py …
site=/tmp/vlm-batch-site
if [ ! -e "$site/.installed" ]; then
  python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade \
    --target "$site" .whl/*.whl && touch "$site/.installed" || return 1
fi
export PYTHONPATH="$site:$PWD" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
vlm-batch() { python3 -m jobs.cli "$@"; }
