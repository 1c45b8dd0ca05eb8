"""Read every picture of a folder beforehand, so that no run meets a bad one: python data.py check DIR.

    python data.py check IMAGENET --out bad.txt

Says how many are good and of which kind, names the bad ones and what is wrong with them, by kind; exit code 1 if any.
"""
import contextlib
import os
import sys
import time
from collections import Counter
from multiprocessing.pool import ThreadPool

import run
from data import EXTENSIONS, Pictures, RunError, UsageError, list_files
from decode import BadFile, open_picture
from run import number

NAMED = 20                  # bad files named on the screen; --out names them all
# what a BadFile says: the kind it is counted under; the first that fits
KINDS = (("DecompressionBomb", "decompression bomb"), ("PermissionError", "no permission"),
         ("FileNotFoundError", "vanished"), ("UnidentifiedImageError", "no picture"), ("truncated", "truncated"),
         ("Truncated", "truncated"), ("EOF", "truncated"))


def get_args(argv=None):
    parser = run.Parser(prog="data.py check", description=__doc__.split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("folder", help="folder of pictures, with all that is below it")
    add("--workers", type=number(int, 1, 256), default=os.cpu_count(), help="pictures read at once")
    add("--out", help="file for the list of bad ones: name, tab, kind, tab, what is wrong")
    args = parser.parse_args(argv)
    if not os.path.isdir(args.folder):
        parser.error(f"{args.folder}: no such folder")
    if args.out and (os.path.isdir(args.out) or not os.path.isdir(os.path.dirname(args.out) or ".")):
        parser.error(f"--out {args.out}: cannot write there")
    return args


def kind_of(path, said):
    """The kind of trouble that a BadFile tells of."""
    if os.path.exists(path) and os.path.getsize(path) == 0:
        return "empty"
    return next((kind for words, kind in KINDS if words in said), "damaged")


def look(pictures, i):
    """(what is special about picture i, None), or (kind of trouble, what is wrong)."""
    path = os.path.join(pictures.root, pictures.files[i])
    special = []
    try:
        pictures.read(i)
        # of a picture that can be read; what its rarer parts are like is no reason to refuse it
        with contextlib.suppress(Exception), open_picture(path) as image:
            extension = os.path.splitext(path)[1].lower()
            special = [word for word, true in (
                ("animated", getattr(image, "n_frames", 1) > 1), ("CMYK", image.mode == "CMYK"),
                ("16-bit", image.mode.startswith("I")), ("turned by EXIF", image.getexif().get(0x0112, 1) != 1),
                ("another format than its name says", extension not in extensions_of(image.format))) if true]
    except BadFile as error:
        return kind_of(path, str(error)), str(error)
    return special, None


def extensions_of(form):
    """The endings of names that go with a format of pillow's."""
    return {"JPEG": (".jpg", ".jpeg"), "MPO": (".jpg", ".jpeg"), "TIFF": (".tif", ".tiff"), "PPM": (".ppm", ".pgm"),
            "JPEG2000": (".jp2",)}.get(form, (f".{form.lower()}",))


def progress(done, total, bad, started):
    left = (time.perf_counter() - started) / done * (total - done)
    print(f"{done}/{total} read, {bad} bad, left {run.duration(left)}", file=sys.stderr, flush=True)


def counted(kinds):
    """2 truncated, 1 empty: the most first."""
    return ", ".join(f"{n} {kind}" for kind, n in kinds.most_common())


def main(args):
    """[(file, kind, what is wrong)] of the bad pictures; a RunError if there are any."""
    files = list_files(args.folder)
    if not files:
        raise UsageError(f"{args.folder}: no pictures found (looked for {', '.join(EXTENSIONS)})")
    pictures = Pictures(files, args.folder)
    bad, kinds, special = [], Counter(), Counter()
    started = told = time.perf_counter()
    with ThreadPool(args.workers) as pool:                                  # pillow decodes outside Python's lock
        found = pool.imap(lambda i: look(pictures, i), range(len(files)), chunksize=16)
        for i, (what, trouble) in enumerate(found):
            if trouble is None:
                special.update(what)
            else:
                bad.append((files[i], what, trouble))
                kinds[what] += 1
                if len(bad) <= NAMED:
                    print(f"{os.path.join(args.folder, files[i])}: {what} ({trouble})", flush=True)
            if time.perf_counter() - told > 2:
                told = time.perf_counter()
                progress(i + 1, len(files), len(bad), started)
    if len(bad) > NAMED:
        print(f"... and {len(bad) - NAMED} more", flush=True)
    print(f"{len(files) - len(bad)} of {len(files)} pictures are good" + (f", among them {counted(special)}"
          if special else "") + f"; {run.duration(time.perf_counter() - started)}", flush=True)
    if args.out:
        try:
            with open(args.out, "w") as f:
                f.writelines("\t".join(" ".join(str(part).split()) for part in line) + "\n" for line in bad)
        except OSError as error:
            raise RunError(f"cannot write {args.out}: {error.strerror}") from None
    if bad:
        raise RunError(f"{len(bad)} of {len(files)} pictures are bad: {counted(kinds)}")
    return bad
