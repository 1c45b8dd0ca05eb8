"""What a run needs besides its method: options, processes, precision, signals, log, checkpoints.

    env = run.setup(args)                                   # device, precision, rank, processes
    job = run.Job(args, env, net, optimizer, scaler, loader, meta)
    for step, batch in job.steps():                         # resumes, logs, saves and stops
        ...                                                 # the method, in the stage's file
        job.record(loss, batch, rates)

Nothing here knows a loss. Several processes agree through the store in which torchrun's processes
meet, never through the GPU, so that none of it waits for a device.
"""
import os
import signal
import sys
import threading


def interrupted(*_):
    """A Ctrl-C before `program` listens, while torch is imported: a line, not a traceback."""
    os.write(2, b"interrupted\n")
    os._exit(128 + signal.SIGINT)


# a handler, since an exception may be lost in torch's own ones
early = (signal.getsignal(signal.SIGINT) is signal.default_int_handler
         and threading.current_thread() is threading.main_thread())
if early:
    signal.signal(signal.SIGINT, interrupted)

import argparse
import contextlib
import csv
import ctypes
import errno
import fcntl
import inspect
import json
import math
import pickle
import platform
import re
import resource
import socket
import subprocess
import time
from argparse import ArgumentTypeError
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
from PIL import Image
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map_only

import augment
import checkpoint
import data
from data import Progress, duration, value_range
from model import ARCHS, Block, feature_stats, gather, group_table, knn_scores

if early:
    signal.signal(signal.SIGINT, signal.default_int_handler)


class UsageError(ValueError):
    """What was asked for cannot be done as asked: one line, exit code 2."""
    exit_code = 2


class RunError(RuntimeError):
    """The run failed for a reason that the user can mend: one line, exit code 1."""
    exit_code = 1


class Stopped(Exception):
    """A signal asked for a stop, and the checkpoint is written."""

    def __init__(self, number):
        self.signal, self.exit_code = signal.Signals(number), 128 + number


# ------------------------------------------------------------------------------------------ options
class Parser(argparse.ArgumentParser):
    """argparse with errors of one line, from the first process alone. No option may be empty.

    small, paper: the defaults without and with --data, by option.
    """

    def __init__(self, doc, small=(), paper=(), **more):
        super().__init__(description=doc.split("\n\n")[0], allow_abbrev=False, **more)
        self.small, self.paper = dict(small), dict(paper)

    def format_help(self):
        """The help with every default, but those of which an option's own help tells."""
        for action in self._actions:
            default = self.paper.get(action.dest, action.default)
            told = default is False or default in (None, "", argparse.SUPPRESS)
            if action.option_strings and not told and "default" not in (action.help or "default"):
                small = self.small.get(action.dest, default)
                also = f", embedded {shown(small)}" if small != default else ""
                action.help += f" (default: {shown(default)}{also})"
        return super().format_help()

    def group(self, title):
        """The add_argument of a titled group of options."""
        return self.add_argument_group(title).add_argument

    def parse_args(self, args=None, namespace=None):
        found = super().parse_args(args, namespace)
        for name, value in vars(found).items():
            values = value if isinstance(value, list) else [value]
            if "" in values and value != self.get_default(name):
                self.error(f"argument --{name.replace('_', '-')}: it is empty")
        return found

    def error(self, message):
        first = os.environ.get("RANK", "0") == "0"
        self.exit(2, f"{self.prog}: error: {message}\n" if first else None)


def shown(value):
    """A default as it is typed: 1.5e-5,1.5e-5,1.5e-4 or, a size, 224."""
    if not isinstance(value, list):
        return str(value)
    if len(value) == 2 and all(isinstance(v, int) for v in value):
        return "x".join(map(str, dict.fromkeys(value)))
    return ",".join(v if isinstance(v, str) else f"{v:g}" for v in value)


def number(kind=float, low=0.0, high=1e6, above=False):
    """An argparse type: a finite number in [low, high], or (low, high] with above=True."""
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            what = "a whole" if kind is int else "a"
            raise ArgumentTypeError(f"{text!r} is not {what} number") from None
        if not low <= value <= high or (above and value == low):        # NaN is not either
            least = f"above {low:g}" if above else f"at least {low:g}"
            raise ArgumentTypeError(f"{text} is out of range, it must be {least} and at most "
                                    f"{high:g}")
        return value
    return parse


def numbers(**limits):
    """An argparse type: a comma list of numbers, such as a rate for each stage."""
    parse = number(**limits)
    return lambda text: [parse(part) for part in text.split(",")]


def image_size(text):
    """An argparse type: 224 or 192x256 (height x width) -> [height, width]."""
    sides = [number(int, 1, 4096)(part) for part in text.lower().split("x")]
    if len(sides) > 2:
        raise ArgumentTypeError(f"{text!r} is neither a side (224) nor height x width (192x256)")
    return sides * 2 if len(sides) == 1 else sides


# what writes the checkpoints that a stage starts from by default
MTL = "`python graft_train.py --mim-weight 1 --out out/mtl`"
MADE_BY = {"out/mae": "`python mae_pretrain.py`",
           "out/graft": "`python mae_pretrain.py` and `python graft_train.py`",
           "out/moco": "`python graft_train.py --init none --out out/moco`",
           "out/mtl": f"`python mae_pretrain.py` and {MTL}"}
