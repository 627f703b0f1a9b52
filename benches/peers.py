#!/usr/bin/env python3
"""dr beside pgBackRest on one machine: interleaved runs, ratios, medians.

Run as root (servers and tools run as user postgres):
    python3 benches/peers.py --dr target/release/dr --pgbackrest /path/to/pgbackrest --rounds 5

The data set is that of benches/README.md: orders and stock, about 2.2 GB. Everything lies in page cache;
times are from the start of the command to its end, which is after the durable manifest.

With --small-files 1000000 the tables are small, and so many files of 1 KiB lie beside them in the data directory:
a full backup, a second one with nothing changed, and a restore.
"""
import argparse, json, os, pwd, resource, shutil, statistics, subprocess, sys, time

BIN = "/usr/lib/postgresql/15/bin"


class Bench:
    def __init__(self, args):
        self.args, self.base = args, args.dir
        self.user = pwd.getpwnam("postgres")
        self.rows = []

    def path(self, *parts):
        return os.path.join(self.base, *parts)

    def run(self, command, measure=False, check=True, env=None):
        """Runs as postgres; answers wall, CPU seconds (children included) and peak memory in MiB."""
        def demote():
            os.setgid(self.user.pw_gid)
            os.setuid(self.user.pw_uid)
        log = open(self.path("log"), "a")
        full = {"PATH": BIN + ":/usr/bin:/bin", "HOME": self.base, "LC_ALL": "C", **(env or {})}
        began = time.monotonic()
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=full,
                                 cwd=self.base, preexec_fn=demote)
        _, status, usage = os.wait4(child.pid, 0)
        wall = time.monotonic() - began
        if check and status != 0:
            sys.exit(f"{command} failed, see {self.path('log')}")
        return wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024

    def sql(self, text):
        self.run([BIN + "/psql", "-q", "-X", "-v", "ON_ERROR_STOP=1", "-h", self.base, "-p", "54911", "postgres", "-c", text])

    def ask(self, text):
        out = subprocess.run([BIN + "/psql", "-qAtX", "-h", self.base, "-p", "54911", "-U", "postgres", "postgres", "-c", text],
                             stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True)
        return out.stdout.strip()

    def setup(self):
        shutil.rmtree(self.base, ignore_errors=True)
        os.makedirs(self.base)
        os.chmod(self.base, 0o755)
        shutil.copy(self.args.dr, self.path("dr"))
        os.chmod(self.path("dr"), 0o755)
        os.chown(self.base, self.user.pw_uid, self.user.pw_gid)
        self.run([BIN + "/initdb", "-N", "-k", "-A", "trust", "-U", "postgres", "-D", self.path("data")])
        with open(self.path("data", "postgresql.conf"), "a") as conf:
            conf.write(f"port = 54911\nunix_socket_directories = '{self.base}'\nlisten_addresses = ''\nfsync = off\n"
                       "shared_buffers = 512MB\nmax_wal_size = 8GB\nwal_level = replica\narchive_mode = on\n"
                       "archive_command = 'true'\ncheckpoint_timeout = 1h\nautovacuum = off\n")
        self.run([BIN + "/pg_ctl", "-D", self.path("data"), "-l", self.path("server.log"), "-w", "-t", "120", "start"])
        n = self.args.scale
        self.sql(f"""CREATE TABLE orders (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, tenant int, ref uuid,
                     at timestamptz, total numeric, note text, details jsonb);
                 INSERT INTO orders (tenant, ref, at, total, note, details)
                   SELECT g % 5000, gen_random_uuid(), now() - g * interval '1 s', (g % 10000) / 7.0, md5(g::text),
                     jsonb_build_object('sku', g % 999, 'qty', g % 7, 'tag', left(md5((g * 3)::text), 12))
                   FROM generate_series(1, {5 * n}) g;
                 CREATE INDEX ON orders (ref); CREATE INDEX ON orders (tenant, at);
                 CREATE TABLE stock (id int PRIMARY KEY, name text, ref uuid, qty int) WITH (fillfactor = 85);
                 INSERT INTO stock SELECT g, md5(g::text), gen_random_uuid(), g % 100 FROM generate_series(1, {4 * n}) g;""")
        # WAL of the load, kept for the pushes: real segments, full of rows.
        os.makedirs(self.path("segments"))
        full = sorted(f for f in os.listdir(self.path("data", "pg_wal")) if len(f) == 24)
        current = self.ask("SELECT pg_walfile_name(pg_current_wal_lsn())")
        for name in [f for f in full if f < current][-9:-1]:
            shutil.copy(self.path("data", "pg_wal", name), self.path("segments", name))
            os.chown(self.path("segments", name), self.user.pw_uid, self.user.pw_gid)
        os.chown(self.path("segments"), self.user.pw_uid, self.user.pw_gid)
        self.sql("VACUUM FREEZE ANALYZE")
        self.sql("CHECKPOINT")

    def small_files(self, count):
        """Files of 1 KiB, a thousand in a directory; what is in them compresses well."""
        top = self.path("data", "small")
        os.makedirs(top, mode=0o700)
        for number in range(count):
            folder = os.path.join(top, f"{number // 1000:06d}")
            if number % 1000 == 0:
                os.mkdir(folder, 0o700)
            with open(os.path.join(folder, f"{number:09d}"), "wb") as out:
                out.write(b"%08d" % (number % 100_000_000) * 128)
        subprocess.run(["chown", "-R", f"{self.user.pw_uid}:{self.user.pw_gid}", top], check=True)
        # Files of this moment could change within a tick of the clock: the next backup reads those again.
        os.sync()
        time.sleep(3)

    def configure(self):
        conf = self.path("pgbackrest.conf")
        with open(conf, "w") as out:
            out.write(f"[global]\nrepo1-path={self.path('pgbr')}\nlog-level-console=warn\nlog-level-file=off\nlock-path={self.path('lock')}\n"
                      f"spool-path={self.path('spool')}\ncompress-type=zst\ncompress-level=1\nprocess-max=2\nstart-fast=y\n"
                      f"repo1-bundle=y\nrepo1-block=y\nrepo1-cipher-type=aes-256-cbc\nrepo1-cipher-pass=abcdefghijkl\narchive-async=y\n"
                      f"[main]\npg1-path={self.path('data')}\npg1-port=54911\npg1-socket-path={self.base}\npg1-user=postgres\n")
        for name in ("pgbr", "lock", "spool"):
            os.makedirs(self.path(name), exist_ok=True)
            os.chown(self.path(name), self.user.pw_uid, self.user.pw_gid)
        self.pgbr = [self.args.pgbackrest, f"--config={conf}", "--stanza=main"]
        self.dr = [self.path("dr"), "--quiet", "--config", self.path("dr.toml")]

    def archive_with(self, which):
        command = {"dr": f"{self.path('dr')} --config {self.path('dr.toml')} wal push %p",
                   "pgbackrest": f"{' '.join(self.pgbr)} archive-push %p"}[which]
        self.sql(f"ALTER SYSTEM SET archive_command = '{command}'")
        self.sql("SELECT pg_reload_conf()")
        time.sleep(0.3)

    def fresh_repositories(self):
        for name in ("repo", "pgbr"):
            if os.path.exists(self.path(name)):
                os.rename(self.path(name), self.path(f"{name}-{len(self.rows)}"))
        for name in ("dr.toml", "dr.key"):
            if os.path.exists(self.path(name)):
                os.remove(self.path(name))
        os.makedirs(self.path("pgbr"))
        os.chown(self.path("pgbr"), self.user.pw_uid, self.user.pw_gid)
        self.run([self.path("dr"), "init", "--repo", self.path("repo"), "--connection",
                  f"host={self.base} port=54911 user=postgres dbname=postgres", "--output", self.path("dr.toml")])
        self.run(self.pgbr + ["stanza-create"])

    def size(self, name):
        out = subprocess.run(["du", "-sb", self.path(name)], capture_output=True, text=True, check=True)
        return int(out.stdout.split()[0])

    def note(self, work, tool, figures, stored=None):
        self.rows.append((work, tool, figures, stored))
        extra = f" stored {stored / 1e6:.1f} MB" if stored is not None else ""
        print(f"{work:28} {tool:11} {figures[0]:6.2f} s wall {figures[1]:6.2f} s CPU {figures[2]:6.0f} MiB{extra}", flush=True)

    def backup(self, work, order):
        for tool in order:
            self.archive_with(tool)
            store = {"dr": "repo/cluster", "pgbackrest": "pgbr/backup"}[tool]
            before = self.size(store) if os.path.exists(self.path(store)) else 0
            kind = "full" if work == "full" else "incr"
            command = self.dr + ["backup"] if tool == "dr" else self.pgbr + [f"--type={kind}", "backup"]
            figures = self.run(command)
            stored = self.size(store) - before
            if tool == "dr":
                done = subprocess.run([self.path("dr"), "--config", self.path("dr.toml"), "list", "--json"],
                                      stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True)
                stored = json.loads(done.stdout)["result"][0]["backups"][-1]["stored_bytes"]
            self.note(work, tool, figures, stored)

    def touch(self, scattered):
        n = 4 * self.args.scale
        pages = int(self.ask("SELECT pg_relation_size('stock') / 8192"))
        per_page = n // pages
        if scattered:
            self.sql(f"UPDATE stock SET qty = qty + 1 WHERE id % {per_page * 100} = {time.time_ns() % (per_page * 100)}")
        else:
            start = time.time_ns() % (n - n // 100)
            self.sql(f"UPDATE stock SET qty = qty + 1 WHERE id BETWEEN {start} AND {start + n // 100}")
        self.sql("CHECKPOINT")

    def restore(self, order):
        """Into a new directory each time; nothing is deleted before all rounds are over. For minutes after
        a deletion ext4 looks at each inode that it freed before it gives one out, which would be measured too."""
        for tool in order:
            to = self.path(f"restored-{len(self.rows)}")
            os.makedirs(to, mode=0o700)
            os.chown(to, self.user.pw_uid, self.user.pw_gid)
            os.sync()
            command = (self.dr + ["restore", "--to", to, "--immediate"] if tool == "dr"
                       else self.pgbr + [f"--pg1-path={to}", "--type=immediate", "restore"])
            self.note("restore", tool, self.run(command))

    def push(self, order):
        """One segment at a time: CPU of the command, the server's own work left out."""
        wal = sorted(os.listdir(self.path("segments")))
        for tool in order:
            total = [0.0, 0.0, 0.0]
            for name in wal:
                path = self.path("segments", name)
                for stored in subprocess.run(["find", self.base, "-name", name + "*", "-path", "*/repo/*"], capture_output=True, text=True).stdout.split():
                    os.remove(stored)
                command = (self.dr + ["wal", "push", path] if tool == "dr"
                           else self.pgbr + ["--no-archive-async", "archive-push", path])
                if tool == "pgbackrest":
                    for stored in subprocess.run(["find", self.path("pgbr/archive"), "-name", name + "*"], capture_output=True, text=True).stdout.split():
                        os.remove(stored)
                figures = self.run(command)
                total = [total[0] + figures[0], total[1] + figures[1], max(total[2], figures[2])]
            self.note("WAL push, a segment", tool, (total[0] / len(wal), total[1] / len(wal), total[2]))

    def start_up(self):
        began = time.monotonic()
        for _ in range(50):
            subprocess.run([self.path("dr"), "--version"], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        print(f"process start {(time.monotonic() - began) * 20:.1f} ms")

    def summary(self):
        print("\n| work | dr wall s (spread) | dr CPU s | pgBackRest wall s (spread) | CPU s | wall ratio | CPU ratio | dr peak MiB | dr stored MB | pgBackRest stored MB |")
        print("|---|---|---|---|---|---|---|---|---|---|")
        for work in dict.fromkeys(row[0] for row in self.rows):
            def column(tool, index):
                return [row[2][index] for row in self.rows if row[0] == work and row[1] == tool]
            def stored(tool):
                values = [row[3] for row in self.rows if row[0] == work and row[1] == tool and row[3] is not None]
                return f"{statistics.median(values) / 1e6:.1f}" if values else "–"
            def spread(values):
                return f"{statistics.median(values):.3g} ({min(values):.3g}–{max(values):.3g})"
            d, p = column("dr", 0), column("pgbackrest", 0)
            if not p:
                print(f"| {work} | {spread(d)} | {statistics.median(column('dr', 1)):.3g} | not run | | | "
                      f"| {max(column('dr', 2)):.0f} | {stored('dr')} | |")
                continue
            dc, pc = column("dr", 1), column("pgbackrest", 1)
            m = statistics.median
            print(f"| {work} | {spread(d)} | {m(dc):.3g} | {spread(p)} | {m(pc):.3g} | {m(d) / m(p):.2f} | {m(dc) / m(pc):.2f} "
                  f"| {max(column('dr', 2)):.0f} | {stored('dr')} | {stored('pgbackrest')} |")

    def stop(self):
        self.run([BIN + "/pg_ctl", "-D", self.path("data"), "-m", "immediate", "stop"], check=False)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--dr", required=True)
    parser.add_argument("--pgbackrest", required=True)
    parser.add_argument("--dir", default="/tmp/dr-bench-peers")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--scale", type=int, default=1_000_000, help="1,000,000 makes about 2.2 GB")
    parser.add_argument("--small-files", type=int, default=0, help="so many files of 1 KiB beside small tables")
    parser.add_argument("--keep", action="store_true")
    bench = Bench(parser.parse_args())
    if bench.args.small_files:
        bench.args.scale = min(bench.args.scale, 1000)
    bench.setup()
    try:
        bench.configure()
        bench.start_up()
        if bench.args.small_files:
            bench.small_files(bench.args.small_files)
        for number in range(bench.args.rounds):
            order = ["dr", "pgbackrest"] if number % 2 == 0 else ["pgbackrest", "dr"]
            bench.fresh_repositories()
            if bench.args.small_files:
                bench.backup("full", order)
                bench.backup("second, nothing changed", order)
                # A sync for each file: pgBackRest takes half an hour for a million.
                bench.restore(order if bench.args.small_files <= 50_000 else ["dr"])
                continue
            bench.backup("full", order)
            bench.touch(scattered=False)
            bench.backup("second, 1 % in a run", order)
            bench.touch(scattered=True)
            bench.backup("second, 1 % scattered", order)
            bench.restore(order)
            bench.push(order)
        bench.summary()
    finally:
        bench.stop()
        if not bench.args.keep:
            shutil.rmtree(bench.base, ignore_errors=True)


if __name__ == "__main__":
    main()
