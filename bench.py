"""How fast everything is: each case on fixed data after a warm-up, beside its floor and beside what others use.

    python bench.py                                             # every case with ViT-B/16, on a GPU if there is one
    python bench.py --only mae,graft --against                  # turn by turn with timm's blocks, transformers' ViTMAE
    python bench.py --only mae,graft --against --apart          # each code in a process of its own, as it would be run
    python bench.py --only reading --data PICTURES --against    # per worker core, with torchvision's transforms
    python bench.py --only loop                                 # the demonstration's training loops beside bare steps
    python bench.py --only graft --arch vit_large --batch-size 128 --against --out bench.jsonl

Prints for each case its floor and a table, and appends one JSON line a row to --out. Codes take turns (A B A B ...) in
one process, with --apart each in its own, and medians are given, so that what else the machine does falls on all alike.
FLOPs are those of the matrix products that a case needs (a multiply-add counts twice), whoever runs it.
"""
import contextlib
import ctypes
import gc
import importlib.util
import io
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections import namedtuple

import torch

import data
import run
from bench_cases import CASES, Code, Timed
from data import RunError, UsageError
from model import ARCHS, Block

MATRIX = {"cuda": 8192, "cpu": 2048}    # side of the square matrices whose product is the peak
COPY = {"cuda": 1 << 30, "cpu": 1 << 28}                                    # bytes copied for the bandwidth
LEAST = 0.2                             # seconds that a measurement takes at least, by repeating short calls

Measured = namedtuple("Measured", "seconds cpu waited peak")


