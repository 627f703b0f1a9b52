#!/usr/bin/env bash
# pg.sh PREFIX DEST MAJOR SUITE...
#
# Puts the server and client programs of another major version of PostgreSQL below DEST, from the
# first Debian suite that has it. The packages and the libraries that they need are unpacked below
# PREFIX once, then copied and made to use their own C library: nothing is installed on the system,
# its package lists stay as they are, and no root is needed.
set -euo pipefail
prefix=$1 dest=$2 major=$3
shift 3

fail() {
    echo "PostgreSQL $major: $*" >&2
    exit 1
}

# The packages of one suite, below the directory $2.
unpack() {
    local suite=$1 work=$2 state=$2/apt mirror names
    local key=/usr/share/keyrings/debian-archive-keyring.gpg
    rm -rf "$work"
    mkdir -p "$state"/{none,lists/partial,archives/partial} "$work/system"
    : >"$state/status"
    mirror=$(apt-get indextargets --format '$(REPO_URI) $(RELEASE)' 'Created-By: Packages' |
        awk '$2 !~ /security|updates|backports/ {print $1; exit}')
    [ -n "$mirror" ] || fail "apt knows no mirror"
    echo "deb [signed-by=$key] $mirror $suite main" >"$state/sources.list"
    cat >"$state/apt.conf" <<CONF
Dir::State::status "$state/status";
Dir::State::Lists "$state/lists";
Dir::Cache::archives "$state/archives";
Dir::Cache::pkgcache "";
Dir::Cache::srcpkgcache "";
Dir::Etc::sourcelist "$state/sources.list";
Dir::Etc::sourceparts "$state/none";
Dir::Etc::preferencesparts "$state/none";
Acquire::Languages "none";
Acquire::Retries "3";
APT::Update::Post-Invoke {};
$([ "$(id -u)" != 0 ] || echo 'APT::Sandbox::User "root";')
CONF
    export APT_CONFIG=$state/apt.conf
    apt-get -qq update || return 1
    apt-cache show "postgresql-$major" >/dev/null 2>&1 || return 1
    # What apt would install on an empty system, without what these programs can do without:
    # compiled queries (LLVM) and the packages' own set-up (perl).
    names=$(apt-get -qq install --simulate --no-install-recommends "postgresql-$major" patchelf |
        awk '/^Inst/ {print $2}' | grep -E '^(lib|zlib1g|postgresql-(client-)?[0-9]|patchelf)' |
        grep -vE '^lib(llvm|z3|perl|debconf|db5|python)|-perl$') || return 1
    (cd "$state/archives" && apt-get -qq download $names) || return 1
    for package in "$state"/archives/*.deb; do dpkg -x "$package" "$work/system" || return 1; done
    rm -rf "$work"/system/usr/share/{doc,man,locale,lintian,bash-completion} \
        "$work"/system/usr/share/postgresql/*/man "$work"/system/usr/lib/postgresql/*/lib/{llvmjit*,bitcode} "$state"
    unset APT_CONFIG
}

if [ ! -e "$prefix/complete" ]; then
    command -v apt-get >/dev/null || fail "there is no apt-get to fetch it with"
    [ -e /usr/share/keyrings/debian-archive-keyring.gpg ] || fail "the keys of Debian's archive are not installed"
    found=
    for suite in "$@"; do
        if unpack "$suite" "$prefix.new"; then
            found=$suite
            break
        fi
        unset APT_CONFIG
    done
    [ -n "$found" ] || fail "none of these suites gave it: $*"
    touch "$prefix.new/complete"
    rm -rf "$prefix"
    mv "$prefix.new" "$prefix"
fi

mkdir -p "$dest"
cp -a "$prefix/system/." "$dest"
loader=$(find "$dest" -name 'ld-linux*.so.*' -type f | head -n 1)
[ -n "$loader" ] || fail "its C library was not found below $dest"
libraries=$(dirname "$loader")
# By its own loader, as the programs will be: the system's C library may be too old for it.
patch() { "$loader" --library-path "$libraries" "$dest/usr/bin/patchelf" "$@"; }
elf() { [ "$(head -c 4 "$1" | tail -c 3)" = ELF ]; }
for program in "$dest/usr/lib/postgresql/$major"/bin/*; do
    elf "$program" || continue
    patch --set-interpreter "$loader" --force-rpath --set-rpath "$libraries" "$program"
done
# A library with a search path of its own would not look in the program's.
find "$libraries" -type f -name '*.so*' | while read -r library; do
    elf "$library" && [ -n "$(patch --print-rpath "$library" 2>/dev/null)" ] || continue
    patch --force-rpath --set-rpath "$libraries" "$library"
done
chmod -R a+rX "$dest"
"$dest/usr/lib/postgresql/$major/bin/postgres" --version
