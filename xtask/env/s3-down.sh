#!/usr/bin/env bash
# s3-down.sh DIR: stops what s3-up.sh started there. The gateway goes first: it hangs on SIGTERM
# once its store is gone. Only processes that still are ours are signalled.
ours() { tr '\0' ' ' <"/proc/$1/cmdline" 2>/dev/null | grep -qE 'radosgw|ceph-(osd|mon)'; }
for name in client.rgw.1 osd.0 mon.a; do
    pid=$(cat "$1/run/$name.pid" 2>/dev/null) || continue
    ours "$pid" || continue
    kill "$pid"
    for _ in $(seq 20); do
        ours "$pid" || break
        sleep 0.1
    done
    ours "$pid" && kill -s KILL "$pid"
done
exit 0
