"""Train every system of the paper, evaluate each by every protocol and fill the paper's tables for a data set.

    python reproduce.py --preset demo                       # embedded pictures, two CPU cores
    python reproduce.py --preset cifar10-small --data CIFAR # real pictures, cut to what two CPU cores carry
    python reproduce.py --preset cifar10 --data CIFAR       # ViT-Tiny, patch 4, 32x32, hours on one GPU
    python reproduce.py --preset imagenet --data IMAGENET --dry-run             # the paper's; prints what it takes
    python reproduce.py --preset demo --only table1,figure4                     # a part of it

Everything is done by the stage scripts' own main(). A run that is killed goes on where it stopped, what is done is
skipped; several of these commands may work in one --out at a time if their --seeds differ. Writes results.jsonl and
results.md into --out.
"""
import copy
import itertools
import json
import os
import re
import shlex
import statistics
import time
from contextlib import contextmanager

import data
import evaluate
import finetune
import graft_train
import mae_pretrain
import run
from data import UsageError
from model import ARCHS
from run import numbers

# What a preset decides: options of every training run, epochs, rates. The rest follows from the paper's table.
# rates: of grafting's three stages; grid: the rates tried for each stage (Figure 4); schedules: other numbers of stages
# and boundaries; splits: (MAE epochs, grafting epochs) that cost about the same; mae, contrastive: options of either
# kind of run; tuning: epochs of the short runs that choose, and the rates and smallest crops that are tried one at a time
DECADES = ("1.5e-6", "1.5e-5", "1.5e-4")
PRESETS = {
    "demo": dict(
        data=None, depth=6, common=["--log-every", "32"], mae_epochs=16, cl_epochs=5, short_epochs=3, grid_epochs=1,
        mae_lr="3e-3", cl_lr="1.5e-3", rates=("5e-4", "5e-4", "1.5e-3"),
        grid=(("1.5e-4", "5e-4", "1.5e-3"), ("5e-4",), ("1.5e-4", "5e-4", "1.5e-3")), hidden=["--hidden-dim", "512"],
        vicreg=["--hidden-dim", "512", "--lr", "1e-3"], arch=["--arch", "vit_mini"], size=[], fine=["--epochs", "3"],
        anchor="1e-5", few=("3 per class", "10%"), probes=((3, 6), (0, 1)), partial=(0, 2, 4),
        linear=["--cache-features"]),
    "cifar10-small": dict(
        data="cifar10", depth=6, common=["--log-every", "39", "--workers", "0"], mae=["--crop-min", "0.2"],
        contrastive=["--crop-min", "0.2"],
        batch=["--batch-size", "128"], mae_epochs=16, cl_epochs=5, short_epochs=2, grid_epochs=1, mae_lr="1.5e-3",
        cl_lr="5e-4", rates=("1.5e-4", "5e-4", "1.5e-3"),
        grid=(("1.5e-4",), ("1.5e-4", "5e-4"), ("1.5e-4", "5e-4", "1.5e-3")), hidden=["--hidden-dim", "512"],
        vicreg=["--hidden-dim", "512", "--lr", "1e-3"], arch=["--arch", "vit_mini", "--patch-size", "4"],
        size=["--img-size", "32"], anchor="1e-5", few=("1%", "10%"), probes=((3, 6), (0, 1)), partial=(0, 2, 4),
        linear=["--cache-features"],
        fine=["--epochs", "2", "--batch-size", "64", "--lr", "4e-3", "--crop-min", "0.4", "--rand-augment", "0",
              "--mixup", "0", "--cutmix", "0", "--erasing", "0"],
        projector=["--epochs", "10", "--batch-size", "64", "--lr", "4e-3", "--crop-min", "0.4", "--rand-augment", "0",
                   "--mixup", "0", "--cutmix", "0", "--erasing", "0"],
        tuning={"epochs": (8, 2), "MAE": (("5e-4", "1.5e-3", "4.5e-3"), ("0.2", "0.5")),
                "MoCo v3": (("1.5e-4", "5e-4", "1.5e-3", "4.5e-3"), ("0.08", "0.2", "0.4"))},
        main=("MAE", "MoCo v3", "MTL", "Layer grafted", "MAE, equal seconds", "MoCo v3, equal seconds")),
    "cifar10": dict(
        data="cifar10", depth=12, common=[], mae=["--crop-min", "0.2"], contrastive=["--crop-min", "0.2"],
        mae_epochs=200, cl_epochs=60, short_epochs=30, grid_epochs=15, mae_lr="1.5e-4", cl_lr="1.5e-4",
        rates=("1.5e-5", "1.5e-5", "1.5e-4"), grid=(DECADES, ("1.5e-5",), DECADES), hidden=["--hidden-dim", "2048"],
        vicreg=["--hidden-dim", "2048", "--lr", "1.5e-4"], arch=["--arch", "vit_tiny", "--patch-size", "4"],
        size=["--img-size", "32"], fine=["--epochs", "50", "--crop-min", "0.2"], projector=["--crop-min", "0.2"],
        anchor="1e-5", few=("1%", "10%"), probes=((6, 9, 12), (0, 1, 2, 4)), partial=(0, 2, 4, 6, 8, 10, 12),
        linear=["--cache-features"], batch=["--batch-size", "1024"],
        tuning={"epochs": (50, 15), "MAE": (("1.5e-4", "5e-4", "1.5e-3"), ("0.2", "0.5")),
                "MoCo v3": (("1.5e-4", "5e-4", "1.5e-3"), ("0.08", "0.2", "0.4"))},
        # one boundary after block 4, 6, 8 or 10; two, three, four and six stages that rise by equal factors
        schedules=(",".join(["1.5e-5"] * 4 + ["1.5e-4"] * 8), "1.5e-5,1.5e-4", ",".join(["1.5e-5"] * 10 + ["1.5e-4"] * 2),
                   "1.5e-5,4.7e-5,1.5e-4", "1.5e-5,3.2e-5,7e-5,1.5e-4", "1.5e-5,2.4e-5,3.8e-5,6e-5,9.5e-5,1.5e-4"),
        splits=((50, 85), (400, 25))),
    "imagenet": dict(
        data=None, depth=12, common=[], mae_epochs=1600, cl_epochs=300, short_epochs=100, grid_epochs=100,
        mae_lr="1.5e-4", cl_lr="1.5e-4", rates=("1.5e-5", "1.5e-5", "1.5e-4"), grid=(DECADES,) * 3, hidden=[],
        vicreg=["--lr", "1.5e-4"],
        arch=["--arch", "vit_base"], size=[], fine=[], anchor="1e-5", few=("1%", "10%"),
        probes=((6, 9, 12), (0, 1, 2, 4)), partial=(0, 2, 4, 6, 8, 10, 12), linear=[]),
}

