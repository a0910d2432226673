#!/usr/bin/env bash
# Tests the last commit with one set of versions: tests/matrix.sh NAME PYTHON [CONSTRAINTS].
#
# A clone in build/matrix/NAME gets an environment of its own, builds the library there, and runs `make test` and
# `make gate`. A part that this commit has passed is not run again.
set -euo pipefail
name=$1 python=$2 constraints=${3:-}
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
clone=$root/build/matrix/$name

"$python" -c "import venv" 2>/dev/null || {
  echo "tests/matrix.sh: $python doesn't run. Name a Python: make matrix-$name PYTHON_${name^^}=/path/to/python3.x" >&2
  exit 2
}
[ -z "$(git -C "$root" status --porcelain)" ] || echo "tests/matrix.sh: what is not committed is not tested"
[ -d "$clone/.git" ] || git clone --quiet "$root" "$clone"
git -C "$clone" fetch --quiet origin HEAD
git -C "$clone" reset --quiet --hard FETCH_HEAD
commit=$(git -C "$clone" rev-parse HEAD)
# A build that falls back to pure Python would leave the kernels untested.
export FASTSHAP_FORCE_BUILD=1
[ -z "$constraints" ] || export PIP_CONSTRAINT=$root/$constraints

mkdir -p "$clone/build"
for part in env test gate; do
  passed=$clone/build/passed-$part
  if [ "$(cat "$passed" 2>/dev/null)" = "$commit" ]; then
    echo "== $name: $part has passed"
    continue
  fi
  echo "== $name: $part"
  make -C "$clone" PYTHON="$python" "$part"
  echo "$commit" >"$passed"
done
echo "== $name: all passed with"
"$clone/.venv/bin/python" -m fastshap_kernels.info | sed -n '1,/^$/p'
