#!/usr/bin/env bash
# The main job on the shipped model: run it, prove it, show a few answers and where they lie.
# usage: scripts/demo.sh .venv/bin out/demo
set -euo pipefail
cd "$(dirname "$0")/.."
bin=$1 out=$2

"$bin/vlm-batch" run configs/demo.yaml --output "$out"
"$bin/vlm-batch" verify "$out"
echo
"$bin/vlm-batch" show "$out" --limit 6
echo
"$bin/vlm-batch" report "$out" >/dev/null
echo "Answers (Parquet): $out/data/"
echo "Report:            $out/report.html"
echo "Run \`make demo\` again: it finds nothing left to do."