def get_args(argv=None):
    parser = run.Parser(description=__doc__.split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--only", help=f"a comma list of {', '.join(CASES)} (default: all)")
    add("--against", action="store_true", help="turn by turn with the references that can be imported")
    add("--arch", choices=ARCHS, default="vit_base", help="at 224 pixels, vit_mini at 32; loop always takes vit_mini")
    add("--batch-size", type=run.number(int, 1), help="pictures a step (default 256 on a GPU, else 16)")
    add("--micro-batch", type=run.number(int, 1), help="of the graft step in micro-batches (default: a quarter)")
    add("--data", help="reading: a folder or a pack of pictures (default: JPEGs drawn for it)")
    add("--data-against", help="reading: what the references read (default: as --data)")
    add("--apart", action="store_true", help="each code in a process of its own, as it would be run")
    add("--part", help=run.argparse.SUPPRESS)
    add("--repeats", type=run.number(int, 1), default=5, help="turns; the median is given")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"))
    add("--amp", choices=("auto", "bf16", "fp16", "off"), default="auto", help="auto: bf16 if the hardware has it")
    add("--compile", choices=("auto", "on", "off"), default="auto", help="torch.compile our blocks; auto: on a GPU")
    add("--out", metavar="FILE.jsonl", help="append one JSON line a row")
    args = parser.parse_args(argv)
    args.given = sys.argv[1:] if argv is None else argv
    args.only = args.only.split(",") if args.only else list(CASES)
    unknown = [name for name in args.only if name not in CASES]
    if unknown:
        parser.error(f"--only {unknown[0]}: it must be one of {', '.join(CASES)}")
    return args


# ------------------------------------------------------------------------------------------------- the clock
def wait(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def status(field):
    """Bytes of a field of /proc/self/status, or None where there is none."""
    try:
        with open("/proc/self/status") as f:
            return next(int(line.split()[1]) * 1024 for line in f if line.startswith(field))
    except (OSError, StopIteration):
        return None


def memory_now(device):
    """Bytes in use, after forgetting the peak so far."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)                             # else the next code reuses what is kept
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as f:
        f.write("5")
    return status("VmRSS:")


def memory_peak(device, before):
    """Bytes in use at most since `memory_now` said `before`, above that; None where the system does not tell."""
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else status("VmHWM:")
    return None if peak is None or before is None else max(peak - before, 0)


def prepare(code, device):
    """Build a code and warm it up: (call, calls that take LEAST seconds, Measured's peak).

    The peak memory is that of building and of the first calls, with what they keep.
    """
    before = memory_now(device)
    call = code.build()
    timed = isinstance(call(), Timed)
    wait(device)
    started = time.perf_counter()
    if not timed:
        call()                                                              # again: now with what the first left behind
    wait(device)
    spent = time.perf_counter() - started
    return call, 1 if timed else max(1, int(LEAST / max(spent, 1e-9))), memory_peak(device, before)


def one_turn(call, count, device):
    """Seconds, seconds of CPU time and share waiting for data of a call, over `count` calls."""
    started, cpu = time.perf_counter(), time.process_time()
    for _ in range(count):
        result = call()
    wait(device)
    if isinstance(result, Timed):
        return result.seconds, None, result.waited
    return (time.perf_counter() - started) / count, (time.process_time() - cpu) / count, None


def turns(codes, repeats, device):
    """A Measured per code: medians over `repeats` turns, in each of which every code runs for LEAST seconds or once."""
    ready = [prepare(code, device) for code in codes]
    found = [[one_turn(call, count, device) for call, count, _ in ready] for _ in range(repeats)]
    return medians(found, [peak for _, _, peak in ready])


def medians(found, peaks):
    """Turns of codes of (seconds, cpu, waited), and the codes' peaks -> a Measured per code."""
    middle = [[None if None in column else statistics.median(column) for column in zip(*times)] for times in zip(*found)]
    return [Measured(*values, peak) for values, peak in zip(middle, peaks)]


def turns_apart(args, case, place):
    """As `turns`, each code in a process of its own: codes that share one also share the memory that it keeps.

    place: the case's name in CASES and its number there.
    """
    children = [subprocess.Popen([sys.executable, os.path.abspath(__file__), *args.given, "--part", f"{place},{i}"],
                                 stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
                for i in range(len(case.codes))]

    def answer(child, code):
        line = child.stdout.readline()
        if not line:
            raise RunError(f"{case.name}: {code.name} failed in its process")
        return json.loads(line)

    def ask(child, code):
        child.stdin.write("\n")
        return answer(child, code)

    pairs = list(zip(children, case.codes))
    try:
        peaks = [ask(*pair) for pair in pairs]                              # one builds after the other
        return medians([[ask(*pair) for pair in pairs] for _ in range(args.repeats)], peaks)
    except BrokenPipeError:
        raise RunError(f"{case.name}: a code failed in its process") from None
    finally:
        for child in children:
            child.kill()
            child.wait()


def out_of_memory(b, case):
    return RunError(f"{case.name}: not enough memory on {b.name}, give a smaller --batch-size")


def part(args):
    """What a process of `turns_apart` does: an answer on standard output for each line of standard input."""
    name, number, code = args.part.split(",")
    answers = sys.stdout

    def answer(what):
        print(json.dumps(what), file=answers, flush=True)

    with contextlib.redirect_stdout(io.StringIO()):                         # what else is said, the first process says too
        b = Bench(args)
        cases = CASES[name](b)                                              # its files live as long as it does
        case = next(itertools.islice(cases, int(number), None))
        code = case.codes[int(code)]
        if b.device.type == "cpu":
            run.keep_memory(code.keeps)
        sys.stdin.readline()
        try:
            call, count, peak = prepare(code, b.device)
            answer(peak)
            for _ in sys.stdin:
                answer(one_turn(call, count, b.device))
        except torch.OutOfMemoryError:
            raise out_of_memory(b, case) from None


def best_of(call, device):
    """Seconds of the fastest of several calls, over 10 times LEAST, after one to warm up."""
    call()
    times = [math.inf]
    end = time.perf_counter() + 10 * LEAST
    while len(times) < 5 or time.perf_counter() < end:
        wait(device)
        started = time.perf_counter()
        call()
        wait(device)
        times.append(time.perf_counter() - started)
    return min(times)


def importable(package):
    return importlib.util.find_spec(package) is not None


class Bench:
    """The device, what it can do at most, and the settings of a run."""

    def __init__(self, args):
        self.args = args
        self.device, rank, processes = run.setup(args.device)
        if processes > 1:
            raise UsageError("bench.py measures one process: start it without torchrun")
        self.dtype = run.precision(args.amp, self.device)
        cuda = self.device.type == "cuda"
        self.batch = args.batch_size or (256 if cuda else 16)
        (patch, dim, depth, heads), self.decoder = ARCHS[args.arch]
        side = 32 if args.arch == "vit_mini" else 224
        self.config = dict(img_size=[side, side], patch_size=patch, in_chans=3, dim=dim, depth=depth, heads=heads,
                           mlp_ratio=4.0)
        self.name = torch.cuda.get_device_name(self.device) if cuda else cpu_name()
        self.rates, self.moves = {}, None

    def rate(self, dtype):
        """FLOP/s of a large square matrix product, measured."""
        dtype = dtype or torch.float32
        if dtype not in self.rates:
            n = MATRIX[self.device.type]
            a, b = (torch.randn(n, n, device=self.device).to(dtype) for _ in range(2))
            self.rates[dtype] = 2 * n ** 3 / best_of(lambda: a @ b, self.device)
        return self.rates[dtype]

    def bandwidth(self):
        """Bytes/s read and written by a large copy, measured."""
        if self.moves is None:
            n = COPY[self.device.type]
            a = torch.zeros(n, dtype=torch.uint8, device=self.device)
            b = torch.empty_like(a).copy_(a)
            self.moves = 2 * n / best_of(lambda: b.copy_(a), self.device)
        return self.moves

    def random(self, *shape):
        return torch.randn(*shape, device=self.device)

    def pictures(self, side, n):
        """n drawn uint8 pictures (n, 3, side, side) in memory, as a set; at most 32 different ones."""
        images = data.draw(torch.arange(min(n, 32)), side)[torch.arange(n) % 32]
        return data.Pictures(images=images, name="drawn").hold(self.device)

    def against(self, package):
        """Whether to run a reference: with --against, and where its package can be imported."""
        if not self.args.against:
            return False
        if not importable(package):
            print(f"  {package} is not installed: left out")
            return False
        return True

    def ours(self, build):
        """Our code under the run's precision, compiled as the training scripts compile it."""
        return Code("ours", build, self.dtype)

    def prepare(self, net):
        net.to(self.device).train()
        blocks = [m for m in net.modules() if isinstance(m, Block)]
        run.compile_blocks(blocks, self.args.compile, self.device, dynamic=False)
        return net


def cpu_name():
    try:
        with open("/proc/cpuinfo") as f:
            names = [line.split(":")[1].strip() for line in f if line.startswith("model name")]
    except OSError:
        names = []
    return f"{names[0] if names else 'CPU'}, {torch.get_num_threads()} threads"


# ------------------------------------------------------------------------------------------------ the report
def floor_line(b, case):
    """What the case costs at least, and why."""
    parts, seconds = [], 0.0
    if case.flops:
        total, dtype = case.flops * case.batch, case.codes[0].dtype
        seconds += total / b.rate(dtype)
        parts.append(f"{total / 1e9:,.1f} GFLOP at {b.rate(dtype) / 1e9:,.0f} GFLOP/s")
    if case.moved:
        seconds += case.moved / b.bandwidth()
        parts.append(f"{case.moved / 1e6:,.1f} MB at {b.bandwidth() / 1e9:,.1f} GB/s")
    floor = f"floor {seconds * 1e3:,.2f} ms: {', '.join(parts)}" if parts else ""
    return "; ".join(text for text in (floor, case.note) if text)


def rows_of(b, case, measured):
    """One dict a code: what is printed and written."""
    rows = []
    for code, m in zip(case.codes, measured):
        rate = case.batch / m.seconds if case.batch else None
        rows.append(dict(
            case=case.name, code=code.name, device=b.name, torch=torch.__version__,
            precision=str(code.dtype or torch.float32).removeprefix("torch."), arch=b.args.arch, batch=case.batch,
            images_per_second=rate, ms=m.seconds * 1e3, cpu_ms=None if m.cpu is None else m.cpu * 1e3,
            peak_mib=None if m.peak is None else m.peak / 2 ** 20, flops_per_image=case.flops or None,
            peak_share=case.flops * rate / b.rate(code.dtype) if case.flops else None, data_wait=m.waited,
            ours_faster=m.seconds / measured[0].seconds))
    return rows


COLUMNS = (("images/s", "images_per_second", "{:,.2f}"), ("ms", "ms", "{:,.2f}"), ("CPU ms", "cpu_ms", "{:,.2f}"),
           ("peak MiB", "peak_mib", "{:,.0f}"), ("MFLOP/image", "flops_per_image", "{:,.0f}"),
           ("of peak", "peak_share", "{:.0%}"), ("waiting", "data_wait", "{:.0%}"),
           ("ours faster", "ours_faster", "{:.2f}x"))


def table(rows):
    """The rows as lines of text; what is not known is left empty."""
    lines = [f"  {'':<30}" + "".join(f"{title:>13}" for title, _, _ in COLUMNS)]
    for row in rows:
        values = row | dict(flops_per_image=row["flops_per_image"] and row["flops_per_image"] / 1e6)
        cells = ["" if values[key] is None else form.format(values[key]) for _, key, form in COLUMNS]
        lines.append(f"  {row['code'] + ' ' + row['precision']:<30}" + "".join(f"{cell:>13}" for cell in cells))
    return lines


def write(path, rows):
    """Append the rows to a file of JSON lines."""
    try:
        with open(path, "a") as f:
            f.writelines(json.dumps(row) + "\n" for row in rows)
    except OSError as error:
        raise RunError(f"--out {path}: cannot write there ({error.strerror})") from None


def main(args):
    if args.part:
        return part(args)
    b = Bench(args)
    if args.out:
        write(args.out, [])
    side = b.config["img_size"][0]
    print(f"{b.name}; torch {torch.__version__}; {b.dtype or torch.float32}; {args.arch} at {side} pixels")
    found = []
    for name in args.only:
        for number, case in enumerate(CASES[name](b)):
            print(f"\n{case.name}: {floor_line(b, case)}", flush=True)
            try:
                measured = (turns_apart(args, case, f"{name},{number}") if args.apart
                            else turns(case.codes, args.repeats, b.device))
                rows = rows_of(b, case, measured)
            except torch.OutOfMemoryError:
                raise out_of_memory(b, case) from None
            print("\n".join(table(rows)), flush=True)
            if args.out:
                write(args.out, rows)
            found += rows
    return found


if __name__ == "__main__":
    run.program(main, get_args)
