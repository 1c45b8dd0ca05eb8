"""What a training run needs besides its method: options, processes, precision, signals, log, checkpoints.

The loops stay in the stage files; nothing here knows a model.
"""
import argparse
import contextlib
import ctypes
import fcntl
import json
import math
import os
import resource
import signal
import socket
import subprocess
import sys
import time

import torch
import torch.distributed as dist

import checkpoint
import data
import peers
from data import RunError, UsageError


# ------------------------------------------------------------------------------------------------ options
MOST = 1e6                  # where an option gives no bound of its own: beyond this a number is a slip of the hand


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, from the first process alone, and exit code 2. No option may be empty."""

    def parse_args(self, args=None, namespace=None):
        found = super().parse_args(args, namespace)
        for name, value in vars(found).items():
            if "" in (value if isinstance(value, list) else [value]) and value != self.get_default(name):
                self.error(f"argument --{name.replace('_', '-')}: it is empty")
        return found

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n" if os.environ.get("RANK", "0") == "0" else None)


def number(kind=float, low=0.0, high=MOST, above=False):
    """An argparse type: a finite number in [low, high], or (low, high] with above=True."""
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not {'a whole' if kind is int else 'a'} number") from None
        if not math.isfinite(value) or value < low or value > high or (above and value == low):
            bounds = f"above {low:g}" if above else f"at least {low:g}"
            raise argparse.ArgumentTypeError(f"{text} is out of range, it must be {bounds} and at most {high:g}")
        return value
    return parse


def numbers(**limits):
    """An argparse type: a comma list of numbers, such as a rate for each stage."""
    parse = number(**limits)
    return lambda text: [parse(part) for part in text.split(",")]


def image_size(text):
    """An argparse type: 224 or 192x256 (height x width) -> [height, width]."""
    parse = number(int, 1, 4096)
    sides = [parse(part) for part in text.lower().split("x")]
    if len(sides) > 2:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a side (224) nor height x width (192x256)")
    return sides * 2 if len(sides) == 1 else sides


def check(parser, args):
    """What no script can do ends here, before a model is built or a file written."""
    source = getattr(args, "data", None)
    if source and source not in data.DOWNLOADS and not os.path.exists(source):
        parser.error(f"--data {source}: no such folder or list file")
    if getattr(args, "device", None) == "cpu" and getattr(args, "amp", None) == "fp16":
        parser.error("--amp fp16 needs a GPU; on a CPU use bf16 or off")
    if getattr(args, "epochs", None) and (getattr(args, "warmup_epochs", None) or 0) > args.epochs:
        parser.error(f"--warmup-epochs {args.warmup_epochs:g} is more than --epochs {args.epochs}")
    for name in ("out", "results"):
        folder = getattr(args, name, None)
        if isinstance(folder, str):
            while folder and not os.path.lexists(folder):
                folder = os.path.dirname(folder)
            if folder and not os.path.isdir(folder):
                parser.error(f"--{name} {getattr(args, name)}: cannot write there ({folder} is a file)")


def fill(args, defaults):
    """Put `defaults` where no option was given."""
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)


def program(main, get_args):
    """Run a stage from the command line: what the user can mend ends in one line and exit code 2 (asked for
    something impossible) or 1 (the run failed); a signal that asked for a stop ends in 128 + its number."""
    code = 0
    try:
        main(get_args())
    except Stopped as stopped:
        print(f"stopped by {stopped.signal.name}; the same command goes on from here", flush=True)
        code = 128 + stopped.signal
    except RuntimeError as error:                                           # RunError is one
        error = error if isinstance(error, RunError) else peers.blame(error)
        if error is None:
            raise
        code = complain(error, 1)
    except UsageError as error:
        code = complain(error, 2)
    except BrokenPipeError:                                                 # `... | head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())      # else Python tries once more at its end
        code = 128 + signal.SIGPIPE
    if peers.store is not None:
        sys.stdout.flush()
        if code in (1, 2, 128 + signal.SIGPIPE):
            peers.leave()
            os._exit(code)                                                  # to leave the group would be to wait for all
        peers.part()
    sys.exit(code)


def complain(error, code):
    """Print an error in one line, from one process, and return the exit code."""
    if peers.speaks():
        print(f"{os.path.basename(sys.argv[0])}: error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
    return code


# ------------------------------------------------------------------------------------- processes, precision
def setup(device, timeout_minutes=10.0, deterministic=False):
    """(device, rank, processes) from --device and torchrun's environment; one process needs no process group.

    deterministic: torch computes the same bits on every run; on a CPU it does in any case.
    """
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")         # cuBLAS reads it when it first starts
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = deterministic, False
    cuda = torch.cuda.is_available() if device == "auto" else device.startswith("cuda")
    if cuda and not torch.cuda.is_available():
        raise UsageError(f"--device {device}: no CUDA device here")
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if cuda:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) if processes > 1 else 0)
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    else:
        device = torch.device("cpu")
        keep_memory()
    if processes > 1 and not dist.is_initialized():
        peers.connect("nccl" if cuda else "gloo", timeout_minutes)
    return device, int(os.environ.get("RANK", 0)), processes


def keep_memory(keep=True):
    """Have glibc keep the memory that a step frees: given back, it is mapped and zeroed anew at every step.

    With keep=False as glibc comes: at the thresholds that it works up to by itself when large arrays are freed.
    """
    m_trim_threshold, m_mmap_threshold = -1, -3                             # glibc's malloc.h
    most = 32 << 20                                                         # of the second, before glibc 2.35
    with contextlib.suppress(OSError, AttributeError):                      # other C libraries do as they do
        libc = ctypes.CDLL("libc.so.6")
        if not (keep and libc.mallopt(m_mmap_threshold, 1 << 30)):
            libc.mallopt(m_mmap_threshold, most)
        libc.mallopt(m_trim_threshold, -1 if keep else 2 * most)


def precision(choice, device):
    """The autocast type for --amp, or None for float32: bf16 where the hardware has it, fp16 on older GPUs."""
    if choice == "auto":
        if device.type == "cuda":
            return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16
        return torch.bfloat16 if cpu_has_bf16() else None
    if choice == "fp16" and device.type == "cpu":
        raise UsageError("--amp fp16 needs a GPU; on a CPU use bf16 or off")
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[choice]


def cpu_has_bf16():
    """Whether this CPU multiplies bf16 matrices in hardware (AMX or AVX-512 BF16), as Linux tells."""
    try:
        with open("/proc/cpuinfo") as f:
            flags = f.read()
    except OSError:
        return False
    return "amx_bf16" in flags or "avx512_bf16" in flags


def grad_scaler(device, dtype):
    """Loss scaling for fp16. Otherwise the scale is 1, or a power of two after a skipped step: exact. What is used
    then is that a step with a non-finite gradient is skipped on the device, without synchronisation."""
    if dtype == torch.float16:
        return torch.amp.GradScaler(device.type)
    return torch.amp.GradScaler(device.type, init_scale=1.0, backoff_factor=0.5, growth_interval=1 << 30)


def available_memory():
    """Bytes of memory that programs can still get, as Linux tells; elsewhere 4 GiB."""
    try:
        with open("/proc/meminfo") as f:
            lines = dict(line.split(":") for line in f)
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return 4 << 30


def micro_batch(asked, step, n, device, processes, params, share=0.5):
    """Images per micro-batch: as asked, else the largest of n, n/2, n/4, ... that fits the device of every process.

    step(k) is one forward and backward of k images. On CUDA found by trying, with room left for AdamW's moments of
    `params`. On a CPU, where a try that fails would kill the process, from the bytes that autograd keeps for one
    image and `share` of the memory that is free.
    """
    if asked:
        return min(asked, n)
    size = n
    if device.type == "cuda":
        moments = [torch.empty_like(p) for p in params if p.requires_grad for _ in range(2)]
        while True:
            try:
                step(size)
                break
            except torch.OutOfMemoryError:
                if size == 1:
                    raise RunError("not even one image fits the memory of this device") from None
            torch.cuda.empty_cache()
            size = (size + 1) // 2
        del moments
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    else:
        kept = {}

        def note(tensor):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        probe = min(n, 2)
        with uncompiled(), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            step(probe)
        while size > 1 and size * sum(kept.values()) / probe > share * available_memory() / processes:
            size = (size + 1) // 2
    if processes > 1:
        smallest = torch.tensor([size], device=device)
        dist.all_reduce(smallest, op=dist.ReduceOp.MIN)
        size = int(smallest)
    return size


GRAPHS = 32                 # that torch.compile may keep of a block: by role, gradient, shape; torch's 8 are too few


def compile_blocks(blocks, choice, device, dynamic=None):
    """torch.compile each of the blocks: with --compile on, or auto on a GPU, where auto goes without if it cannot.

    dynamic=False: a graph a shape, where shapes are few. Left to torch, the second shape that it meets (MAE's decoder,
    after its encoder) gets a graph for any size, whose kernels know less.
    """
    if choice == "off" or (choice == "auto" and device.type != "cuda"):
        return
    try:
        torch._dynamo.config.cache_size_limit = GRAPHS                      # recompile_limit, by the name of torch 2.6
        torch.compile(torch.nn.functional.gelu)(torch.ones(2, device=device))
    except Exception as error:                                              # whatever is missing: Triton, a compiler
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        if choice == "on":
            raise RunError(f"--compile on: torch.compile does not work here ({reason}); go without: --compile off") from None
        if peers.speaks():
            print(f"warning: torch.compile does not work here ({reason}): the run goes on without it", flush=True)
        return
    for block in blocks:
        block.compile(dynamic=dynamic)


def uncompiled():
    """A context in which compiled blocks run as they are written: for sizes that no training step has."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else contextlib.nullcontext()