TOTAL = "MoCo v3, epochs of MAE + grafting"
# trained for as many seconds as MAE and grafting took together: what it is a longer run of
EQUAL = {"MAE, equal seconds": "MAE", "MoCo v3, equal seconds": "MoCo v3"}
EVERY = ("MAE", "MoCo v3", "MTL", "CL -> MIM grafting", "MIM -> CL grafting", "VICReg", "Layer grafted VICReg",
         "Layer grafted", *EQUAL)
# table: (rows, columns); "%" columns are filled in with the preset's shares of labels. A row that ends in a blank
# stands for every system whose name begins so.
TABLES = {
    "table1": (("MAE", "MoCo v3", "MTL", "CL -> MIM grafting", "MIM -> CL grafting"), ("linear", "few", "fine-tune")),
    "table2": (("MAE", "MoCo v3", TOTAL, "Layer grafted"), ("linear", "few", "projector", "k-NN")),
    "table3": (("MAE", "MoCo v3", "Layer grafted"), ("fine-tune",)),
    "table4": (("VICReg", "Layer grafted VICReg"), ("linear", "fine-tune")),
    "table5": (("MAE", "MoCo v3"), ("probe",)),
    "table7": (("Layer grafted", "Layer grafted, anchored"), ("linear", "few", "projector", "fine-tune")),
    "figure4": (("grid ",), ("linear",)),
    "figure5": (("MAE", "Layer grafted"), ("partial",)),
    "main": (EVERY, ("linear", "k-NN", "few", "projector", "fine-tune")),
    "labels": (EVERY, ("linear", "k-NN", "few", "projector")),
    "tuning": (("tune ", "grid "), ("linear",)),
    "schedules": (("rates ",), ("linear", "few")),
    "splits": (("split ",), ("linear", "few")),
}
PAPERS = [name for name in TABLES if name.startswith(("table", "figure"))]
TITLES = {
    "table1": "Table 1: combining the losses, and the order of grafting", "table2": "Table 2: label efficiency",
    "table3": "Table 3: fine-tuning", "table4": "Table 4: VICReg as the contrastive end",
    "table5": "Table 5: new blocks on frozen features", "table7": "Table 7: keeping lower layers near MAE",
    "figure4": "Figure 4: the rate of each stage (linear)", "figure5": "Figure 5: partial fine-tuning",
    "main": "Every system by every protocol", "labels": "Every system with frozen or few labels",
    "tuning": "Tuning of the parts, on held-out training pictures", "schedules": "Stages and where the boundary lies",
    "splits": "MAE epochs against grafting epochs at about the same cost",
}
# top-1 on ImageNet-1k with ViT-B/16, from the paper; its Table 7 is ViT-L/16
PAPER = {
    ("MAE", "linear"): 68.0, ("MAE", "few"): 51.1, ("MAE", "projector"): 73.3, ("MAE", "fine-tune"): 83.6,
    ("MoCo v3", "linear"): 76.7, ("MoCo v3", "few"): 63.4, ("MoCo v3", "projector"): 75.4, ("MoCo v3", "fine-tune"): 83.2,
    ("MTL", "linear"): 68.4, ("MTL", "few"): 47.6, ("MTL", "fine-tune"): 81.0,
    ("CL -> MIM grafting", "linear"): 65.5, ("CL -> MIM grafting", "few"): 32.5, ("CL -> MIM grafting", "fine-tune"): 82.5,
    ("MIM -> CL grafting", "linear"): 74.5, ("MIM -> CL grafting", "few"): 56.5, ("MIM -> CL grafting", "fine-tune"): 83.6,
    ("Layer grafted", "linear"): 77.7, ("Layer grafted", "few"): 65.5, ("Layer grafted", "projector"): 77.8,
    ("Layer grafted", "fine-tune"): 83.9, ("VICReg", "linear"): 70.1, ("VICReg", "fine-tune"): 81.2,
    ("Layer grafted VICReg", "linear"): 74.9, ("Layer grafted VICReg", "fine-tune"): 83.6,
}


