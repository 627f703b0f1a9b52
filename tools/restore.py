#!/usr/bin/env python3
"""Reads a dr repository without dr: the way out if the program is ever lost.

Follows docs/formats/repository-v1.md. Needs Python 3.9 and the packages `cryptography` and `zstandard`;
with the package `blake3` content digests are checked too (seals are always checked).

    restore.py --repo DIR list                                      (needs no key)
    restore.py --repo DIR --key FILE restore BACKUP-ID TO           (--tablespaces DIR, --host-files DIR)
    restore.py --repo DIR --key FILE wal SYSTEM-ID TO               (all archived WAL into one directory)

The restored directory has backup_label; set restore_command to copy from the WAL directory, touch
recovery.signal and start PostgreSQL. Tablespaces go to their old places, which must be empty or missing,
or below the directory given. Files of the server outside the data directory (configuration) are written
only when asked for.
"""
import argparse, base64, calendar, json, os, struct, sys, time
from urllib.parse import unquote_to_bytes

import zstandard
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes, hmac
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

try:
    import blake3
except ImportError:
    blake3 = None

EXTENT, STRETCH = 256 << 10, 16 << 20
KINDS = {"data": (1, "pack"), "meta": (2, "meta"), "page": (3, "page")}


def sha256_hmac(key, data):
    mac = hmac.HMAC(key, hashes.SHA256())
    mac.update(data)
    return mac.finalize()


def hkdf_expand(prk, info, length):
    out, block, n = b"", b"", 1
    while len(out) < length:
        block = sha256_hmac(prk, block + info + bytes([n]))
        out, n = out + block, n + 1
    return out[:length]


def hkdf(key, info):
    return hkdf_expand(sha256_hmac(b"\0" * 32, key), info, 32)


def hpke_open(private, info, sealed):
    """RFC 9180, base mode: DHKEM(X25519, HKDF-SHA256), HKDF-SHA256, AES-256-GCM."""
    def labeled_extract(suite, salt, label, ikm):
        return sha256_hmac(salt or b"\0" * 32, b"HPKE-v1" + suite + label + ikm)

    def labeled_expand(suite, prk, label, info, length):
        return hkdf_expand(prk, struct.pack(">H", length) + b"HPKE-v1" + suite + label + info, length)

    enc, ciphertext = sealed[:32], sealed[32:]
    key = X25519PrivateKey.from_private_bytes(private)
    own = key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
    kem = b"KEM" + struct.pack(">H", 0x20)
    prk = labeled_extract(kem, b"", b"eae_prk", key.exchange(X25519PublicKey.from_public_bytes(enc)))
    shared = labeled_expand(kem, prk, b"shared_secret", enc + own, 32)
    suite = b"HPKE" + struct.pack(">HHH", 0x20, 1, 2)
    context = (b"\0" + labeled_extract(suite, b"", b"psk_id_hash", b"")
               + labeled_extract(suite, b"", b"info_hash", info))
    secret = labeled_extract(suite, shared, b"secret", b"")
    nonce = labeled_expand(suite, secret, b"base_nonce", context, 12)
    return unseal(labeled_expand(suite, secret, b"key", context, 32), nonce, ciphertext, b"", "a data key")


def unseal(key, nonce, sealed, aad, what):
    try:
        return AESGCM(key).decrypt(nonce, sealed, aad)
    except (InvalidTag, ValueError):
        sys.exit(f"{what} is damaged, or the key is not the right one: its seal does not verify")


def pack_id(text):
    when, random = text.split("-")
    return struct.pack("<QI", calendar.timegm(time.strptime(when, "%Y%m%dT%H%M%SZ")), int(random, 16))


def unpack_id(raw):
    seconds, random = struct.unpack("<QI", raw)
    return time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(seconds)) + f"-{random:08x}"