COUNT, SIZE, SHARE = number(int), number(int, 1), number(float, 0, 1)
AUTO = dict(default="auto")
# what several stages have in common; a stage names what it takes of it, with add_options
OPTIONS = {
    "data": dict(help="folder, list, tar, cifar10, cifar100 (default: $DATA, else embedded)"),
    "img-size": dict(type=image_size, help="224 or HEIGHTxWIDTH (default: the checkpoint's; "
                     "without one 224, embedded 32)"),
    "in-chans": dict(type=int, choices=(1, 3, 4), help="grey, RGB, RGBA (default: --init's or 3)"),
    "stats": dict(choices=("imagenet", "data"),
                  help="of the channels (default: the checkpoint's, else imagenet)"),
    "range": dict(type=value_range, metavar="LOW,HIGH|auto", help="black and white of 16-bit and "
                  "float images (default: the checkpoint's, or by type)"),
    "labels-file": dict(metavar="CSV", help="instead of class folders: columns file, label, split"),
    "val-share": dict(type=number(float, 0, 0.9), default=0.0,
                      help="share of each class to test on, where there is no val/ or test/"),
    "workers": dict(type=number(int, 0, 256), default=min(os.cpu_count(), 10),
                    help="reading processes per device"),
    "max-bad": dict(type=SHARE, default=0.01, help="stop at this share of unreadable files"),
    "crop-min": dict(type=number(float, 0, 1, above=True), help="smallest crop, as a share"),
    "init": dict(help="encoder to start from: a run's folder, our files, MAE, MoCo v3, DINO, timm, "
                 "transformers; or none"),
    "arch": dict(choices=ARCHS, help="with --init none"),
    "patch-size": dict(type=number(int, 1, 256), help="with --init none (default: --arch's)"),
    "heads": dict(type=number(int, 1, 256), help="where a checkpoint does not say how many"),
    "init-size": dict(type=image_size, help="of a checkpoint's images, if unsaid and "
                      "not square"),
    "freeze-blocks": dict(type=COUNT, default=0, metavar="K", help="keep the embeddings and the "
                          "first K blocks, as in two-stage grafting"),
    "mask-ratio": dict(type=number(float, 0, 0.99, above=True), default=0.75,
                       help="share of the patches that MAE removes"),
    "micro-batch": dict(AUTO, type=lambda text: 0 if text == "auto" else SIZE(text), metavar="M",
                        help="images per device at once: sets the memory, not the result"),
    "weights": dict(choices=("base", "momentum", "ema"), default="base",
                    help="which of the encoders that a checkpoint may hold"),
    "out": dict(help="folder of this run"),
    "results": dict(help="folder of the results.jsonl that gets the result (default: --out)"),
    "per-class": dict(action="store_true", help="also write precision, recall and F1 of each class "
                      "and the confusion matrix"),
    "resume": dict(AUTO, choices=("auto", "never"), help="go on from --out, or start over"),
    "seed": dict(type=number(int, 0, 2 ** 31), default=0, help="of weights, order, crops, masks"),
    "device": dict(AUTO, choices=("auto", "cpu", "cuda"), help="auto: a GPU, if any"),
    "amp": dict(AUTO, choices=("auto", "bf16", "fp16", "off"),
                help="auto: bf16 if the hardware has it; off: float32, on a GPU in TF32"),
    "compile": dict(AUTO, choices=("auto", "on", "off"), help="torch.compile, auto: on a GPU"),
    "log-every": dict(type=SIZE, default=20, help="steps between lines of the log"),
    "save-minutes": dict(type=number(float, 0, above=True), default=10.0,
                         help="between checkpoints; the last step and a signal save too"),
    "knn-every": dict(type=COUNT, default=0, help="epochs between k-NN accuracies; 0: never"),
    "every-epochs": dict(type=COUNT, default=0, help="epochs between epochNNNN.pt; 0: none"),
    "timeout-minutes": dict(type=number(float, 0, 1440, above=True), default=10.0,
                            help="for a process that hangs"),
    "deterministic": dict(action="store_true", help="the same bits on every run; slower on a GPU"),
    "bf16-gradients": dict(action="store_true", help="exchanged in bf16: half the bytes, rounded"),
    "tensorboard": dict(action="store_true", help="write the log for tensorboard too"),
}
# options that change how a run goes, not what it computes: they may differ when it is resumed
RUNTIME = ("out", "resume", "device", "workers", "compile", "micro_batch", "log_every",
           "save_minutes", "mode", "every_epochs", "knn_every", "eval_every", "results", "max_bad",
           "timeout_minutes", "deterministic", "tensorboard", "per_class")
# where files lie; that they are the same ones their digests say
PLACES = ("data", "labels_file", "init", "checkpoint")


def add_options(add, names, **defaults):
    """Add options of the table above; `defaults` by their names with underscores."""
    for name in names.split():
        key = name.replace("-", "_")
        add(f"--{name}", **OPTIONS[name] | ({"default": defaults[key]} if key in defaults else {}))


def parse(parser, argv):
    """(options, defaults for those that were not given) of a training stage. With --init the file
    decides what the encoder is."""
    args = parser.parse_args(argv)
    args.data = args.data or os.environ.get("DATA")
    defaults = dict(parser.paper if args.data else parser.small)
    if args.init != "none":
        if args.arch or args.patch_size:
            parser.error("--arch and --patch-size go with --init none: otherwise its file says "
                         "what the encoder is")
        del defaults["arch"], defaults["img_size"]
    return args, defaults


def complete(parser, args, defaults):
    """The options of a training stage, filled and checked."""
    fill(args, defaults)
    fill(args, dict(warmup_epochs=min(40, 0.15 * args.epochs)))
    check(parser, args, [args.init])
    return args


def fill(args, defaults):
    """Put `defaults` where no option was given."""
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)


def check(parser, args, encoders=()):
    """What no script can do ends here, before a model is built or a file written. encoders: the
    checkpoints that it starts from, or none."""
    for path in encoders:
        if path != "none" and not checkpoint.there(path):
            option = "--init FILE or none" if "init" in args else "--checkpoint FILE"
            first = f"run {MADE_BY[path]} first, or " if path in MADE_BY else ""
            parser.error(f"no checkpoint {path}: {first}give {option}")
    asked = {name: value for name, value in vars(args).items() if value}
    source, epochs = asked.get("data"), asked.get("epochs")
    if source and source not in data.DOWNLOADS and "{" not in source and not os.path.exists(source):
        parser.error(f"--data {source}: no such folder or list file")
    if asked.get("amp") == "fp16" and (args.device == "cpu" or not torch.cuda.is_available()):
        parser.error("--amp fp16 needs a GPU; on a CPU use bf16 or off")
    if epochs and asked.get("warmup_epochs", 0) > epochs:
        parser.error(f"--warmup-epochs {args.warmup_epochs:g} is more than --epochs {epochs}")
    for name in ("out", "results"):
        folder = asked.get(name) if isinstance(asked.get(name), str) else ""
        while folder and not os.path.lexists(folder):
            folder = os.path.dirname(folder)
        if folder and not os.path.isdir(folder):
            parser.error(f"--{name} {asked[name]}: cannot write there ({folder} is a file)")


def program(main, get_args):
    """Run a stage from the command line. What the user can mend ends in one line and the exit code
    that its exception carries; a signal that asked for a stop ends in 128 + its number."""
    code, said = 0, None
    data.show_all_names()
    try:
        main(get_args())
    except Stopped as stopped:
        print(f"stopped by {stopped.signal.name}; the same command goes on from here", flush=True)
        code = stopped.exit_code
    except KeyboardInterrupt:
        code, said = 128 + signal.SIGINT, "interrupted"
    except BrokenPipeError:                                             # `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 128 + signal.SIGPIPE
    except Exception as error:
        said = error
        own = hasattr(error, "exit_code")
        if not own and str(error).startswith("DataLoader worker (pid"):     # raised anywhere
            said = RunError(f"{error}: {data.FEWER_WORKERS}")
        elif isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            said = RunError(f"{error.filename or 'what it prints'}: {error.strerror}")
        elif not own:
            said = peers and peers.blame(error)
            if said is None:
                raise
        code = said.exit_code
    if said and (peers.speaks() if peers else os.environ.get("RANK", "0") == "0"):
        print(f"{os.path.basename(sys.argv[0])}: error: {' '.join(str(said).split())}",
              file=sys.stderr, flush=True)
    if peers:
        sys.stdout.flush()
        if code in (1, 2, 128 + signal.SIGPIPE):
            peers.leave()
            os._exit(code)                              # to leave the group would be to wait
        peers.part()
    sys.exit(code)


# ------------------------------------------------------------------------------- device, precision
class Env(NamedTuple):
    """Where a run takes place; dtype: of autocast, None for float32."""
    device: torch.device
    dtype: torch.dtype = None
    rank: int = 0
    processes: int = 1

    def autocast(self, function):
        """The function (or module) with its matrix products in self.dtype."""
        return torch.autocast(self.device.type, self.dtype, self.dtype is not None)(function)

    def share(self, batch_size):
        """This process's part of a global batch."""
        if batch_size % self.processes:
            raise UsageError(f"--batch-size {batch_size} is not divided by {self.processes} "
                             "processes")
        return batch_size // self.processes