def get_args(argv=None):
    parser = run.Parser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="demo", help="demo, cifar10-small: two cores; cifar10: a GPU; imagenet: "
        "the paper's")
    add("--data", help="folder with train/ and val/ or test/ in place of the preset's")
    add("--only", help=f"comma list of {', '.join(TABLES)} (default: the paper's tables and figures)")
    add("--seeds", type=numbers(kind=int, high=2 ** 31), help="comma list (default 0; cifar10 0,1,2)")
    add("--common", default="", help="options for every training run, quoted: \"--epochs 2 --workers 4\"")
    add("--out", help="default out/PRESET")
    add("--dry-run", action="store_true", help="print the commands and what they take, and stop")
    args = parser.parse_args(argv)
    args.only = args.only.split(",") if args.only else list(PAPERS)
    unknown = [name for name in args.only if name not in TABLES]
    if unknown:
        parser.error(f"--only {unknown[0]}: there are {', '.join(TABLES)}")
    for name in args.only:
        if not rows_of(PRESETS[args.preset], name):
            parser.error(f"--only {name}: preset {args.preset} has none of it")
    if args.preset == "imagenet" and not (args.data or os.environ.get("DATA")):
        parser.error("--preset imagenet needs --data FOLDER (with train/ and val/)")
    run.fill(args, dict(out=os.path.join("out", args.preset), seeds=[0, 1, 2] if args.preset == "cifar10" else [0]))
    run.check(parser, args)
    return args