class Input:
    def __init__(self, data):
        self.data, self.at = data, 0

    def take(self, n):
        if self.at + n > len(self.data):
            raise ValueError("an object ends too early")
        self.at += n
        return self.data[self.at - n:self.at]

    def v(self):
        value = shift = 0
        while True:
            byte = self.take(1)[0]
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
            shift += 7
            if shift > 63:
                raise ValueError("a number is too long")

    def text(self):
        return self.take(self.v()).decode()

    def sessions(self):
        return [unpack_id(self.take(12)) for _ in range(self.v())]

    def frame(self, sessions):
        return sessions[self.v()], self.v(), self.v(), self.v(), self.v()


class Repository:
    def __init__(self, root, key_file):
        self.root, self.packs, self.deks, self.pinned = root, {}, {}, {}
        descriptor = json.loads(self.read("repo.json"))
        if descriptor["format"] != 1 or descriptor["features_required"]:
            sys.exit("this repository needs a later reader")
        self.id = bytes.fromhex(descriptor["id"])
        self.sealed = descriptor["suite"] == "aes256-gcm"
        self.suite = 1 if self.sealed else 2
        self.epoch = descriptor["key_epoch"]
        self.private = self.metadata = None
        self.digest_key = b"\0" * 32
        if self.sealed and key_file:
            self.private, self.metadata, self.digest_key = self.open_slot(key_file)
            words = descriptor["created"] + "," + ",".join(descriptor["features_required"])
            fields = struct.pack("<IQBI", 1, descriptor["extent"], self.suite, self.epoch)
            fields += bytes.fromhex(descriptor["public_key"]) + struct.pack("<i", descriptor["compression_level"])
            content = b"dr repo 1" + self.id + fields + words.encode()
            self.digest(content, bytes.fromhex(descriptor["check"]), "repo.json")

    def read(self, name):
        with open(os.path.join(self.root, name), "rb") as file:
            return file.read()

    def open_slot(self, key_file):
        with open(key_file) as file:
            line = file.read().strip()
        if not line.startswith("DR-KEY-1:"):
            sys.exit(f"{key_file} is not a key file of dr")
        key = base64.b64decode(line.split(":", 1)[1])
        own = "file-" + hkdf(key, b"dr key id 1")[:6].hex()
        for name in os.listdir(os.path.join(self.root, f"key/{self.epoch}")):
            if name.startswith(own):
                slot = self.read(f"key/{self.epoch}/{name}")
                keys = unseal(key, slot[:12], slot[12:], b"dr key slot 1", f"the slot {name}")
                return keys[:32], keys[32:64], keys[64:]
        sys.exit("this key opens no slot of the repository")

    def digest(self, content, expected, what):
        if blake3 and blake3.blake3(content, key=self.digest_key).digest()[:16] != expected:
            sys.exit(f"{what} is damaged: its digest is wrong")
        return content

    def document(self, name, kind, system, session, number=0, head_only=False):
        data = self.read(name)
        pinned = self.pinned.get(name)
        if blake3 and pinned and blake3.blake3(data).digest()[:16] != pinned:
            sys.exit(f"{name} is not the one that the backup was made with")
        fixed = struct.pack("<8sBBHHH16sQ12sI", b"DRDOC\x01\n\0", kind, self.suite, 0, 0, 0, self.id, system,
                            pack_id(session), number)
        if data[:56] != fixed:
            sys.exit(f"{name} is not what its name says, or needs a later reader")
        salt, (length,) = data[56:72], struct.unpack("<I", data[72:76])
        head, body = data[76:76 + length], data[76 + length:]
        if head_only:
            return json.loads(head), None
        if self.sealed:
            info = b"dr doc 1" + salt + bytes([kind]) + pack_id(session) + struct.pack("<I", number)
            body = unseal(hkdf(self.metadata, info), b"\0" * 12, body, data[:76 + length], name)
        return json.loads(head) if head else None, json.loads(zstandard.ZstdDecompressor().decompress(body))

    def frame(self, system, kind, ref):
        session, seq, offset, stored, raw = ref
        number, directory = KINDS[kind]
        base = f"cluster/{system}"
        if session not in self.packs:
            _, listed = self.document(f"{base}/session/{session}/packs", 2, system, session)
            self.packs[session] = {(p["kind"], p["seq"]): p["digest"] for p in listed["packs"]}
        if (kind, seq) not in self.packs[session]:
            sys.exit(f"pack {seq} of kind {kind} is not in the list of {session}")
        digest = self.packs[session][kind, seq]
        folder = f"{session}/{seq // 1000:03}" if kind == "data" else session
        with open(os.path.join(self.root, base, directory, folder, f"{seq:06}-{digest}"), "rb") as pack:
            pack.seek(offset)
            sealed = pack.read(stored)
        if self.sealed:
            secret = self.dek(system, session) if kind == "data" else self.metadata
            place = self.id + struct.pack("<Q", system) + pack_id(session) + struct.pack("<I", seq)
            aad = b"DRF1" + bytes([number, self.suite, 0, 0]) + place + struct.pack("<QI", offset, raw)
            key = hkdf(secret, b"dr pack 1" + place + bytes([number]))
            sealed = unseal(key, struct.pack("<IQ", 0, offset), sealed, aad, f"a frame of pack {seq} of {session}")
        return decompress(sealed, raw)

    def dek(self, system, session):
        if session not in self.deks:
            sealed = self.read(f"cluster/{system}/session/{session}/dek-{self.epoch}")
            info = b"dr session key 1" + self.id + struct.pack("<Q", system) + pack_id(session)
            self.deks[session] = hpke_open(self.private, info, sealed)
        return self.deks[session]

    def clusters(self):
        return sorted(int(name) for name in os.listdir(os.path.join(self.root, "cluster")))

    def manifests(self, system):
        directory = os.path.join(self.root, f"cluster/{system}/manifest")
        return sorted(os.listdir(directory)) if os.path.isdir(directory) else []


