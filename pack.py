"""Many pictures in one file, which is read in order: millions of small files are what slows a shared file system down.

    python data.py pack PICTURES PICTURES.pack                      # bytes kept: a run is the folder's, bit for bit
    python data.py pack PICTURES PICTURES.pack --short-side 320     # larger ones shrunk: read in half the time
    python data.py pack --verify PICTURES.pack                      # every picture against its digest

The pack then goes wherever a folder goes as --data: it keeps the folder's names, and so its classes, its parts train/
and val/ or test/, and its order. It is written to PICTURES.pack.part and renamed when it is complete; the same command
goes on where it was stopped, also by a kill or a loss of power.

The format, all numbers little-endian:

    magic     16 bytes, data.PACK_MAGIC
    records   one for each picture: <I length of its name, <Q length of its file, 16 bytes blake2b of both (`digest`),
              its name below PICTURES, its file. The first record has no name: the settings, as JSON
    index     for N pictures in the folder's order: N x <q where its file begins, N x <q its length, their names joined
              by zero bytes
    footer    8 bytes FOOTER_TAG, <Q N, <Q where the index begins, 32 bytes SHA-256 of the index
"""
import contextlib
import fcntl
import functools
import hashlib
import io
import json
import os
import signal
import struct
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image

import run
from data import PACK_MAGIC, Pictures, RunError, UsageError, list_files, report_bad
from decode import Encoded

RECORD, FOOTER = struct.Struct("<IQ16s"), struct.Struct("<8sQQ32s")
FOOTER_TAG = b"pack end"
SYNC = 256 << 20            # bytes between flushes to the disk; what is older is taken as intact after a crash


def get_args(argv=None):
    parser = run.Parser(prog="data.py pack", description="Many pictures into one file.")
    add = parser.add_argument
    add("paths", nargs="+", metavar="PATH", help="folder of pictures, then the file to write; or the file")
    add("--short-side", type=run.number(int, 16, 16384), help="pixels: shrink larger pictures to it, as JPEGs, but "
        "for those with transparency or 16 bits (default: keep every byte)")
    add("--quality", type=run.number(int, 1, 100), default=90, help="of the JPEGs that are shrunk")
    add("--workers", type=run.number(int, 1, 1024), default=os.cpu_count(), help="threads that read and decode")
    add("--max-bad", type=run.number(float, 0, 1), default=0.01, help="fail when more than this share cannot be read")
    add("--verify", action="store_true", help="check every picture of a pack, write nothing")
    args = parser.parse_args(argv)
    if len(args.paths) != (1 if args.verify else 2):
        parser.error("one pack with --verify" if args.verify else "a folder of pictures and the file to write")
    return args


def main(args):
    if args.verify:
        return verify(args.paths[0])
    with stopped_by_signals():
        write_pack(*args.paths, args.short_side, args.quality, args.workers, args.max_bad)


@contextlib.contextmanager
def stopped_by_signals():
    """Signals end what is inside with run.Stopped, for `run.program` to report."""
    def stop(number, frame):
        raise run.Stopped(number)

    previous = {s: signal.signal(s, stop) for s in run.Run.SIGNALS}
    try:
        yield
    finally:
        for s, handler in previous.items():
            signal.signal(s, handler)


def digest(name, content):
    """16 bytes that change when a name or a file's bytes do."""
    return hashlib.blake2b(content, digest_size=16, key=hashlib.blake2b(name).digest()).digest()


class Progress:
    """Prints, every few seconds, how far a job over `total` pictures has come and how long the rest will take."""

    EVERY = 10.0

    def __init__(self, what, total):
        self.what, self.total, self.done = what, total, 0
        self.started = self.said = time.perf_counter()

    def step(self):
        self.done += 1
        now = time.perf_counter()
        if now - self.said >= self.EVERY:
            self.said, rate = now, self.done / (now - self.started)
            print(f"{self.what} {self.done} of {self.total} pictures, {rate:.0f} a second, left "
                  f"{run.duration((self.total - self.done) / rate)}", flush=True)


# ------------------------------------------------------------------------------------------------------ reading
class Packed:
    """Where pictures lie in a pack: offsets and lengths (N,) in bytes.

    The file is opened by whoever reads first: a process gets its own descriptor, and pickling needs none.
    """

    def __init__(self, path, offsets, lengths):
        self.path, self.offsets, self.lengths, self.fd = os.path.abspath(path), offsets, lengths, None

    def __getstate__(self):
        return self.__dict__ | dict(fd=None)

    def __del__(self):
        if self.fd is not None:
            os.close(self.fd)

    def select(self, ids):
        """The pictures at ids, a tensor of indices."""
        return Packed(self.path, self.offsets[ids.numpy()], self.lengths[ids.numpy()])

    def content(self, i):
        """The bytes of picture i's file. OSError when the pack has become shorter than it was."""
        if self.fd is None:
            self.fd = os.open(self.path, os.O_RDONLY)
        content = bytearray(int(self.lengths[i]))
        if os.preadv(self.fd, [content], int(self.offsets[i])) < len(content):
            raise OSError(f"{self.path} ends within this picture")
        return content