def setup(args):
    """Env from --device, --amp, --deterministic and torchrun's environment. One process needs no
    process group, so that `python stage.py` and `torchrun stage.py` both work."""
    global peers
    deterministic = getattr(args, "deterministic", False)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")     # read as cuBLAS starts
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = deterministic, False
    rank, processes, local = (int(os.environ.get(name, default)) for name, default in (
        ("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    cuda = args.device != "cpu" and torch.cuda.is_available()
    if args.device == "cuda" and not cuda:
        raise UsageError("--device cuda: no CUDA device here")
    device = torch.device("cuda", local if processes > 1 else 0) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    else:
        with contextlib.suppress(OSError, AttributeError):              # another C library
            libc = ctypes.CDLL("libc.so.6")     # keep what a step frees: given back, it is zeroed
            libc.mallopt(-3, 1 << 30)                                   # M_MMAP_THRESHOLD
            libc.mallopt(-1, -1)                                        # M_TRIM_THRESHOLD
    if processes > 1 and not dist.is_initialized():
        peers = Peers("nccl" if cuda else "gloo", getattr(args, "timeout_minutes", 10.0))
    return Env(device, precision(getattr(args, "amp", "off"), device), rank, processes)


def precision(choice, device):
    """The autocast type for --amp, or None: bf16 where the hardware has it, fp16 on older GPUs."""
    if choice != "auto":
        return {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[choice]
    if device.type == "cuda":
        ampere = torch.cuda.get_device_capability(device)[0] >= 8
        return torch.bfloat16 if ampere else torch.float16
    return torch.bfloat16 if linux_says("cpuinfo", "(amx|avx512)_bf16") else None


def linux_says(name, pattern):
    """The first group of a pattern in /proc/NAME, or None."""
    with contextlib.suppress(OSError), open(f"/proc/{name}") as f:
        found = re.search(pattern, f.read())
        return found and found[1]


def grad_scaler(env):
    """Loss scaling for fp16. Otherwise the scale is a power of two, which is exact; what is used
    then is that a step with a non-finite gradient is skipped on the device."""
    exact = dict(init_scale=1.0, growth_interval=1 << 30)
    return torch.amp.GradScaler(env.device.type, **{} if env.dtype == torch.float16 else exact)


def distribute(net, env, bf16_gradients=False):
    """The network, in DistributedDataParallel if there are several processes."""
    if env.processes == 1:
        return net
    # BatchNorm's buffers are those of the global batch on every process already
    known = inspect.signature(DistributedDataParallel).parameters
    buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    model = DistributedDataParallel(net, gradient_as_bucket_view=True, **{buffers: False})
    if bf16_gradients:
        model.register_comm_hook(None, bf16_compress_hook)
    return model


def slices(model, n, size):
    """Slices of at most `size` of n images; processes exchange gradients in the last one alone."""
    for start in range(0, n, size):
        if isinstance(model, DistributedDataParallel):
            model.require_backward_grad_sync = start + size >= n        # what its no_sync() sets
        yield slice(start, start + size)


def micro_batch(asked, step, n, env, params=()):
    """Images whose activations are kept at once: as asked, else all n, or as many as fit.

    step(k): forward and backward of k images. From the bytes that autograd keeps for one image
    more, half of the memory that is free, and on a GPU room for AdamW's moments of `params`.
    """
    if asked:
        return min(asked, n)
    kept, totals = {}, {}

    def note(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    for k in (1, 3):
        kept.clear()
        with uncompiled(), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            step(k)
        totals[k] = sum(kept.values())
    if env.device.type == "cuda":
        torch.cuda.empty_cache()
        moments = sum(2 * p.numel() * p.element_size() for p in params if p.requires_grad)
        free = torch.cuda.mem_get_info(env.device)[0] - moments
    else:
        free = 1024 * int(linux_says("meminfo", r"MemAvailable: +(\d+)") or 4 << 20) / env.processes
    per_image = max((totals[3] - totals[1]) / 2, 1.0)
    most = min(gather_objects(max(min(int(0.5 * free / per_image), n), 1)))
    return math.ceil(n / math.ceil(n / most))                           # in equal parts


def compile_blocks(net, choice, device, dynamic=None):
    """torch.compile every block of a network: with --compile on, or auto on a GPU if it can.

    dynamic=False: a graph a shape, where shapes are few. Left to torch, the second shape that it
    meets (MAE's decoder, after its encoder) gets a graph for any size, whose kernels know less.
    """
    if choice == "off" or (choice == "auto" and device.type != "cuda"):
        return
    try:
        # graphs of a block: by role, gradient and shape; torch's 8 are too few
        torch._dynamo.config.cache_size_limit = 32                      # its name in torch 2.6
        torch.compile(torch.nn.functional.gelu)(torch.ones(2, device=device))
    except Exception as error:                                          # no Triton, no compiler
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        says = f"torch.compile does not work here ({reason})"
        if choice == "on":
            raise RunError(f"--compile on: {says}; go without: --compile off") from None
        if not peers or peers.speaks():
            print(f"warning: {says}: the run goes on without it", flush=True)
        return
    for module in net.modules():
        if isinstance(module, Block):
            module.compile(dynamic=dynamic)


def uncompiled():
    """A context in which compiled blocks run as they are written: for sizes that no step has."""
    loaded = "torch._dynamo" in sys.modules
    return torch.compiler.set_stance("force_eager") if loaded else contextlib.nullcontext()


def peak_memory(device):
    """Peak bytes: of the CUDA allocator, or of this process's resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# --------------------------------------------------------------------------------------- processes
GLANCE_SECONDS = 1.0                    # between looks at whether another process met a failure
SIGN_IN_SECONDS = 3 * GLANCE_SECONDS    # that a living process gets to say so then
peers = None                            # the Peers of this process; None where a run is one process


class Peers:
    """The processes of a run: they compare what they see, vote, and name the one that fails."""

    def __init__(self, backend, minutes):
        """Join the other processes, whom torchrun's environment names."""
        self.rank, self.n = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.seconds, self.questions = 60 * minutes, 0
        # torchrun's agent keeps its store from one attempt to the next
        attempt = f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        # NCCL's own watchdog ends a process without naming who is missing: it gets more time
        limit, patience = timedelta(minutes=minutes), 2 if backend == "nccl" else 1
        try:
            self.store = dist.PrefixStore(attempt, next(rendezvous("env://", timeout=limit))[0])
            dist.init_process_group(backend, store=dist.PrefixStore("default", self.store),
                                    rank=self.rank, world_size=self.n, timeout=limit * patience)
        except (RuntimeError, ValueError) as error:
            raise RunError(f"rank {self.rank}: the {self.n} processes did not meet within "
                           f"{minutes:g} minutes ({str(error).splitlines()[0]})") from None
        self.over = threading.Event()
        self.listener = threading.Thread(target=self.listen, daemon=True)
        self.listener.start()

    def ask(self, question, value):
        """What every process answers to the same question, by rank (JSON values). A RunError names
        those that do not answer."""
        self.questions += 1
        key, before = f"answers {self.questions}", f"answers {self.questions - 1}"
        self.store.append(key, json.dumps([self.rank, value]) + "\n")

        def answers():
            lines = self.store.get(key).decode().splitlines()
            return lines if len(lines) == self.n else None

        time.sleep(1e-4 * self.n)                           # so that most need ask once
        end = time.monotonic() + self.seconds
        while not (lines := self.until(answers, GLANCE_SECONDS)):
            if time.monotonic() > end or self.store.check(["failure"]):
                raise self.roll_call() or RunError("the processes lost each other while they "
                                                   f"compared {question}")
        if self.rank == 0:                                  # who answers has read those before
            self.store.delete_key(before)
        by_rank = dict(map(json.loads, lines))
        return [by_rank[rank] for rank in range(self.n)]

    def until(self, there, seconds):
        """The first true value of there() within so long, or None. Asks again and again: the
        store's own waiting writes lines to the screen when its time is over."""
        end, pause = time.monotonic() + seconds, 0.0005
        while not (value := there()):
            if time.monotonic() > end:
                return None
            time.sleep(pause)
            pause = min(2 * pause, 0.05)
        return value

    def listen(self):
        """Sign in when another process calls, even while stuck in a collective; then end."""
        with contextlib.suppress(RuntimeError):                         # the store went with rank 0
            while not self.store.check(["failure"]):
                if self.over.wait(GLANCE_SECONDS):
                    return
            self.store.set(f"alive/{self.rank}", "")
            time.sleep(4 * SIGN_IN_SECONDS)
            os._exit(1)

    def roll_call(self):
        """A RunError that names the processes that do not answer any more, or None if all do.

        One that died or was stopped does not sign in. One that hangs by itself is alive and does
        not wait for the others, as they do.
        """
        for key in ("failure", f"alive/{self.rank}", f"waiting/{self.rank}"):
            self.store.set(key, "")
        waiting = [f"waiting/{r}" for r in range(self.n)]
        self.until(lambda: self.store.check(waiting), SIGN_IN_SECONDS)
        for word in ("alive", "waiting"):
            lost = [r for r in range(self.n) if not self.store.check([f"{word}/{r}"])]
            if lost:
                return RunError(f"{ranks(lost)} of {self.n} died or hangs, the others went on "
                                "waiting for it. What was saved is intact; the same command goes "
                                "on from it")
        return None

    def blame(self, error):
        """After the error of a collective or of the store: the RunError that names who is missing,
        or None where it is another error."""
        said = str(error).lower()
        if not isinstance(error, RuntimeError) or not (
                isinstance(error, dist.DistError) or "gloo" in said or "nccl" in said):
            return None
        try:
            told = self.store.check(["errors"])                         # one has said what is wrong
            return RunError("another process has failed") if told else self.roll_call()
        except RuntimeError:
            return RunError("rank 0 died or hangs: the store in which the processes meet does not "
                            "answer")

    def part(self):
        """The run is done. A thread that asks the store while Python shuts down would abort it."""
        self.over.set()
        self.listener.join()
        dist.destroy_process_group()

    def leave(self):
        """Before this process ends with an error: rank 0, who may have the store, goes last."""
        with contextlib.suppress(RuntimeError):
            self.store.set(f"left/{self.rank}", "")
            if self.rank == 0:
                left = [f"left/{r}" for r in range(self.n)]
                self.until(lambda: self.store.check(left), SIGN_IN_SECONDS)

    def speaks(self):
        """Whether this process is to print what several may have to say: the first to come."""
        try:
            return self.store.add("errors", 1) == 1
        except RuntimeError:
            return True


def ranks(found):
    """rank 3, or ranks 1, 2."""
    return f"rank{'s' if len(found) > 1 else ''} {', '.join(map(str, found))}"


def same(what, value):
    """Every process must see the same value; a UsageError names those that do not."""
    answers = gather_objects(value)
    if len(set(answers)) > 1:
        found = "; ".join(f"{a} on {ranks([r for r, b in enumerate(answers) if a == b])}"
                          for a in dict.fromkeys(answers))
        raise UsageError(f"the processes see different {what}: {found}. Give all of them the same "
                         "files")


def gather_objects(value):
    """The value (JSON) of every process, by rank."""
    return peers.ask("what they found", value) if peers else [value]


def once_a_node(function, *args, **options):
    """What function(*args, **options) returns or raises, called by the first process of each
    machine alone: the others get it through memory. A disk that a million names are listed from,
    or gigabytes read, serves every machine once."""
    alone = peers is None or os.environ.get("LOCAL_WORLD_SIZE", "1") == "1"
    if alone or not hasattr(os, "memfd_create"):
        return function(*args, **options)
    local = int(os.environ["LOCAL_RANK"])
    place = None
    if local == 0:
        try:
            answer = function(*args, **options)
        except Exception as error:
            if not hasattr(error, "exit_code"):
                raise
            answer = error
        memory = os.memfd_create("once a node")             # gone with this process, come what may
        with open(memory, "wb", closefd=False) as f:
            pickle.dump(answer, f, pickle.HIGHEST_PROTOCOL)
        place = f"/proc/{os.getpid()}/fd/{memory}"
    places = gather_objects(place)
    if local > 0:
        with open(places[peers.rank - local], "rb") as f:
            answer = pickle.load(f)
    gather_objects("read")
    if local == 0:
        os.close(memory)
    if isinstance(answer, Exception):
        raise answer
    return answer


# ---------------------------------------------------------------------------------- what is written
def commit():
    """The commit of this code, with + if it was changed since; None where git does not know."""
    command = ["git", "describe", "--always", "--dirty=+", "--abbrev=12"]
    here = os.path.dirname(os.path.abspath(__file__))
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        head = subprocess.run(command, cwd=here, capture_output=True, text=True, timeout=10)
        return head.stdout.strip() or None


@contextlib.contextmanager
def writing(path):
    """What the system refuses within ends the run in a line."""
    try:
        yield
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror or error}") from None


@contextlib.contextmanager
def atomic(path):
    """A temporary name to write to, renamed to `path` at the end: always whole, old or new."""
    with writing(path), checkpoint.atomic(path) as temporary:
        yield temporary


def write_result(out, entry):
    """Print a result as one JSON line and append it to results.jsonl in the folder `out`, unless
    the same is there already, but for the time it took: a finished run was started again."""
    line, path = json.dumps(entry), os.path.join(out, "results.jsonl")
    print(line, flush=True)

    def essence(result):
        return {k: v for k, v in result.items() if k not in ("seconds", "commit")}

    with writing(path):
        os.makedirs(out, exist_ok=True)
        there = read_results(path) if os.path.exists(path) else []
        if essence(json.loads(line)) not in map(essence, there):
            append_line(path, line)


def append_line(path, line):
    """Append a line to a file whose last one a kill may have torn."""
    with open(path, "a+b") as f:
        torn = f.tell() and os.pread(f.fileno(), 1, f.tell() - 1) != b"\n"
        f.write(b"\n" * bool(torn) + line.encode() + b"\n")


def read_results(path):
    """The entries of a results.jsonl. A line that a kill has torn is passed over with a warning."""
    entries = []
    try:
        with open(path, encoding="utf-8", errors="replace") as f:
            lines = [line for line in f if line.strip()]
    except OSError as error:
        raise UsageError(f"{path}: cannot be read as results ({error.strerror})") from None
    for i, line in enumerate(lines, start=1):
        try:
            entries.append(json.loads(line))
        except ValueError:
            print(f"warning: {path}: line {i} is torn, passed over", file=sys.stderr, flush=True)
            continue
        if not isinstance(entries[-1], dict):
            raise UsageError(f"{path}: line {i} is not a result (one JSON object a line)")
    return entries


def write_csv(path, rows):
    """Rows of cells as a CSV, whole or not at all. A text that a spreadsheet would compute (it
    begins with = + - or @ and is no number) is quoted by an apostrophe; names of files keep their
    bytes."""
    def cell(value):
        formula = isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r")
        return f"'{value}" if formula and not re.fullmatch(r"[+-]?[\d.]+", value) else value

    with atomic(path) as temporary:
        with open(temporary, "w", newline="", encoding="utf-8", errors="surrogateescape") as f:
            csv.writer(f).writerows([cell(value) for value in row] for row in rows)


def write_per_class(out, name, confusion, classes):
    """From a confusion matrix (C, C), true classes as rows: per-class-NAME.csv, confusion-NAME.csv
    and, its rows as shares, confusion-NAME.png."""
    right, support, predicted = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
    scores = torch.stack([right / predicted, right / support, 2 * right / (support + predicted)], 1)
    rows = [[each, n, *("" if math.isnan(v) else f"{v:.4f}" for v in values)]
            for each, n, values in zip(classes, support.tolist(), scores.tolist())]
    table = [[each, *row] for each, row in zip(classes, confusion.tolist())]
    path = os.path.join(out, f"confusion-{name}")
    write_csv(os.path.join(out, f"per-class-{name}.csv"),
              [["class", "support", "precision", "recall", "f1"], *rows])
    write_csv(f"{path}.csv", [["true class / predicted", *classes], *table])
    cell = torch.ones(2 * [math.ceil(480 / len(classes))], dtype=torch.uint8)           # pixels
    shades = (255 * (1 - confusion / support.clamp_min(1)[:, None])).round().to(torch.uint8)
    with atomic(f"{path}.png") as temporary:
        Image.fromarray(torch.kron(shades, cell).numpy()).save(temporary, "png")
    print(f"wrote {path}.csv, {path}.png and per-class-{name}.csv", flush=True)


# --------------------------------------------------------------------------------- images, features
def training_images(args, config, source, env):
    """The dataset of a training stage. Statistics and range of the channels are those that the file
    of --init was trained with, unless others are asked for."""
    known = source["meta"] if source else {}
    dataset = once_a_node(data.load, args.data, True, config["in_chans"], args.stats or "imagenet",
                          args.max_bad, args.range or known.get("range"), args.labels_file)
    if known.get("mean") and not args.stats:
        if len(known["mean"]) == dataset.in_chans:
            dataset.mean, dataset.std = tuple(known["mean"]), tuple(known["std"])
        elif env.rank == 0:
            print(f"the mean and deviation of --init are of {len(known['mean'])} channels, not "
                  f"{dataset.in_chans}: ImageNet's are taken; --stats data measures", flush=True)
    same("numbers of images", len(dataset))
    if args.batch_size > len(dataset):
        raise UsageError(f"--batch-size {args.batch_size} is more than the {len(dataset)} images "
                         f"of {dataset.name}")
    if args.knn_every and (dataset.labels is None or len(dataset) < 10):
        why = "no class folders" if dataset.labels is None else "fewer than 10 images"
        raise UsageError(f"--knn-every needs labels, {dataset.name} has {why}")
    return dataset.hold(env.device)


def say_what_was_seen(args, meta):
    """That the images which --val-share holds out to test on were trained on, without labels."""
    known = meta.get("data")
    if args.val_share and isinstance(known, str) and os.path.realpath(known) == os.path.realpath(
            args.data or ""):
        data.note(f"--val-share: the encoder has seen all images of {known}, those to test on too, "
                  "without labels; a table with a column split, as --data, keeps them apart")


def about(args, system, dataset, source):
    """What a checkpoint says of itself besides its weights."""
    return dict(system=system, data=dataset.name, mean=list(dataset.mean), std=list(dataset.std),
                range=dataset.range, bits=dataset.bits, epochs=args.epochs, seed=args.seed,
                classes=dataset.classes, init=source and source["digest"], commit=commit())


def own_rows(n, env):
    """The indices, of n, that are this process's share."""
    share = math.ceil(n / env.processes)
    return torch.arange(n)[env.rank * share:(env.rank + 1) * share]


@torch.no_grad()
def extract(encoder, dataset, env, batch_size=256, workers=0, mean=None, std=None, function=None,
            what=None, max_bad=0.01, shared=False):
    """(features (N, D) float32 of every image in order on the device, readable (N,) bool).

    Features: the class token of the centre crop, or function(encoder, images). Rows of images that
    cannot be read are zeros. Several processes share the work and all get the whole, or with
    `shared` the features of their `own_rows` alone. The encoder is put into evaluation mode.
    """
    mine = own_rows(len(dataset), env)
    share = math.ceil(len(dataset) / env.processes)         # equal ones, filled with the last image
    filled = torch.cat([mine, torch.full((share - len(mine),), len(dataset) - 1)])
    part = dataset if env.processes == 1 else dataset.select(filled)
    loader = data.Loader(part, [augment.TEST_VIEW], encoder.config["img_size"], batch_size, 0,
                         workers, env.device, shuffle=False, mean=mean, std=std, max_bad=max_bad)
    compute = env.autocast(function or (lambda net, images: net.forward_features(images)))
    progress = Progress(what or f"features of {dataset.name}", len(part), quiet=env.rank > 0)
    features, readable, training = [], [], encoder.training
    encoder.eval()
    for batch in loader.epoch(0):
        x = compute(encoder, batch.view(0)).float()
        features.append(x * batch.readable.to(x.device).reshape(-1, *[1] * (x.ndim - 1)))
        readable.append(batch.readable)
        progress.step(len(batch))
    encoder.train(training)
    features, readable = torch.cat(features), torch.cat(readable)
    if env.processes > 1:
        features = features[:len(mine)] if shared else gather(features)[:len(dataset)]
        readable = gather(readable.to(env.device))[:len(dataset)].cpu()
    return features, readable


def online_knn(encoder, dataset, env, workers):
    """k-NN accuracy (percent) while training: a tenth of at most 10,000 training images against the
    others. Their labels are held out of pre-training; test images are not looked at."""
    chosen = dataset.select(augment.shuffled(len(dataset), 2, augment.SUBSET)[:10000])
    with uncompiled():
        features, readable = extract(encoder, chosen, env, workers=workers, max_bad=1.0)
    labels, readable = chosen.labels.to(env.device), readable.to(env.device)
    query = torch.arange(len(chosen), device=env.device) < len(chosen) // 10
    asked, bank = query & readable, ~query & readable
    scores = knn_scores(features[asked], features[bank], labels[bank], len(chosen.classes))
    return (scores.argmax(1) == labels[asked]).float().mean().item() * 100


# --------------------------------------------------------------------------------------- the job
class Job:
    """The folder of a run: lock, signals, log.jsonl, args.json, last.pt, previous.pt, encoder.pt.

    meta: what encoder.pt says of itself; source: what the run started from, of
    checkpoint.read_encoder; encoder_file: whether encoder.pt is written; chance: the loss that
    guessing has, which should be left behind after `warmup` steps.
    """

    VOTE_SECONDS = 1.0                                      # between votes of several processes
    PATIENCE = 3                                            # lines of the log that show a collapse
    MOST_SKIPPED = 5                                        # steps that were not finite
    NEEDED = {"model", "optimizer", "scaler", "step", "settings", "skipped"}
    SIGNALS = signal.SIGTERM, signal.SIGINT, signal.SIGUSR1

    def __init__(self, args, env, net, optimizer, scaler, loader, meta, source=None, warmup=0,
                 chance=None, encoder_file=True):
        self.args, self.env, self.net, self.loader = args, env, net, loader
        self.optimizer, self.scaler, self.meta, self.source = optimizer, scaler, meta, source
        self.warmup, self.chance, self.encoder_file = warmup, chance, encoder_file
        self.out, self.images = args.out, loader.batch_size * env.processes
        self.epoch_steps = len(loader)
        self.total = args.epochs * len(loader) if "epochs" in args else args.iterations
        self.settings = dict(network=type(net).__name__) | {
            k: v for k, v in vars(args).items() if k not in RUNTIME} | dict(
            source=source and source["digest"], files=loader.dataset.digest,
            config=getattr(net, "base_encoder", net).config)
        if not encoder_file:                                                # it learns from them
            self.settings["labels_digest"] = loader.dataset.label_digest
        self.window, self.skipped, self.collapsed, self.warned = [], 0, 0, set()
        self.entry, self.lock, self.board, self.signal, self.copies = None, None, None, 0, ()
        self.writer, self.under_way = ThreadPoolExecutor(1), None
        self.started, self.before = time.perf_counter(), 0.0    # seconds before it was resumed
        # GradScaler tells a fused optimizer on the device whether to skip its step
        self.overflow = torch.zeros((), device=env.device)
        optimizer.register_step_pre_hook(lambda o, *_: setattr(self, "overflow", o.found_inf))

    def path(self, name):
        return os.path.join(self.out, name)

    def say(self, line, once=None):
        """Print a line from one process; those of the same kind `once` in a run."""
        if self.env.rank == 0 and once not in self.warned:
            print(line, flush=True)
            self.warned.update({once} - {None})

    def report(self, groups, scale, at_once, taken=(), title=""):
        """What the run will do: what was loaded, images, batch, steps, precision, rates."""
        env, dataset = self.env, self.loader.dataset
        mean, std = (", ".join(f"{v:.3f}" for v in vs) for vs in (dataset.mean, dataset.std))
        lines = checkpoint.report(self.source, taken) if self.source else []
        lines += [f"{title}{len(dataset)} images of {dataset.name}, {dataset.in_chans} channels of "
                  f"mean {mean} and deviation {std}",
                  f"global batch {self.images} = {self.loader.batch_size} x {env.processes} "
                  f"processes, {at_once} at once; {self.total} steps, {self.warmup} of warm-up; "
                  f"{env.device}, {env.dtype or torch.float32}", *group_table(groups, scale)]
        if self.chance is not None:
            lines.append(f"chance level of the loss: {self.chance:.3f}")
        self.say("\n".join(lines))

    # -- the loop
    def steps(self):
        """Yields (step, batch) until the run is done; goes on from last.pt. After each step: the
        log, the checkpoint when it is time, and the end when a signal has asked for it."""
        self.enter()
        try:
            step = self.vote_at = self.last_vote = self.resume()
            self.describe(step)
            while step < self.total:
                epoch, start = divmod(step, self.epoch_steps)
                for batch in self.loader.epoch(epoch, start=start):
                    self.step = step
                    if self.board is not None and step == 0:
                        self.show(batch)
                    yield step, batch
                    step += 1
                    self.after(step)
            self.written()
            number = torch.tensor(self.signal, device=self.env.device)
            if self.env.processes > 1:
                dist.all_reduce(number, dist.ReduceOp.MAX)
            if number:                                      # one that came since the last vote
                raise Stopped(number.item())
        finally:
            self.leave()

    def show(self, batch):
        """The views of the first images of a batch as tensorboard's picture, a row a view."""
        views = torch.stack([batch.view(k)[:8] for k in range(len(self.loader.views))])
        views = (views * self.loader.std + self.loader.mean).clamp(0, 1)
        views = views.expand(-1, -1, max(views.shape[2], 3), -1, -1)[:, :, :3]
        rows = views.permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2)    # (3, views * H, n * W)
        self.board.add_image("views", rows, 0)

    def ends_epoch(self, every):
        """Whether the step under way ends an epoch that is a multiple of `every` (0: never)."""
        return bool(every) and (self.step + 1) % (every * self.epoch_steps) == 0

    def record(self, loss, batch, rates, **log):
        """Note a step: its loss, its rates, and what else the log shows, read when it is written.
        The tensors `features`, `q` and `k` become feature_stats there."""
        self.window.append((self.step + 1, loss.detach(), batch.ids, self.overflow))
        self.rates, self.noted = rates, {k: torch.as_tensor(v).detach() for k, v in log.items()}

    def after(self, step):
        if self.under_way is not None and self.under_way.done():
            self.written()                                  # what went wrong is told at once
        stop, due = self.vote(step)
        keep = self.ends_epoch(getattr(self.args, "every_epochs", 0))
        last = step == self.total
        if stop or due or step % self.epoch_steps == 0 or step % self.args.log_every == 0:
            self.log(step)
        if stop or due or last or keep:
            self.save(step, keep)
        if stop or last:
            self.written()
        if stop:
            raise Stopped(stop)

    def seconds(self):
        """Seconds that the run has taken, those before it was resumed counted in."""
        return self.before + time.perf_counter() - self.started

    def result(self):
        """The last entry of the log, with the file to go on with under "path"."""
        path = self.path("encoder.pt" if self.encoder_file else "last.pt")
        self.say(f"wrote {path}")
        return (self.entry or {}) | dict(path=path)

    # -- lock and signals
    def enter(self):
        if self.env.rank == 0:
            try:
                os.makedirs(self.out, exist_ok=True)
                self.lock = open(self.path("lock"), "a+")
                # not flock's lock: processes forked to read images outlive a killed run by seconds
                fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self.lock.truncate(0)
                self.lock.write(f"process {os.getpid()} on {socket.gethostname()}")
                self.lock.flush()
            except BlockingIOError:
                self.lock.seek(0)
                raise UsageError(f"--out {self.out} is in use by {self.lock.read()}") from None
            except OSError as error:
                raise UsageError(f"--out {self.out}: cannot write there "
                                 f"({error.strerror})") from None
        main = threading.current_thread() is threading.main_thread()    # no other gets signals
        self.handlers = {s: signal.signal(s, self.on_signal) for s in self.SIGNALS if main}
        self.marked = self.saved = self.voted = time.perf_counter()

    def leave(self):
        for s, handler in self.handlers.items():
            signal.signal(s, handler)
        self.writer.shutdown()
        for opened in (self.board, self.lock):
            if opened is not None:
                opened.close()

    def on_signal(self, number, frame):
        if self.signal == number == signal.SIGINT:
            os._exit(128 + number)                          # a second Ctrl-C: at once
        self.signal = number

    def vote(self, step):
        """(number of a signal that arrived on any process, or 0; whether --save-minutes are over).

        One process looks at each step. Several vote about once a second, and agree on when.
        """
        now = time.perf_counter()
        due = now - self.saved > 60 * self.args.save_minutes
        if not peers:
            return self.signal, due
        if step < self.vote_at and step % self.args.log_every:
            return 0, False
        pace = (now - self.voted) / (step - self.last_vote)         # seconds a step
        signals, dues, paces = zip(*peers.ask("signals", [self.signal, due, pace]))
        self.voted, self.last_vote = now, step
        self.vote_at = step + max(1, int(self.VOTE_SECONDS / max(*paces, 1e-6)))
        return max(signals), dues[0]

    # -- checkpoints
    def save(self, step, keep=False):
        """Write last.pt; the one before stays as previous.pt, and is only replaced once the new one
        was read back. The state is copied here and written by a thread, while training goes on.

        keep: write the weights as epochNNNN.pt too. Weights that are not finite are never written:
        no step brings them back.
        """
        self.written()
        weights = self.net.state_dict()
        broken = [name for name, tensor in weights.items()
                  if not torch.stack(tensor.aminmax()).isfinite().all()]
        if broken:
            raise RunError(f"{broken[0]} is not finite at step {step}; {self.way_out()}")
        self.saved = time.perf_counter()
        if self.env.rank:
            return
        encoder, epoch = getattr(self.net, "base_encoder", self.net), step // self.epoch_steps
        # what rebuilds the model, and what a run is resumed from
        kept = dict(model=weights, config=encoder.config, meta=self.meta, settings=self.settings,
                    step=step)
        # ahead of last.pt: a kill between them leaves them newer, and they are written again
        files = {}
        if self.encoder_file:
            files["encoder.pt"] = checkpoint.encoder_file(self.net, self.meta | dict(step=step))
        if keep:
            files[f"epoch{epoch:04}.pt"] = kept | dict(epoch=epoch)
        files["fresh.pt"] = kept | dict(
            optimizer=self.optimizer.state_dict(), scaler=self.scaler.state_dict(),
            skipped=self.skipped, seconds=self.seconds(), bad=dict(self.loader.dataset.bad))
        self.under_way = self.writer.submit(self.write, self.copied(files))

    def copied(self, content):
        """The content with its tensors copied to the host, into the memory of the last copy: new
        memory costs five times the copying."""
        before, self.copies = iter(self.copies), []

        def copy(tensor):
            place = next(before, None)
            if place is None or (place.shape, place.dtype) != (tensor.shape, tensor.dtype):
                place = torch.empty_like(tensor, device="cpu")
            self.copies.append(place)
            return place.copy_(tensor.detach())

        return tree_map_only(torch.Tensor, copy, content)

    def write(self, files):
        fresh, last, previous = map(self.path, ("fresh.pt", "last.pt", "previous.pt"))
        for name, content in files.items():
            checkpoint.save(content, self.path(name))
        checkpoint.read(fresh)
        with writing(last):
            if os.path.exists(last):
                os.replace(last, previous)
            os.replace(fresh, last)

    def written(self):
        """Wait until the last checkpoint is on the disk; what went wrong with it is raised here."""
        save, self.under_way = self.under_way, None
        if save is not None:
            save.result()

    def find(self):
        """(path, content) of last.pt, or of previous.pt if that is damaged, or of none."""
        for name in ("last.pt", "previous.pt") if self.args.resume == "auto" else ():
            path = self.path(name)
            if os.path.exists(path):
                try:
                    state = checkpoint.read(path)
                    if not (isinstance(state, dict) and self.NEEDED <= set(state)
                            and isinstance(state["settings"], dict) and type(state["step"]) is int):
                        raise UsageError(f"{path}: not a checkpoint to resume from")
                    return path, state
                except ValueError as error:
                    self.say(f"warning: {error}; trying the checkpoint before it")
        return None, dict(step=0)

    def resume(self):
        """Put back what last.pt holds; returns the step. It must come from the same settings."""
        path, state = once_a_node(self.find)
        step = state["step"]
        if path:
            self.refuse_changes(path, state["settings"])
            written, here = state.get("meta", {}).get("commit"), self.meta.get("commit")
            if written != here:
                self.say(f"note: commit {written} of this code wrote it, now it is {here}")
            self.say(f"resumed {path} at step {step} of {self.total}")
        same("steps to go on from in --out", step)
        if self.args.resume == "never" and self.env.rank == 0:
            for old in os.listdir(self.out):                # not of what is logged from now on
                own = r"(last|previous|encoder|classifier|segmenter|epoch\d+)\.pt"
                begun_with = self.source and os.path.realpath(self.source["path"])
                if re.fullmatch(own, old) and os.path.realpath(self.path(old)) != begun_with:
                    os.remove(self.path(old))
        self.cut_log(step)
        if path:
            try:
                if not 0 <= step <= self.total:
                    raise ValueError(f"step {step}")
                checkpoint.check_weights({k: v for k, v in state["model"].items()
                                          if v.is_floating_point()})
                self.net.load_state_dict(state["model"])
                built = self.group_rates()
                self.optimizer.load_state_dict(state["optimizer"])
                if built != self.group_rates():
                    raise ValueError("the rates or decays of its groups are not those of this code")
                self.scaler.load_state_dict(state["scaler"])
                self.loader.dataset.bad |= state.get("bad", {})
                self.skipped, self.before = int(state["skipped"]), float(state.get("seconds", 0.0))
            except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
                why = str(error).splitlines()[0]
                raise UsageError(f"{path} is not of this run ({why}): use another --out, or "
                                 "--resume never to start over") from None
        return step

    def group_rates(self):
        return [(g.get("base_lr"), g["weight_decay"]) for g in self.optimizer.param_groups]

    def refuse_changes(self, path, settings):
        for k, now in self.settings.items():
            if settings.get(k, now) == now or (k, settings[k]) == ("labels_digest", None):
                continue                                    # segmenters were not looked at before
            told = f"{path} was written with {k} {settings[k]}, now {k} is {now}"
            if k in PLACES and settings[k] and now and os.path.exists(now) and all(
                    settings.get(each) == self.settings[each] for each in ("files", "source")):
                self.say(f"note: {told}; the names of the images and the weights that it began "
                         "with are the same")
                continue
            if k != "epochs" or not self.encoder_file:
                raise UsageError(f"{told}: use another --out, or --resume never to start over")
            raise UsageError(f"{told}: its rates followed the other schedule. Go on from its "
                             f"weights with python {os.path.basename(sys.argv[0])} --init "
                             f"{self.out} --lr {shown(self.args.lr)} --out "
                             f"{self.out.rstrip('/')}-longer, or start over with --resume never")

    def describe(self, step):
        """args.json: what was asked, what was filled in, which code, versions and hardware."""
        env = self.env
        if env.rank:
            return
        gpu = torch.cuda.get_device_name(env.device) if env.device.type == "cuda" else None
        about = dict(command=sys.argv, options=vars(self.args), commit=commit(),
                     torch=torch.__version__, python=platform.python_version(), gpu=gpu,
                     machine=platform.platform(), cpus=os.cpu_count(), processes=env.processes)
        with atomic(self.path("args.json")) as name, open(name, "w") as f:
            json.dump(about, f, indent=1, default=str)
        if getattr(self.args, "tensorboard", False):
            try:
                from torch.utils.tensorboard import SummaryWriter
                self.board = SummaryWriter(self.out, purge_step=step + 1)
            except ImportError:
                self.say("warning: --tensorboard: pip install tensorboard first; log.jsonl has "
                         "the same")

    # -- log
    def cut_log(self, step):
        """Drop what log.jsonl says of steps after `step`, which are run again, and a torn end."""
        path = self.path("log.jsonl")
        if self.env.rank or not os.path.exists(path):
            return
        with atomic(path) as name, open(path, errors="replace") as f, open(name, "w") as new:
            for line in f:
                with contextlib.suppress(ValueError, KeyError, TypeError):      # half a line
                    entry = json.loads(line)
                    if entry["step"] <= step and line.endswith("\n"):
                        self.entry = entry
                        new.write(line)

    def log(self, step):
        """Write a line of log.jsonl and the progress line: means since the last, over processes."""
        env = self.env
        losses = torch.stack([loss.float() for _, loss, *_ in self.window]).to(env.device)
        if env.processes > 1:
            dist.all_reduce(losses)
            losses /= env.processes
        self.check_finite(losses)
        loss, more = losses[losses.isfinite()].mean().item(), dict(self.noted)
        if env.dtype == torch.float16:
            more["scale"] = self.check_scale()
        features, q, k = (more.pop(name, None) for name in ("features", "q", "k"))
        if env.rank == 0 and features is not None:          # an eigendecomposition: once is enough
            more = feature_stats(features, q, k, env.rank) | more
        more = {k: float(v) for k, v in more.items()}
        self.check_collapse(step, loss, more)
        now = time.perf_counter()                           # the device has been waited for
        took, epoch = now - self.marked, step / self.epoch_steps
        pace = took / len(self.window)
        rate, wait = self.images / pace, min(self.loader.waited / took, 1.0)
        entry = dict(step=step, epoch=round(epoch, 4), loss=loss, lr=self.rates,
                     images_per_second=round(rate, 1), seconds=round(took, 3),
                     data_wait=round(wait, 4), **more)
        # JSON has no word for what is not a number
        self.entry = {k: None if isinstance(v, float) and not math.isfinite(v) else v
                      for k, v in entry.items()}
        self.marked, self.loader.waited, self.window = now, 0.0, []
        if env.rank:
            return
        path = self.path("log.jsonl")
        with writing(path), open(path, "a") as f:
            f.write(json.dumps(self.entry) + "\n")
        if self.board is not None:
            lrs = {f"lr/{i}": lr for i, lr in enumerate(self.rates, start=1)}
            shown = dict(loss=loss, images_per_second=rate, data_wait=wait) | more | lrs
            for k, v in shown.items():
                self.board.add_scalar(k, v, step)
        extra = "".join(f" {k} {v:.3g}" for k, v in more.items())
        lrs = ",".join(f"{lr:.2g}" for lr in self.rates)
        peak, left = peak_memory(env.device) / 2 ** 30, duration((self.total - step) * pace)
        print(f"epoch {epoch:.2f} step {step}/{self.total} loss {loss:.4f} lr {lrs}{extra} "
              f"{rate:.0f} images/s wait {100 * wait:.0f}% peak {peak:.1f} GiB left {left}",
              flush=True)

    def check_finite(self, losses):
        """Stop when more than a few losses or gradients since the start were not finite (their
        steps were skipped). losses: means over all processes, so that all of them stop together."""
        overflows = torch.stack([o.to(self.env.device) for *_, o in self.window]).tolist()
        for (step, own, ids, _), loss, overflow in zip(self.window, losses.tolist(), overflows):
            good = math.isfinite(loss)
            # with fp16, finding the scale of the loss costs a step now and then
            if good and (not overflow or self.env.dtype == torch.float16):
                continue
            self.skipped += 1
            if good or not math.isfinite(own):
                what = "gradient is not finite" if good else f"loss is {own.item()}"
                names = ", ".join(self.loader.dataset.file(i) for i in ids.tolist()[:8])
                print(f"warning: rank {self.env.rank}: {what} at step {step}, step skipped; "
                      f"images {names}{', ...' if len(ids) > 8 else ''}", flush=True)
            if self.skipped > self.MOST_SKIPPED:
                raise RunError(f"loss or gradient was not finite {self.skipped} times, last at "
                               f"step {step}; {self.way_out()}")

    def check_scale(self):
        """fp16 works at a loss scale of some thousands. One that falls and falls takes no step."""
        scale = self.scaler.get_scale()
        if scale < 2 ** -16:
            raise RunError(f"the loss scale of fp16 has collapsed to {scale:.2g}, no step is "
                           f"taken; {self.way_out()}")
        if scale < 1:
            self.say("warning: the loss scale of fp16 has fallen below 1: it is "
                     f"{scale:.2g}, gradients overflow again and again. Try --amp bf16 or off, or "
                     "a lower --lr", once="scale")
        return scale

    def check_collapse(self, step, loss, more):
        """Say once when features have collapsed, or the loss stays what it is by chance."""
        signs = []
        if self.chance and more.get("contrastive", loss) >= 0.99 * self.chance:
            signs.append(f"the loss is at its chance level, {self.chance:.3f}")
        if more.get("rank", math.inf) < 1.5:
            signs.append(f"the effective rank of the features is {more['rank']:.2f}")
        if more.get("std", math.inf) < 1e-3:
            signs.append(f"the spread of the embeddings is {more['std']:.1e}")
        self.collapsed = self.collapsed + 1 if signs and step > self.warmup else 0
        if self.collapsed == self.PATIENCE:
            self.say(f"warning: the features may have collapsed: {' and '.join(signs)} at step "
                     f"{step}. Try a lower --lr, a longer --warmup-epochs or a larger "
                     "--batch-size, and see that the images differ", once="collapse")

    def way_out(self):
        """What to do when a run has gone wrong."""
        with contextlib.suppress(RunError):
            self.written()                                  # it may be the first checkpoint
        last = self.path("last.pt")
        kept = f"the last good checkpoint is {last}" if os.path.exists(last) else "nothing is saved"
        return f"{kept}. Try a lower --lr, a longer warm-up or --amp off"