def decompress(plain, raw):
    if plain[:1] not in (b"\0", b"\1"):
        sys.exit("a frame has an unknown codec")
    try:
        content = plain[1:] if plain[0] == 0 else zstandard.ZstdDecompressor().decompress(plain[1:], max_output_size=raw)
    except zstandard.ZstdError as error:
        sys.exit(f"a frame cannot be decompressed: {error}")
    if len(content) != raw:
        sys.exit("a frame has a wrong length")
    return content


def frame_of(record):
    return tuple(record[name] for name in ("session", "seq", "offset", "stored", "raw"))


def entries(repo, system, body):
    for shard in body["shards"]:
        data = repo.digest(repo.frame(system, "meta", frame_of(shard["frame"])), bytes.fromhex(shard["digest"]), "the file table")
        source = Input(data)
        if source.take(1) != b"\x01":
            sys.exit("the file table needs a later reader")
        sessions, path = source.sessions(), b""
        for _ in range(source.v()):
            path = path[:source.v()] + source.take(source.v())
            entry = {"path": path.decode(), "kind": source.take(1)[0]}
            if entry["kind"] == 2:
                entry["target"] = source.text()
            entry["mode"], entry["size"] = source.v(), source.v()
            if source.take(1)[0]:
                source.take(16), source.v(), source.v()
            entry["content"] = kind = source.take(1)[0]
            if kind == 1:
                entry["inline"] = source.take(source.v())
            elif kind == 2:
                entry["slice"] = (source.frame(sessions), source.v(), source.v(), source.take(16))
            elif kind == 3:
                [source.v() for _ in range(source.v())]
                entry["maps"] = [(source.frame(sessions), source.take(16)) for _ in range(source.v())]
            yield entry