def open_pack(path):
    """(names, Packed) of every picture in a pack. UsageError when its index is damaged or leads out of the file."""
    with open(path, "rb") as f:
        size = os.fstat(f.fileno()).st_size
        f.seek(max(size - FOOTER.size, 0))
        footer = f.read()
        tag, n, start, expected = FOOTER.unpack(footer) if len(footer) == FOOTER.size else (None, 0, 0, b"")
        if tag != FOOTER_TAG:
            raise UsageError(f"{path}: this pack has no end, it was cut short; pack or copy it again")
        length = size - FOOTER.size - start
        if length < 16 * n:
            raise UsageError(f"{path}: the end of this pack is damaged")
        f.seek(start)
        index = f.read(length)
    if hashlib.sha256(index).digest() != expected:
        raise UsageError(f"{path}: the index of this pack is damaged")
    offsets, lengths = np.frombuffer(index, "<i8", 2 * n).reshape(2, n)
    names = os.fsdecode(index[16 * n:]).split("\0") if n else []
    inside = (offsets >= len(PACK_MAGIC)) & (lengths >= 0) & (offsets <= start - lengths)
    if len(names) != n or not inside.all():
        raise UsageError(f"{path}: refused, the index of this pack leads out of its pictures")
    for name in names:
        if not name or name.startswith("/") or ".." in name.split("/"):
            raise UsageError(f"{path}: refused, the name {name!r} in this pack leads out of it")
    return names, Packed(path, offsets, lengths)


def verify(path):
    """Read a pack from its beginning to its end; RunError names the pictures whose bytes are not what they were."""
    if not os.path.isfile(path):
        raise UsageError(f"{path}: no such pack")
    with open(path, "rb") as f:
        if f.read(len(PACK_MAGIC)) != PACK_MAGIC:
            raise UsageError(f"{path}: not a pack")
        names, packed = open_pack(path)
        progress, damaged = Progress("verified", len(names)), []
        for i in np.argsort(packed.offsets, kind="stable").tolist():
            name, length = os.fsencode(names[i]), int(packed.lengths[i])
            f.seek(packed.offsets[i] - len(name) - RECORD.size)
            head, kept, content = f.read(RECORD.size), f.read(len(name)), f.read(length)
            if head != RECORD.pack(len(name), length, digest(name, content)) or kept != name:
                damaged.append(names[i])
            progress.step()
    if damaged:
        raise RunError(f"{path}: {len(damaged)} of {len(names)} pictures are damaged: "
                       f"{', '.join(damaged[:8])}{', ...' if len(damaged) > 8 else ''}")
    print(f"{path}: all {len(names)} pictures are as they were packed", flush=True)


# ------------------------------------------------------------------------------------------------------ writing
def prepare(path, short_side=None, quality=90):
    """The bytes to keep of a picture file, or in words why it cannot be read."""
    try:
        with open(path, "rb") as f:
            content = f.read()
        picture = Encoded(bytearray(content))
        if short_side is None or min(picture.size) <= short_side:
            picture.decode(8 if picture.is_jpeg else 1).load()   # only to know that it can be decoded
            return content
        reductions = [f for f in (8, 4, 2) if min(picture.size) >= 2 * f * short_side] if picture.is_jpeg else []
        image = picture.decode(max(reductions, default=1))
        if "A" in image.mode or "a" in image.mode or image.mode[0] in "IF" or "transparency" in image.info:
            return content                                                  # more than a JPEG can hold
        image = image.convert("L" if image.mode in ("1", "L") else "RGB")
        scale = short_side / min(image.size)
        image = image.resize([max(round(side * scale), 1) for side in image.size], Image.LANCZOS)
        image.info.clear()
        packed = io.BytesIO()
        image.save(packed, "JPEG", quality=quality)
        return packed.getvalue()
    except Exception as error:                                              # pillow raises a dozen kinds
        return f"{type(error).__name__}: {error}"


