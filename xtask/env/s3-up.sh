#!/usr/bin/env bash
# s3-up.sh PREFIX DIR MONITOR_PORT PORT
#
# Starts a real S3 server: Ceph's radosgw with one monitor and one store in memory, on loopback,
# with data, logs and pid files below DIR. Key testkey, secret testsecret, bucket dr-test.
# Its programs are the distribution's, unpacked below PREFIX: nothing is installed on the system,
# and no root is needed. Stop it with s3-down.sh DIR.
set -euo pipefail
prefix=$1 dir=$2 monitor_port=$3 port=$4
here=$(cd "$(dirname "$0")" && pwd)

unpack() {
    local work=$prefix.new
    rm -rf "$work" && mkdir -p "$work/archives/partial"
    local apt=(apt-get -y -o "Dir::Cache::archives=$work/archives" -o Debug::NoLocking=1 -o Acquire::Retries=3)
    # Only what is missing here is downloaded; the rest is used as it is.
    if ! "${apt[@]}" install --download-only --no-install-recommends radosgw ceph-mon ceph-osd ceph-common; then
        [ "$(id -u)" = 0 ] && apt-get update
        "${apt[@]}" install --download-only --no-install-recommends radosgw ceph-mon ceph-osd ceph-common
    fi
    for package in "$work"/archives/*.deb; do dpkg -x "$package" "$work"; done
    rm -rf "$work/archives"
    touch "$work/complete"
    rm -rf "$prefix"
    mv "$work" "$prefix"
}

if ! command -v radosgw >/dev/null || ! command -v ceph-osd >/dev/null; then
    [ -e "$prefix/complete" ] || unpack
    root=$prefix
else
    root=
fi

programs=$root/usr/bin
libraries=$(dirname "$(find "$root/usr/lib" -maxdepth 3 -type d -name rados-classes | head -n 1)")
architecture=$(basename "$libraries")
export LD_LIBRARY_PATH=$libraries:$libraries/ceph:$root/lib/$architecture${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
mkdir -p "$dir"/{monitor,store,run}
export CEPH_CONF=$dir/ceph.conf
id=22222222-2222-2222-2222-222222222222
cat >"$CEPH_CONF" <<CONF
[global]
fsid = $id
run dir = $dir/run
pid file = $dir/run/\$name.pid
admin socket = $dir/run/\$name.asok
log file = $dir/\$name.log
plugin dir = $libraries/ceph
erasure code dir = $libraries/ceph/erasure-code
osd class dir = $libraries/rados-classes
auth cluster required = none
auth service required = none
auth client required = none
mon host = v2:127.0.0.1:$monitor_port
mon initial members = a
mon data = $dir/monitor
mon data avail crit = 1
mon data avail warn = 2
mon allow pool size one = true
mon max pg per osd = 1000
public network = 127.0.0.0/8
osd data = $dir/store
osd objectstore = memstore
memstore device bytes = 2147483648
enable experimental unrecoverable data corrupting features = memstore
osd class load list = *
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 8
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
osd crush update on start = false
CONF

"$programs/monmaptool" --create --clobber --fsid $id --addv a "[v2:127.0.0.1:$monitor_port]" "$dir/monmap"
"$programs/osdmaptool" --createsimple 1 --clobber "$dir/osdmap"
"$programs/ceph-mon" --mkfs -i a --monmap "$dir/monmap" --osdmap "$dir/osdmap"
"$programs/ceph-mon" -i a
"$programs/ceph-osd" -i 0 --mkfs --osd-uuid 33333333-3333-3333-3333-333333333333
"$programs/ceph-osd" -i 0
timeout 90 "$programs/radosgw-admin" user create --uid test --display-name test \
    --access-key testkey --secret testsecret
# radosgw asks its monitor with a key by default, whatever the configuration says.
"$programs/radosgw" -n client.rgw.1 --auth-client-required=none --ms-mon-client-mode=crc \
    --rgw-frontends="beast endpoint=127.0.0.1:$port"
unset LD_LIBRARY_PATH
python3 "$here/s3-bucket.py" "127.0.0.1:$port" testkey testsecret dr-test