def stretch(repo, system, page, reference, digest, what):
    source = Input(repo.digest(repo.frame(system, "meta", reference), digest, what))
    if source.take(1) != b"\x01":
        sys.exit("a map needs a later reader")
    length, sessions, frames, end = source.v(), source.sessions(), [], 0
    for _ in range(source.v()):
        session, seq, delta = sessions[source.v()], source.v(), source.v()
        offset = end + ((delta >> 1) ^ -(delta & 1))
        stored, raw = source.v(), source.v()
        end = offset + stored
        frames.append((session, seq, offset, stored, raw))
    extents = [(source.take(16), source.v()) for _ in range(-(-length // EXTENT))]
    patches = [(source.v(), source.v(), source.v()) for _ in range(source.v())]
    opened = {}
    for index, (expected, base) in enumerate(extents):
        size = min(EXTENT, length - index * EXTENT)
        content = bytearray(repo.frame(system, "data", frames[base - 1]) if base else b"")
        content = (content + bytes(max(0, size - len(content))))[:size]
        for number, frame, place in patches:
            at = number * page - index * EXTENT
            if 0 <= at < EXTENT:
                if frame not in opened:
                    opened[frame] = repo.frame(system, "data", frames[frame])
                piece = opened[frame][place * page:(place + 1) * page][:size - at]
                content[at:at + len(piece)] = piece
        yield bytes(repo.digest(bytes(content), expected, what))


def real_name(path):
    """The bytes of an encoded path, which must stay below its directory."""
    name = unquote_to_bytes(path)
    if b"\0" in name or any(part in (b"", b".", b"..") for part in name.split(b"/")):
        sys.exit(f"{path!r} is not a path that can be restored")
    return name


def write(place, pieces, mode):
    with open(place, "xb") as file:  # never over something
        for piece in pieces:
            file.write(piece)
        size = file.tell()
    os.chmod(place, mode)
    return size


def content(repo, system, page, entry):
    if entry["content"] == 1:
        yield entry["inline"]
    elif entry["content"] == 2:
        frame, offset, length, digest = entry["slice"]
        yield repo.digest(repo.frame(system, "data", frame)[offset:offset + length], digest, entry["path"])
    elif entry["content"] == 3:
        for reference, digest in entry["maps"]:
            yield from stretch(repo, system, page, reference, digest, entry["path"])


def claim(directory):
    if os.path.isdir(directory) and os.listdir(directory):
        sys.exit(f"{os.fsdecode(directory)} is not empty")
    os.makedirs(directory, mode=0o700, exist_ok=True)
    os.chmod(directory, 0o700)  # PostgreSQL refuses a data directory that others may enter


def restore(repo, backup, to, tablespaces, host_files):
    system = next((s for s in repo.clusters() if backup in repo.manifests(s)), None)
    if system is None:
        sys.exit(f"there is no backup {backup}")
    head, body = repo.document(f"cluster/{system}/manifest/{backup}", 1, system, backup)
    for session in body["sessions"]:
        repo.pinned[f"cluster/{system}/session/{session['id']}/packs"] = bytes.fromhex(session["packs"])
    claim(to)
    spaces, count = {}, 0
    for entry in entries(repo, system, body):
        place = os.path.join(os.fsencode(to), real_name(entry["path"]))
        if entry["kind"] == 1:
            os.makedirs(place, exist_ok=True)
            os.chmod(place, entry["mode"])
        elif entry["kind"] == 2:
            target, (folder, _, oid) = unquote_to_bytes(entry["target"]), entry["path"].partition("/")
            if folder == "pg_tblspc":
                target = os.path.join(os.fsencode(os.path.abspath(tablespaces)), oid.encode()) if tablespaces else target
                spaces[oid] = target
                claim(target)
            os.symlink(target, place)
        else:
            count += 1
            if write(place, content(repo, system, head["cluster"]["page_size"], entry), entry["mode"]) != entry["size"]:
                sys.exit(f"{entry['path']} has a wrong length")
    if host_files:
        text = b"".join(repo.frame(system, "meta", frame_of(frame)) for frame in body["host_files"])
        for file in json.loads(text):
            if file["content"] is not None:
                place = os.path.join(os.fsencode(host_files), real_name(file["path"].lstrip("/").replace("%", "%25")))
                os.makedirs(os.path.dirname(place), mode=0o700, exist_ok=True)
                write(place, [bytes(file["content"])], file["mode"] & 0o777)
    escape = lambda path: path.replace(b"\\", b"\\\\").replace(b"\n", b"\\\n").replace(b"\r", b"\\\r")
    table = b"".join(oid.encode() + b" " + escape(target) + b"\n" for oid, target in spaces.items())
    for name, text in (("backup_label", body["backup_label"].encode()),
                       ("tablespace_map", body["tablespace_map"] and table),
                       ("global/pg_control", bytes.fromhex(body["pg_control"]))):
        if text:
            os.sync()  # pg_control comes last, when all else is on disk
            os.makedirs(os.path.join(to, os.path.dirname(name)), mode=0o700, exist_ok=True)
            write(os.path.join(to, name), [text], 0o600)
    os.sync()
    print(f"{count} files of backup {backup} are in {to}")


def wal_file(repo, system, name, data):
    """The name, the position up to which it is filled and the content of an archived WAL file."""
    plain, partial, _ = name.partition(".partial-")
    kind = 2 if partial else 3 if name.endswith(".history") else 4 if name.endswith(".backup") else 1
    fixed = struct.pack("<8sBBHHH16sQI", b"DRWAL\x01\n\0", kind, repo.suite, 0, 0, 0, repo.id, system, int(plain[:8], 16))
    if data[:44] != fixed or data[-8:] != b"DRWLEND\n":
        sys.exit(f"{name} is cut, is not what its name says, or needs a later reader")
    repo.digest(data[:200], data[200:216], f"the header of {name}")
    number, raw, size = struct.unpack("<QQI", data[48:68])
    # Segments are numbered through; a log file of 4 GiB has as many as the segment size allows.
    if kind < 3 and number != int(plain[8:16], 16) * ((1 << 32) // raw) + int(plain[16:24], 16):
        sys.exit(f"{name} holds another segment")
    frames, _, filled = struct.unpack("<IIQ", data[72:88])
    lengths = struct.unpack(f"<{frames}I", data[216:216 + 4 * frames])
    info = b"dr wal 1" + data[:72]
    key = repo.sealed and hkdf(hpke_open(repo.private, b"dr wal key 1", data[120:200]), info)
    at, pieces = 216 + 4 * frames, []
    for index, length in enumerate(lengths):
        frame, at = data[at:at + length], at + length
        if key:
            frame = unseal(key, struct.pack("<IQ", 0, index), frame, data[:72] + struct.pack("<I", index), name)
        pieces.append(decompress(frame, min(size, raw - index * size)))
    whole = b"".join(pieces)
    repo.digest(whole, data[88:104], name)
    return plain + (".partial" if partial else ""), filled, whole


def wal(repo, system, to):
    os.makedirs(to, exist_ok=True)
    count, fullest = 0, {}
    for top in ("wal", "history"):
        for folder, _, names in os.walk(os.path.join(repo.root, f"cluster/{system}/{top}")):
            for name in sorted(names):
                with open(os.path.join(folder, name), "rb") as file:
                    plain, filled, whole = wal_file(repo, system, name, file.read())
                # Several incomplete segments can stand side by side: the one that goes furthest counts.
                if filled >= fullest.get(plain, 0):
                    fullest[plain] = filled
                    with open(os.path.join(to, plain), "wb") as file:
                        file.write(whole)
                count += 1
    os.sync()
    print(f"{count} WAL files are in {to}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repo", required=True)
    parser.add_argument("--key")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list")
    one = commands.add_parser("restore")
    one.add_argument("backup")
    one.add_argument("to")
    one.add_argument("--tablespaces", help="put each below this directory, by its OID")
    one.add_argument("--host-files", help="write files from outside the data directory below this one")
    one = commands.add_parser("wal")
    one.add_argument("system", type=int)
    one.add_argument("to")
    args = parser.parse_args()
    repo = Repository(args.repo, args.key)
    if args.command == "list":
        for system in repo.clusters():
            for backup in repo.manifests(system):
                head, _ = repo.document(f"cluster/{system}/manifest/{backup}", 1, system, backup, head_only=True)
                print(system, backup, head["status"], head["stop_time"], head["stop_lsn"])
        return
    if repo.sealed and not args.key:
        sys.exit("--key is needed: the repository is sealed")
    if not blake3:
        print("the package blake3 is missing: seals are checked, content digests are not", file=sys.stderr)
    if args.command == "restore":
        restore(repo, args.backup, args.to, args.tablespaces, args.host_files)
    else:
        wal(repo, args.system, args.to)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, KeyError, IndexError, struct.error, zstandard.ZstdError, OSError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