def write_pack(source, path, short_side=None, quality=90, workers=1, max_bad=0.01):
    """Pack the folder `source` into the file `path`; what was begun before and stopped is gone on with."""
    if not os.path.isdir(source):
        raise UsageError(f"{source}: no such folder")
    if os.path.exists(path):
        raise UsageError(f"{path} is there already; remove it to pack again")
    pictures = Pictures(list_files(source), source, name=source)
    if not len(pictures):
        raise UsageError(f"{source}: no pictures found")
    try:
        with begin(f"{path}.part") as f:
            settings = dict(short_side=short_side, quality=quality if short_side else None)
            done = records(f, f"{path}.part", settings)
            kept = functools.partial(prepare, short_side=short_side, quality=quality)
            fill(f, done, pictures, kept, workers, max_bad)
            finish(f, done, pictures.files)
        os.replace(f"{path}.part", path)
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror or error}") from None
    print(f"wrote {path}: {len(pictures) - len(pictures.bad)} pictures, {os.path.getsize(path) / 2 ** 30:.2f} GiB, "
          f"{len(pictures.bad)} skipped", flush=True)


def begin(path):
    """The file under its temporary name, locked against a second process."""
    f = open(path, "r+b" if os.path.exists(path) else "w+b")
    try:
        fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UsageError(f"{path} is being written by another process") from None
    return f


def write_record(f, name, content):
    """Append a record at the place of f; returns where its content begins and its length."""
    f.write(RECORD.pack(len(name), len(content), digest(name, content)))
    f.write(name)
    f.write(content)
    return f.tell() - len(content), len(content)


def records(f, path, settings):
    """{name: (offset, length)} of what a pack that was begun holds; f is left at, and cut to, the end of that.

    A new one gets its magic and its settings. What the disk may not have had when the power failed is checked.
    """
    size = os.fstat(f.fileno()).st_size
    magic, done, end = f.read(len(PACK_MAGIC)), {}, len(PACK_MAGIC)
    if magic != PACK_MAGIC[:len(magic)]:
        raise UsageError(f"{path}: not the beginning of a pack; remove it")
    while len(head := f.read(RECORD.size)) == RECORD.size:
        name_length, length, expected = RECORD.unpack(head)
        offset = end + RECORD.size + name_length
        if offset + length > size:
            break
        name = f.read(name_length)
        if not name or offset + length > size - 2 * SYNC:
            content = f.read(length)
            if digest(name, content) != expected:
                break
            if not name and json.loads(content) != settings:
                raise UsageError(f"{path} was begun with {content.decode()}, not {json.dumps(settings)}: remove it, or "
                                 "use the same options")
        else:
            f.seek(length, os.SEEK_CUR)
        done[name] = offset, length
        end = offset + length
    if b"" not in done:
        f.seek(0)
        f.write(PACK_MAGIC)
        done = {b"": write_record(f, b"", json.dumps(settings).encode())}
        end = f.tell()
    f.seek(end)
    f.truncate()
    return done


def fill(f, done, pictures, prepare, workers, max_bad):
    """Append a record for each picture that `done` lacks, in order; bad ones go into pictures.bad."""
    todo = [i for i, name in enumerate(pictures.files) if os.fsencode(name) not in done]
    if len(todo) < len(pictures):
        print(f"going on: {len(pictures) - len(todo)} of {len(pictures)} pictures are packed already", flush=True)
    progress, block, seen, synced = Progress("packed", len(todo)), 32 * workers, 0, f.tell()
    with ThreadPoolExecutor(workers) as pool:                               # pillow decodes without Python's lock
        for start in range(0, len(todo), block):                            # bounds what is held in memory
            some = todo[start:start + block]
            paths = [os.path.join(pictures.root, pictures.files[i]) for i in some]
            for i, content in zip(some, pool.map(prepare, paths)):
                if isinstance(content, str):
                    pictures.bad[i] = content
                    seen = report_bad(pictures, max_bad, seen)
                else:
                    name = os.fsencode(pictures.files[i])
                    done[name] = write_record(f, name, content)
                progress.step()
            f.flush()
            if f.tell() - synced > SYNC:
                os.fsync(f.fileno())
                synced = f.tell()


def finish(f, done, files):
    """Append the index and the footer, and wait until all is on the disk."""
    names = [name for name in map(os.fsencode, files) if name in done]
    if not names:
        raise RunError("none of the pictures can be read")
    start = f.tell()
    places = np.array([done[name] for name in names], "<i8")
    index = places.T.tobytes() + b"\0".join(names)
    f.write(index)
    f.write(FOOTER.pack(FOOTER_TAG, len(names), start, hashlib.sha256(index).digest()))
    f.flush()
    os.fsync(f.fileno())