# ----------------------------------------------------------------------------------------- systems and protocols
def systems(p):
    """Name -> (stage, its options). {NAME} stands for the folder of that other system, trained before."""
    lower = str(p["depth"] * 2 // 3)                    # the blocks that grafting keeps fixed: the first two stages
    mae = [*p["arch"], *p["size"], "--lr", p["mae_lr"]]
    scratch = ["--init", "none", *p["arch"], *p["size"]]
    contrastive = ["--epochs", p["cl_epochs"], *p["hidden"]]
    stages = ",".join(p["rates"])
    vicreg = ["--loss", "vicreg", "--epochs", p["short_epochs"], *p["vicreg"]]
    vicreg_stages = ["--loss", "vicreg", "--epochs", p["short_epochs"], *p["vicreg"][:-1], stages]
    found = {
        "MAE": (mae_pretrain, [*mae, "--epochs", p["mae_epochs"]]),
        "MoCo v3": (graft_train, [*scratch, *contrastive, "--lr", p["cl_lr"]]),
        "MTL": (graft_train, [*scratch, *contrastive, "--lr", p["cl_lr"], "--mim-weight", "1"]),
        "CL -> MIM grafting": (mae_pretrain, ["--init", "{MoCo v3}", "--freeze-blocks", lower, "--lr", p["mae_lr"],
                                              "--epochs", p["short_epochs"]]),
        "MIM -> CL grafting": (graft_train, ["--init", "{MAE}", "--freeze-blocks", lower, "--lr", p["cl_lr"], *p["hidden"],
                                             "--epochs", p["short_epochs"]]),
        "Layer grafted": (graft_train, ["--init", "{MAE}", *contrastive, "--lr", stages]),
        TOTAL: (graft_train, [*scratch, *p["hidden"], "--epochs", p["mae_epochs"] + p["cl_epochs"], "--lr", p["cl_lr"]]),
        "VICReg": (graft_train, [*scratch, *vicreg]),
        "Layer grafted VICReg": (graft_train, ["--init", "{MAE}", *vicreg_stages]),
        "Layer grafted, anchored": (graft_train, ["--init", "{MAE}", *contrastive, "--lr", stages, "--anchor-weight",
                                                  p["anchor"], "--anchor-blocks", str(p["depth"] // 2)]),
    }
    for rates in itertools.product(*p["grid"]):
        lr = ",".join(rates)
        found[f"grid {lr}"] = (graft_train, ["--init", "{MAE}", *p["hidden"], "--epochs", p["grid_epochs"], "--lr", lr])
    for name, shorter in EQUAL.items():
        stage, options = found[shorter]
        place = options.index("--epochs") + 1                               # how many is known when those are trained
        found[name] = (stage, [*options[:place], "?", *options[place + 1:]])
    for lr in p.get("schedules", ()):
        found[f"rates {lr}"] = (graft_train, ["--init", "{MAE}", *p["hidden"], "--epochs", p["grid_epochs"], "--lr", lr])
    for first, second in p.get("splits", ()):
        found[f"MAE {first} epochs"] = (mae_pretrain, [*mae, "--epochs", first])
        found[f"split {first} + {second}"] = (graft_train, ["--init", f"{{MAE {first} epochs}}", *p["hidden"], "--lr",
                                                            stages, "--epochs", second])
    return found | tuning(p)


def tuning(p):
    """The short runs that chose rate and smallest crop of MAE and MoCo v3: name -> (stage, options)."""
    if "tuning" not in p:
        return {}
    found, (mae_epochs, cl_epochs) = {}, p["tuning"]["epochs"]
    for name, rate, own, more in (("MAE", p["mae_lr"], p["mae"], ["--epochs", mae_epochs]),
                                  ("MoCo v3", p["cl_lr"], p["contrastive"],
                                   ["--epochs", cl_epochs, "--init", "none", *p["hidden"]])):
        rates, crops = p["tuning"][name]
        for lr, crop in dict.fromkeys([(lr, own[1]) for lr in rates] + [(rate, crop) for crop in crops]):
            found[f"tune {name} {lr} crop {crop}"] = (mae_pretrain if name == "MAE" else graft_train, [
                *p["arch"], *p["size"], *more, "--lr", lr, "--crop-min", crop])
    return found


def protocols(p, column, name):
    """Column of a table -> list of (protocol name, script, options)."""
    few, many = p["few"]
    # MAE and what ends with MAE has no projector: its 10 % row is plain fine-tuning with those labels
    projector = [] if name.startswith("MAE") or name == "CL -> MIM grafting" else ["--from-projector"]
    return {
        "linear": [("linear", evaluate, ["--mode", "linear", *p["linear"]])],
        "k-NN": [("k-NN", evaluate, ["--mode", "knn"])],
        "few": [(f"few-shot {few}", evaluate, ["--mode", "fewshot", "--labels", few])],
        "projector": [(f"fine-tune {many}", finetune, ["--labels", many, *projector, *p.get("projector", [])])],
        "fine-tune": [("fine-tune", finetune, p["fine"])],
        "probe": [(f"block {k} + {n}", finetune, ["--probe-block", k, "--blocks", n, *p["fine"]])
                  for k in p["probes"][0] for n in p["probes"][1]],
        "partial": [(f"{k} blocks fixed", finetune, ["--freeze-blocks", k, *p["fine"]]) for k in p["partial"]],
    }[column]


def folder(args, seed, name):
    return os.path.join(args.out, f"seed{seed}", re.sub(r"[^a-z0-9.]+", "-", name.lower()))


def needed(p, name):
    """The systems that must be trained before this one."""
    if name in EQUAL:
        return ["MAE", "Layer grafted", EQUAL[name]]
    return re.findall(r"\{(.+?)\}", " ".join(map(str, systems(p)[name][1])))


def seconds_of(out):
    """Seconds that the training run in a folder took, by its log; None without one."""
    path = os.path.join(out, "log.jsonl")
    return sum(line["seconds"] for line in run.read_results(path)) if os.path.isfile(path) else None


def equal_epochs(args, p, seed, name):
    """Epochs that take a system as long as MAE and grafting together took; '?' while those are not trained."""
    seconds = [seconds_of(folder(args, seed, system)) for system in needed(p, name)]
    if None in seconds:
        return "?"
    options = systems(p)[EQUAL[name]][1]
    return max(1, round(options[options.index("--epochs") + 1] * (seconds[0] + seconds[1]) / seconds[2]))


def data_options(args, p):
    source = args.data or p["data"]
    return ["--data", source] if source else []


def command(args, p, seed, name):
    """(stage, argument list) that trains a system."""
    stage, options = systems(p)[name]
    options = [folder(args, seed, o[1:-1]) if str(o).startswith("{") else str(o) for o in options]
    if name in EQUAL:
        options[options.index("?")] = str(equal_epochs(args, p, seed, name))
    own = p.get("mae" if stage is mae_pretrain else "contrastive", [])
    own = [] if "--crop-min" in options else own
    return stage, [*options, *data_options(args, p), *own, *p["common"], *p.get("batch", []), *shlex.split(args.common),
                   "--seed", str(seed), "--out", folder(args, seed, name)]


def rows_of(p, table):
    """The systems of a table, in order."""
    known = systems(p)
    rows = []
    for row in p.get("main", EVERY) if table in ("main", "labels") else TABLES[table][0]:
        rows += [name for name in known if name.startswith(row)] if row.endswith(" ") else [row]
    return rows


def jobs(args, p):
    """Every (seed, system, protocol, script, options) asked for, each once; what one needs comes before it."""
    seen = {}
    for table in args.only:
        for name, seed in itertools.product(rows_of(p, table), args.seeds):
            for column in TABLES[table][1]:
                for protocol, script, options in protocols(p, column, name):
                    seen[(seed, name, protocol)] = (script, [str(o) for o in options])
    return seen


# ----------------------------------------------------------------------------------------------------- reports
def cell(results, name, protocol, figure="top1", digits=1):
    """Mean ± standard deviation over seeds of top-1 (or another figure of the results), or nothing."""
    found = [e[figure] for e in results if e["name"] == name and e["protocol_name"] == protocol]
    if not found:
        return ""
    spread = f" ± {statistics.stdev(found):.{digits}f}" if len(found) > 1 else ""
    return f"{statistics.mean(found):.{digits}f}{spread}"


def markdown(results, args, p):
    """Every table that was asked for or is filled already, the paper's figure (ImageNet-1k, ViT-B/16) in brackets
    where it has one."""
    lines = []
    there = {(e["name"], e["protocol_name"]) for e in results}
    for table, (_, columns) in TABLES.items():
        rows = rows_of(p, table)
        cells = {(name, head) for name in rows for column in columns for head, _, _ in protocols(p, column, name)}
        if table not in args.only and not (cells and cells <= there):
            continue
        lines += [f"### {TITLES[table]}", ""]
        if table == "figure4":
            firsts, seconds, thirds = p["grid"]
            for third in reversed(thirds):
                lines += [f"third stage {third}: rows first stage, columns second stage", "",
                          "| | " + " | ".join(seconds) + " |", "|---" * (len(seconds) + 1) + "|"]
                for first in firsts:
                    cells = [cell(results, f"grid {first},{second},{third}", "linear") for second in seconds]
                    lines.append(f"| {first} | " + " | ".join(cells) + " |")
                lines.append("")
            continue
        heads = [(column, head) for column in columns for head, _, _ in protocols(p, column, "Layer grafted")]
        cost = ["training seconds"] if EVERY == TABLES[table][0] else []    # MAE's count where it was started from
        titles = ["system", *cost, *(head for _, head in heads)]
        lines += ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
        for name in rows:
            cells = [cell(results, name, "linear", "train_seconds", 0)] if cost else []
            for column, head in heads:
                paper = PAPER.get((name, column)) if table not in ("table7", "figure5", "table5") else None
                figure = "held_out_top1" if table == "tuning" else "top1"
                cells.append(cell(results, name, head, figure) + (f" ({paper:.1f})" if paper else ""))
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def gpu_hours(p, images=1281167, rate=3e14):
    """Hours on one GPU that sustains `rate` operations a second, for the training runs of the preset by epochs.

    Encoder forward: 2 x weights x tokens; MAE trains a quarter of the tokens and its decoder (about as much again),
    MoCo v3 two views forward and backward (3 x) and two forward in the momentum encoder.
    """
    (patch, dim, depth, _), _ = ARCHS[p["arch"][1]]
    tokens = (224 // patch) ** 2 + 1
    forward = 2 * 12 * dim * dim * depth * tokens + 4 * dim * tokens ** 2 * depth
    mae, contrastive = 3 * forward * 0.5, (2 * 3 + 2) * forward
    total = 0.0
    for name, (stage, options) in systems(p).items():
        if name in EQUAL:                                                   # in none of the paper's tables
            continue
        epochs = options[options.index("--epochs") + 1]
        total += epochs * images * (mae if stage is mae_pretrain else contrastive)
    return total / rate / 3600


@contextmanager
def pictures_read_once():
    """Every run and evaluation asks for the same pictures: what data.load_data returned is kept and handed out again."""
    load, kept = data.load_data, {}

    def load_data(*args, **more):
        key = (args, *sorted(more.items()))
        if key not in kept:
            kept[key] = load(*args, **more)
        return copy.copy(kept[key])                                         # class numbers and device may be changed

    data.load_data = load_data
    try:
        yield
    finally:
        data.load_data = load


def main(args):
    with pictures_read_once():
        reproduce(args)


def reproduce(args):
    """Train what is missing, evaluate it, write the tables."""
    p = PRESETS[args.preset]
    path = os.path.join(args.out, "results.jsonl")
    results = run.read_results(path) if os.path.exists(path) else []
    done = {(e["seed"], e["name"], e["protocol_name"]) for e in results}
    todo = {key: job for key, job in jobs(args, p).items() if key not in done}
    names = dict.fromkeys((seed, name) for seed, name, _ in todo)
    if args.preset == "imagenet":
        print(f"about {gpu_hours(p):,.0f} GPU-hours for one seed at 300 TFLOP/s, evaluations not counted", flush=True)
    print(f"{len(names)} systems to train or resume, {len(todo)} evaluations, {len(done)} results are there", flush=True)
    started = time.perf_counter()

    trained = set()

    def train(seed, name):
        """Train a system, after those it starts from; each once."""
        if (seed, name) in trained:
            return
        for other in needed(p, name):
            train(seed, other)
        stage, options = command(args, p, seed, name)
        print(f"== {name}, seed {seed}: python {stage.__name__}.py {shlex.join(options)}", flush=True)
        if not args.dry_run:
            stage.main(stage.get_args(options))
        trained.add((seed, name))

    for (seed, name, protocol), (script, options) in todo.items():
        train(seed, name)
        own = folder(args, seed, name)
        seeds = ["--seeds", str(seed)] if script is evaluate else ["--seed", str(seed)]
        out = os.path.join(own, re.sub(r"[^a-z0-9]+", "-", protocol.lower()))
        options = [*options, *data_options(args, p), *seeds, "--checkpoint", own, "--out", out]
        print(f"== {name}, seed {seed}, {protocol}: python {script.__name__}.py {shlex.join(options)}", flush=True)
        if args.dry_run:
            continue
        entry = script.main(script.get_args(options))
        entry = entry[0] if isinstance(entry, list) else entry
        costs = [name] if name in EQUAL else [name, *needed(p, name)]
        more = dict(name=name, protocol_name=protocol, seed=seed, preset=args.preset,
                    train_seconds=sum(seconds_of(folder(args, seed, each)) or 0 for each in costs))
        if name.startswith("grid "):
            more["lr"] = [float(rate) for rate in name.removeprefix("grid ").split(",")]
        with open(path, "a") as f:
            f.write(json.dumps(entry | more) + "\n")
        results = run.read_results(path)                                    # another process may have written too
        with open(os.path.join(args.out, "results.md"), "w") as f:
            f.write(markdown(results, args, p) + "\n")
    if results and not args.dry_run:
        print(markdown(results, args, p), flush=True)
        print(f"wrote {args.out}/results.md; {run.duration(time.perf_counter() - started)}", flush=True)
    elif not results and not args.dry_run:
        raise UsageError("nothing to do")


if __name__ == "__main__":
    run.program(main, get_args)
