#!/usr/bin/env bash
# What the Dockerfile promises, checked where no Docker runs: its ENV and its last steps, in an environment of its own,
# as a user without a name and a home, on the packages of the Python that is given.
#   tests/container_check.sh [PYTHON]
# Not checked here: the base image, PyTorch from its own index, a GPU.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${1:-python3}
place=$(mktemp -d)
trap 'chmod -R u+w "$place"; rm -rf "$place"' EXIT
chmod 755 "$place"
say() { printf '\n== %s\n' "$*"; }

user=() # USER
if [ "$(id -u)" = 0 ]; then user=(setpriv --reuid 12345 --regid 12345 --clear-groups); fi
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
base='' # a Python of the same version that this user can read: the one that is given may lie in somebody's home
for found in "$("$python" -c 'import sys; print(sys._base_executable)')" {/usr/local,/usr}/bin/"python$version"; do
    if "${user[@]}" test -x "$found"; then base=$found; break; fi
done
if [ -z "$base" ]; then
    echo "$python lies where user 12345 can't read it, and there is no other Python $version; give one that can be read" >&2
    exit 1
fi

say 'RUN pip install /src, into an environment of its own'
"$base" -m venv --without-pip "$place/venv"
there=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
site=$("$place/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
git -C "$here" archive --prefix=src/ HEAD | tar -x -C "$place"
install() { "$python" -m pip --python "$place/venv/bin/python" install --quiet --disable-pip-version-check "$@"; }
install setuptools wheel
install --no-deps --no-build-isolation "$place/src"
rm -rf "$place/src"
echo "$there" > "$site/packages.pth" # what partal_nb needs
"$place/venv/bin/python" -m ipykernel install --prefix "$place/venv" --name python3 > /dev/null

say 'ENV, and a folder that anybody may write'
mkdir -p "$place/study/cache" "$place/study/runs"
chmod -R 1777 "$place/study"
share=$("$python" -c 'import sys; print(sys.prefix)')/share/jupyter # pages and kernels of these packages
settings=(PATH="$place/venv/bin:/usr/bin:/bin" JUPYTER_PATH="$share")
for word in $(sed -n 's/^ENV //p' "$here/Dockerfile"); do settings+=("${word//\/study/$place/study}"); done
printf '%s\n' "${settings[@]}"
inside() { (cd "$place/study" && env -i "${settings[@]}" OMP_NUM_THREADS=1 "${user[@]}" "$@"); }
inside python -c 'import os, partal_nb; print(os.getuid(), partal_nb.__file__)'

small=(--set pool_images=10 --set test_images=4 --set height=48 --set width=64 --set features=8 --set start_images=3
       --set step_pairs=6 --set rounds=1 --set train_by=steps --set train_for=4 --set passes=2)
say 'partal run, as make demo does it, of another size'
inside partal run --preset demo --strategy partal --against random --seed 0 --out runs/demo "${small[@]}" | tail -1
say 'papermill on a kernel'
template=$(inside python -c 'from partal_nb.commands.common import template; print(template("compare"))')
inside python -m papermill "$template" runs/compare.ipynb -k python3 -y '{runs: [runs/demo, runs/demo/random], out: runs}' \
    --no-progress-bar --cwd . 2>&1 | tail -2
say 'partal explore'
inside partal explore runs/demo --port 8899 > "$place/explore.log" 2>&1 &
served=$!
page=''
for _ in $(seq 600); do
    url=$(grep -o -m 1 'http://127.0.0.1:8899/?token=[[:alnum:]_-]*' "$place/explore.log" || true) # a later line hides it
    page=$(curl -fsS --max-time 60 "$url" 2>/dev/null || true)
    [ -n "$page" ] && break
    sleep 1
done
kill $served || { cat "$place/explore.log"; exit 1; }
grep -o -m 1 '<title>[^<]*' <<< "$page"
say 'all of it works'