# options that change how a run goes, not what it computes: they may differ when it is resumed
RUNTIME = ("out", "resume", "device", "workers", "compile", "accum", "micro_batch", "log_every", "save_minutes",
           "mode", "every_epochs", "knn_every", "eval_every", "results", "max_bad", "decode", "timeout_minutes",
           "deterministic")


def settings(args, **more):
    """What a run computes depends on: the options but those of RUNTIME, and `more`. Kept in its checkpoint."""
    return {k: v for k, v in vars(args).items() if k not in RUNTIME} | more


def peak_memory(device):
    """Peak bytes: of the CUDA allocator, or of this process's resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def commit():
    """The commit of this code, with + if it was changed since; None where git does not know."""
    here = os.path.dirname(os.path.abspath(__file__))
    try:
        head = subprocess.run(["git", "describe", "--always", "--dirty=+", "--abbrev=12"], cwd=here,
                              capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return head.stdout.strip() or None


def write_result(out, entry, once=False):
    """Print a result as one JSON line and append it to results.jsonl in the folder `out`.

    once: unless the same result is there already, but for the time it took: a finished run was started again.
    """
    line, path = json.dumps(entry), os.path.join(out, "results.jsonl")

    def essence(result):
        return {k: v for k, v in json.loads(json.dumps(result)).items() if k not in ("seconds", "commit")}

    try:
        os.makedirs(out, exist_ok=True)
        if not (once and os.path.exists(path) and essence(entry) in map(essence, read_results(path))):
            with open(path, "a") as f:
                f.write(line + "\n")
    except OSError as error:
        raise RunError(f"cannot write {out}/results.jsonl ({error.strerror}); the result was {line}") from None
    print(line, flush=True)


def read_results(path):
    """The entries of a results.jsonl."""
    try:
        with open(path) as f:
            return [json.loads(line) for line in f if line.strip()]
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: cannot be read as results, one JSON object a line ({error})") from None


# ----------------------------------------------------------------------------------------------- the run
LOCKS = set()
# a process forked to read pictures outlives a killed run by seconds; it must not keep the folder locked
os.register_at_fork(after_in_child=lambda: [lock.close() for lock in LOCKS])


class Stopped(Exception):
    """A signal asked for a stop, and the checkpoint is written."""

    def __init__(self, number):
        self.signal = signal.Signals(number)


class Run:
    """The folder of a run: lock, signals, log.jsonl, last.pt and previous.pt. Use as `with Run(...) as run`."""

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    VOTE_SECONDS = 1.0                                                      # between votes of several processes
    PATIENCE = 3                                                            # lines of the log that show a collapse
    NEEDED = {"model", "optimizer", "scaler", "step", "settings", "skipped"}

    def __init__(self, out, rank, processes, device, log_every, steps, batch_size, save_minutes=10.0, max_skipped=5):
        self.out, self.rank, self.processes, self.device = out, rank, processes, device
        self.log_every, self.steps, self.batch_size = log_every, steps, batch_size
        self.save_minutes = save_minutes
        self.max_skipped, self.skipped = max_skipped, 0
        self.window = []                                        # (step, loss, ids, overflow) since the last log
        self.optimizer = self.scaler = self.dtype = self.chance = None
        self.warmup, self.collapsed, self.warned = 0, 0, set()
        self.signal = None
        self.lock = None

    def path(self, name):
        return os.path.join(self.out, name)

    def __enter__(self):
        if self.rank == 0:
            try:
                os.makedirs(self.out, exist_ok=True)
                self.lock = open(self.path("lock"), "a+")
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self.lock.seek(0)
                raise UsageError(f"--out {self.out} is in use by {self.lock.read().strip()}") from None
            except OSError as error:
                raise UsageError(f"--out {self.out}: cannot write there ({error.strerror})") from None
            self.lock.truncate(0)
            self.lock.write(f"process {os.getpid()} on {socket.gethostname()}")
            self.lock.flush()
            LOCKS.add(self.lock)
        try:
            self.previous = {s: signal.signal(s, self.on_signal) for s in self.SIGNALS}
        except ValueError:                                                  # not the main thread: no signals then
            self.previous = {}
        self.started = self.marked = self.saved = self.voted = time.perf_counter()
        self.vote_at, self.last_vote = 0, None
        return self

    def __exit__(self, *exception):
        for s, handler in self.previous.items():
            signal.signal(s, handler)
        if self.lock is not None:
            LOCKS.discard(self.lock)
            self.lock.close()

    def on_signal(self, number, frame):
        if self.signal == number == signal.SIGINT:
            os._exit(128 + number)                                          # a second Ctrl-C: at once
        self.signal = number

    def watch(self, optimizer, scaler, dtype=None, warmup=0, chance=None):
        """Look after gradients, the loss scale and, with `warmup` steps over, a loss that stays at `chance`."""
        self.optimizer, self.scaler, self.dtype, self.warmup, self.chance = optimizer, scaler, dtype, warmup, chance
        # GradScaler tells a fused optimizer on the device, without synchronisation, whether to skip its step
        optimizer.register_step_pre_hook(lambda optimizer, *_: setattr(self, "overflow", optimizer.found_inf))
        self.overflow = torch.zeros((), device=self.device)

    def asked(self, step):
        """(number of a signal that arrived on any process, or 0; whether --save-minutes are over).

        One process looks at each step. Several vote about once a second, and agree when the next vote is.
        """
        now = time.perf_counter()
        due = now - self.saved > 60 * self.save_minutes
        if self.processes == 1:
            return self.signal or 0, due
        if step < self.vote_at and step % self.log_every:
            return 0, False
        pace = (now - self.voted) / (step - self.last_vote) if self.last_vote is not None else self.VOTE_SECONDS
        signals, dues, paces = zip(*peers.ask("signals", [self.signal or 0, due, pace]))
        self.voted, self.last_vote = now, step
        self.vote_at = step + max(1, int(self.VOTE_SECONDS / max(*paces, 1e-6)))
        return max(signals), dues[0]

    # -- checkpoints
    def save(self, state, before=()):
        """Write last.pt; the one before stays as previous.pt, and is only replaced once the new one was read back.

        before: files written ahead of it, {name: content}: a kill between them leaves them newer than last.pt, and
        they are written again as the run goes on from it. Weights that are not finite are never written: no step
        brings them back.
        """
        broken = [name for name, tensor in state["model"].items() if not tensor.isfinite().all()]
        if broken:
            raise RunError(f"{broken[0]} is not finite at step {state['step']}; {self.way_out()}")
        if self.rank == 0:
            for name, content in dict(before).items():
                checkpoint.save(content, self.path(name))
            fresh, last, previous = self.path("fresh.pt"), self.path("last.pt"), self.path("previous.pt")
            checkpoint.save(state, fresh)
            checkpoint.read(fresh)
            try:
                if os.path.exists(last):
                    os.replace(last, previous)
                os.replace(fresh, last)
            except OSError as error:
                raise RunError(f"cannot write {last}: {error.strerror}") from None
        self.saved = time.perf_counter()

    def load(self, settings):
        """The state in last.pt, or in previous.pt if that is damaged, or None. It must come from the same settings."""
        state = None
        for name in ("last.pt", "previous.pt"):
            path = self.path(name)
            if not os.path.exists(path):
                continue
            try:
                state = checkpoint.read(path)
                if not isinstance(state, dict) or not self.NEEDED <= set(state):
                    raise UsageError(f"{path}: not a checkpoint to resume from")
            except UsageError as error:
                self.say(f"warning: {error}; trying the checkpoint before it")
                state = None
                continue
            changed = [k for k, v in settings.items() if state["settings"].get(k) != v]
            if changed:
                k = changed[0]
                raise UsageError(f"{path} was written with {k} {state['settings'].get(k)}, now {k} is {settings[k]}: "
                                 f"use another --out, or --resume never to start over")
            self.say(f"resumed {path} at step {state['step']} of {self.steps}")
            break
        peers.same("steps to go on from in --out", state["step"] if state else 0)
        self.cut_log(state["step"] if state else 0)
        self.skipped = state["skipped"] if state else 0
        return state

    def restore(self, state, net):
        """Put a loaded state back into the network, and the optimizer and scaler being watched; returns its step."""
        try:
            net.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.scaler.load_state_dict(state["scaler"])
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(f"{self.path('last.pt')} is not of this run ({str(error).splitlines()[0]}): use another "
                             "--out, or --resume never to start over") from None
        return state["step"]

    def cut_log(self, step):
        """Drop what log.jsonl says of steps after `step`: they are run again."""
        path = self.path("log.jsonl")
        if self.rank or not os.path.exists(path):
            return

        def step_of(line):
            """The step that a line is of; no step is as late as that of half a line."""
            try:
                return json.loads(line)["step"] if line.endswith("\n") else math.inf
            except (ValueError, KeyError, TypeError):
                return math.inf

        try:
            with open(path) as f:
                lines = [line for line in f if step_of(line) <= step]
            with open(path + ".tmp", "w") as f:
                f.writelines(lines)
                f.flush()
                os.fsync(f.fileno())
            os.replace(path + ".tmp", path)
        except OSError as error:
            raise RunError(f"cannot write {path}: {error.strerror}") from None

    # -- log
    def say(self, line):
        if self.rank == 0:
            print(line, flush=True)

    def warn(self, line):
        """Say something once in a run."""
        if line.split(":")[0] not in self.warned:
            self.warned.add(line.split(":")[0])
            self.say(f"warning: {line}")

    def record(self, step, loss, ids):
        """Note the loss of a step; it is read, without stalling the device before, when it is logged."""
        self.window.append((step, loss.detach(), ids, self.overflow if self.optimizer else torch.zeros(())))

    def check(self, losses, pictures):
        """Stop when more than a few losses or gradients since the start were not finite (their steps were skipped).

        losses: means over all processes, so that all of them stop together; gradients are such means already.
        """
        overflows = torch.stack([overflow.to(self.device) for *_, overflow in self.window]).tolist()
        for (step, own, ids, _), loss, overflow in zip(self.window, losses.tolist(), overflows):
            # with fp16, finding the scale of the loss costs a step now and then
            if math.isfinite(loss) and (not overflow or self.dtype == torch.float16):
                continue
            self.skipped += 1
            if not math.isfinite(own) or math.isfinite(loss):
                what = "gradient is not finite" if math.isfinite(loss) else f"loss is {own.item()}"
                names = ", ".join(pictures.file(i) for i in ids.tolist()[:8])
                print(f"warning: rank {self.rank}: {what} at step {step}, step skipped; "
                      f"pictures {names}{', ...' if len(ids) > 8 else ''}", flush=True)
            if self.skipped > self.max_skipped:
                raise RunError(f"loss or gradient was not finite {self.skipped} times, last at step {step}; "
                               f"{self.way_out()}")

    def check_scale(self):
        """fp16 works at a loss scale of some thousands. One that falls and falls means that no step is taken."""
        scale = self.scaler.get_scale()
        if scale < 2 ** -16:
            raise RunError(f"the loss scale of fp16 has collapsed to {scale:.2g}, no step is taken; {self.way_out()}")
        if scale < 1:
            self.warn(f"the loss scale of fp16 has fallen below 1: it is {scale:.2g}, gradients overflow again and "
                      "again. Try --amp bf16 or off, or a lower --lr")
        return scale

    def check_collapse(self, step, loss, more):
        """Say once when features have collapsed to a point or a line, or the loss stays what it is by chance."""
        signs = []
        if self.chance and more.get("contrastive", loss) >= 0.99 * self.chance:
            signs.append(f"the loss is at its chance level, {self.chance:.3f}")
        if more.get("rank", math.inf) < 1.5:
            signs.append(f"the effective rank of the features is {more['rank']:.2f}")
        if more.get("std", math.inf) < 1e-3:
            signs.append(f"the spread of the embeddings is {more['std']:.1e}")
        self.collapsed = self.collapsed + 1 if signs and step > self.warmup else 0
        if self.collapsed == self.PATIENCE:
            self.warn(f"the features may have collapsed: {' and '.join(signs)} at step {step}. Try a lower --lr, a "
                      "longer --warmup-epochs or a larger --batch-size, and see that the pictures differ")

    def way_out(self):
        """What to do when a run has gone wrong."""
        last = self.path("last.pt")
        kept = f"the last good checkpoint is {last}" if os.path.exists(last) else "nothing saved yet"
        return f"{kept}. Try a lower --lr, a longer warm-up or --amp off"

    def log(self, step, epoch, lrs, loader, **more):
        """Write a line of log.jsonl and the progress line: means since the last one, over all processes."""
        losses = torch.stack([loss.float() for _, loss, *_ in self.window]).to(self.device)
        if self.processes > 1:
            dist.all_reduce(losses)
            losses /= self.processes
        self.check(losses, loader.pictures)
        loss = losses[losses.isfinite()].mean().item()
        more = {k: float(v) for k, v in more.items()}
        if self.dtype == torch.float16:
            more["scale"] = self.check_scale()
        self.check_collapse(step, loss, more)
        now = time.perf_counter()
        seconds = (now - self.marked) / len(self.window)
        entry = dict(step=step, epoch=round(epoch, 4), loss=loss, lr=lrs,
                     images_per_second=round(self.batch_size / seconds, 1), seconds=round(now - self.marked, 3),
                     data_wait=round(min(loader.waited / (now - self.marked), 1.0), 4), **more)
        self.marked, loader.waited = now, 0.0
        self.window = []
        # JSON has no word for what is not a number
        line = json.dumps({k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in entry.items()})
        if self.rank == 0:
            try:
                with open(self.path("log.jsonl"), "a") as f:
                    f.write(line + "\n")
            except OSError as error:
                raise RunError(f"cannot write {self.path('log.jsonl')}: {error.strerror}") from None
            left = (self.steps - step) * seconds
            extra = "".join(f" {k} {v:.3g}" for k, v in more.items())
            rates = ",".join(f"{lr:.2g}" for lr in lrs)
            print(f"epoch {epoch:.2f} step {step}/{self.steps} loss {loss:.4f} lr {rates}{extra} "
                  f"{entry['images_per_second']:.0f} images/s wait {100 * entry['data_wait']:.0f}% "
                  f"peak {peak_memory(self.device) / 2 ** 30:.1f} GiB left {duration(left)}", flush=True)
        return entry


def duration(seconds):
    """1:02:03 or 2:03."""
    hours, rest = divmod(int(seconds + 0.5), 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}" if hours else f"{rest // 60}:{rest % 60:02}"
