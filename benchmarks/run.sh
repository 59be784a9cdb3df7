#!/bin/bash
# Speed beside mlx-vlm and torch, growth with pictures and context, and the estimate for Metal: tables, JSON and a plot.
#
#   benchmarks/run.sh [--peer PYTHON] [--torch PYTHON] [--large] [--out FOLDER]
#   PUBLISH=1 benchmarks/run.sh ...     # and put them into README.md, benchmarks/README.md and docs/
#
# PYTHON: see speed.py. Without them only this program is measured. On free cores with both it takes less than 15 minutes
# ($PYTHON chooses our own interpreter; python by default).
set -euo pipefail
here=$(dirname "$0")
python=${PYTHON:-python}
out=/tmp/mlx-vlm-mini-workloads/results
torch=()
arguments=("$@")
for ((i = 0; i < $#; i++)); do
    if [[ ${arguments[i]} == --out ]]; then out=${arguments[i + 1]}; fi
    if [[ ${arguments[i]} == --torch ]]; then torch=(--torch "${arguments[i + 1]}"); fi
done
begin=$SECONDS
"$python" "$here/speed.py" "$@"
"$python" "$here/growth.py" --out "$out" "${torch[@]}"
"$python" "$here/metal.py" >"$out/metal.md"
cat "$out/metal.md"
if [[ ${PUBLISH:-} ]]; then "$python" "$here/publish.py" --out "$out"; fi
echo "took $((SECONDS - begin)) s; results are in $out" >&2
