"""Train every system of the paper, evaluate each by every protocol, fill the paper's tables and
draw its figures, for a dataset.

    python reproduce.py --preset demo                       # embedded images, two CPU cores
    python reproduce.py --preset cifar10-small --data CIFAR # cut to what two CPU cores carry
    python reproduce.py --preset cifar10 --data CIFAR       # ViT-Tiny, patch 4, hours on one GPU
    torchrun --nproc_per_node 8 reproduce.py --preset imagenet --data IMAGENET  # the paper's
    python reproduce.py --preset imagenet --data IMAGENET --only table2 --dry-run   # its cost
    python reproduce.py --preset imagenet --data IMAGENET --mae MAE.pth --moco MOCO.pth

Everything is done by the stage scripts' own main(). A run that is killed goes on where it stopped,
what is done is skipped; several of these commands may work in one --out at a time if their --seeds
differ. Writes results.jsonl, results.md and, under figures/, the analyses into --out.
"""
import run  # first: a Ctrl-C while torch is imported ends in one line

import copy
import functools
import glob
import itertools
import json
import os
import re
import shlex
import statistics
import time

from PIL import Image

import analyze
import checkpoint
import data
import evaluate
import finetune
import graft_train
import mae_pretrain
import segment
from model import ARCHS
from run import UsageError, numbers

# What a preset decides: sizes, epochs, rates, what is evaluated. The rest follows from the paper's
# table. images, tests: of the dataset, and rate: operations a second (with all that is not an
# operation), for the estimate alone. rates: of grafting's three stages; grid: the rates tried for
# each stage (Figure 4); short, grid_epochs: of the paper's runs of 100 epochs. few, many: the
# shares of labels. fine, few_fine: fine-tuning with all labels, and with `many` of them: the same
# for every row. tuned: epochs of the short runs that choose, and the rates and smallest crops that
# are tried one at a time.
DECADES = ("1.5e-6", "1.5e-5", "1.5e-4")
PLAIN = dict(rand_augment=0, mixup=0, cutmix=0, erasing=0)  # a few epochs cannot take the paper's
PROBES = ((6, 9, 12), (0, 1, 2, 4))                         # Table 5: blocks, new blocks on top
SMALL = dict(
    images=10000, tests=10000, rate=1.7e11, arch=dict(arch="vit_mini", patch_size=4, img_size=32),
    vicreg=dict(lr="1e-3"), grid_epochs=1, many="10%", linear=dict(cache_features=True),
    probes=((3, 6), (0, 1)), partial=(0, 2, 4), rates="1.5e-4,5e-4,1.5e-3", never=("table6",))
LONG = dict(
    rates="1.5e-5,1.5e-5,1.5e-4", vicreg=dict(lr="1.5e-4"), few="1%", many="10%", probes=PROBES,
    partial=(0, 2, 4, 6, 8, 10, 12))
PRESETS = {
    "demo": SMALL | dict(
        data=None, images=4096, tests=2048, common=dict(log_every=32), short=4, few="3 per class",
        mae=dict(epochs=25, lr="3e-3"), contrastive=dict(epochs=10, lr="1.5e-3", hidden_dim=512),
        rates="5e-4,5e-4,1.5e-3", fine=dict(epochs=3), few_fine=dict(epochs=60),
        grid=(("1.5e-4", "5e-4", "1.5e-3"), ("5e-4",), ("1.5e-4", "5e-4", "1.5e-3")),
        tuned={"MAE": (25, ("1e-3", "3e-3"), ("0.2",)),
               "MoCo v3": (3, ("5e-4", "1.5e-3", "3e-3"), ("0.2",))}),
    "cifar10-small": SMALL | dict(
        data="cifar10", common=dict(log_every=39, workers=0, batch_size=128, crop_min=0.2),
        arch=dict(arch="vit_mini", patch_size=8, img_size=32), short=10, few="1%", grid_epochs=2,
        mae=dict(epochs=32, lr="4.5e-3"),
        contrastive=dict(epochs=30, lr="1.5e-3", hidden_dim=512), rates="1.5e-4,5e-4,4.5e-3",
        grid=(("1.5e-4",), ("5e-4",), ("5e-4", "1.5e-3", "4.5e-3")),
        fine=dict(epochs=8, batch_size=64, lr="4e-3", crop_min=0.4) | PLAIN,
        few_fine=dict(epochs=20, batch_size=64, lr="4e-3", crop_min=0.4) | PLAIN,
        tuned={"MAE": (8, ("5e-4", "1.5e-3", "4.5e-3"), ("0.2", "0.5")),
               "MoCo v3": (5, ("5e-4", "1.5e-3", "4.5e-3"), ("0.08", "0.2"))},
        main=("MAE", "MoCo v3", "MTL", "Layer grafted", "MAE, equal cost", "MoCo v3, equal cost")),
    "cifar10": LONG | dict(
        data="cifar10", images=50000, tests=10000, rate=2e13, linear=dict(cache_features=True),
        arch=dict(arch="vit_tiny", patch_size=4, img_size=32), short=30, grid_epochs=15,
        common=dict(batch_size=1024, crop_min=0.2), mae=dict(epochs=200, lr="1.5e-4"),
        contrastive=dict(epochs=60, lr="1.5e-4", hidden_dim=2048),
        grid=(DECADES, ("1.5e-5",), DECADES), fine=dict(epochs=50, crop_min=0.2),
        few_fine=dict(epochs=400, lr="3e-5", crop_min=0.2), never=("table6",),
        tuned={"MAE": (50, ("1.5e-4", "5e-4", "1.5e-3"), ("0.2", "0.5")),
               "MoCo v3": (15, ("1.5e-4", "5e-4", "1.5e-3"), ("0.08", "0.2", "0.4"))}),
    # the paper's; warm-up 40 at any length is that of the released script
    "imagenet": LONG | dict(
        data=None, images=1281167, tests=50000, rate=3e14, linear={}, short=100, grid_epochs=100,
        arch=dict(arch="vit_base", patch_size=16, img_size=224), common=dict(warmup_epochs=40),
        mae=dict(epochs=1600, lr="1.5e-4"), contrastive=dict(epochs=300, lr="1.5e-4"),
        grid=(DECADES,) * 3, fine=dict(epochs=100), few_fine=dict(epochs=400, lr="3e-5"),
        never=("tuning", "longtail")),
}
PRESETS["imagenet-large"] = PRESETS["imagenet"] | dict(
    arch=dict(arch="vit_large", patch_size=16, img_size=224),
    contrastive=dict(epochs=300, lr="1.5e-4", batch_size=2080),
    fine=dict(epochs=50, layer_decay=0.8, drop_path=0.2),
    few_fine=dict(epochs=400, lr="3e-5", layer_decay=0.65),
    # the paper's ViT-L has the regulariser; its Table 7 shows both
    table2=("MAE", "MoCo v3", "Layer grafted, anchored"),
    table3=("MAE", "MoCo v3", "Layer grafted, anchored"),
    only=("table2", "table3", "table7"))

TOTAL = "MoCo v3, epochs of MAE + grafting"
# trained for as many operations as MAE and grafting together: what it is a longer run of
EQUAL = {"MAE, equal cost": "MAE", "MoCo v3, equal cost": "MoCo v3"}
EVERY = ("MAE", "MoCo v3", "MTL", "CL -> MIM grafting", "MIM -> CL grafting", "VICReg",
         "Layer grafted VICReg", "Layer grafted", *EQUAL)
TAIL = ", long tail"                # after the name of a system that was trained on one
# table: (title, rows, columns). A row that ends in a blank stands for every system whose name
# begins so; a preset may have rows of its own.
TABLES = {
    "table1": ("Table 1: combining the losses, and the order of grafting",
               EVERY[:5], ("linear", "few", "fine-tune")),
    "table2": ("Table 2: label efficiency",
               ("MAE", "MoCo v3", "Layer grafted"), ("linear", "few", "many", "k-NN")),
    "table3": ("Table 3: fine-tuning", ("MAE", "MoCo v3", "Layer grafted"), ("fine-tune",)),
    "table4": ("Table 4: VICReg as the contrastive end",
               ("VICReg", "Layer grafted VICReg"), ("linear", "fine-tune")),
    "table5": ("Table 5: new blocks on frozen features", ("MAE", "MoCo v3"), ("probe",)),
    "table6": ("Table 6: segmentation of ADE20K with UperNet (mIoU)",
               ("MAE", "MoCo v3", "Layer grafted"), ("segment",)),
    "table7": ("Table 7: keeping lower layers near MAE",
               ("Layer grafted", "Layer grafted, anchored"),
               ("linear", "few", "many", "fine-tune")),
    "figure4": ("Figure 4: the rate of each stage", ("grid ",), ("linear", "fine-tune")),
    "figure5": ("Figure 5: partial fine-tuning", ("MAE", "Layer grafted"), ("partial",)),
    "main": ("Every system by every protocol",
             EVERY, ("linear", "k-NN", "few", "many", "fine-tune")),
    "longer": ("MoCo v3 for as many epochs as MAE and grafting (ours)",
               ("MoCo v3", TOTAL, "Layer grafted"), ("linear", "few", "many", "k-NN")),
    "longtail": ("Trained on a long tail: balanced accuracy",
                 ("MAE" + TAIL, "MoCo v3" + TAIL, "Layer grafted" + TAIL), ("linear", "tail")),
    "tuning": ("Tuning of the parts, on held-out training images", ("tune ", "grid "), ("linear",)),
}
# options that --common would make the same in systems that differ in them
APART = "--epochs", "--lr", "--init", "--freeze-blocks", "--loss", "--mim-weight", "--data", "--out"
ANALYSES = "analyses"                                       # Figures 1, 3 to 8, by analyze.py
PAPERS = [name for name in TABLES if name.startswith(("table", "figure"))]
SHOWN = {"tuning": "held_out_top1", "longtail": "balanced", "table6": "miou"}     # not top-1
# from the paper: top-1 on ImageNet-1k by linear, few (1 %), many (10 %), fine-tune, and the mIoU
PAPER = {
    "vit_base": {
        "MAE": (68.0, 51.1, 73.3, 83.6, 48.1), "MoCo v3": (76.7, 63.4, 75.4, 83.2, 47.3),
        "MTL": (68.4, 47.6, None, 81.0), "CL -> MIM grafting": (65.5, 32.5, None, 82.5),
        "MIM -> CL grafting": (74.5, 56.5, None, 83.6),
        "Layer grafted": (77.7, 65.5, 77.8, 83.9, 48.7), "VICReg": (70.1, None, None, 81.2),
        "Layer grafted VICReg": (74.9, None, None, 83.6)},
    "vit_large": {
        "MAE": (75.8, 55.2, 78.7, 85.9), "MoCo v3": (77.6, None, None, 84.1),
        "Layer grafted": (80.5, 68.9, 79.8, 85.7),
        "Layer grafted, anchored": (81.0, 69.3, 80.1, 85.9)}}
# its Table 5: system -> top-1 on block 6 under 0, 1, 2 and 4 new blocks, then on 9, then on 12
PAPER_PROBES = {
    "MAE": (38.9, 70.1, 76.3, 78.5, 59.3, 77.8, 80.2, 81.2, 68.0, 78.9, 80.6, 81.4),
    "MoCo v3": (43.6, 72.7, 76.8, 78.1, 65.5, 78.1, 79.2, 79.4, 76.7, 79.1, 79.7, 79.2)}


def get_args(argv=None):
    parser = run.Parser(__doc__)
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="demo",
        help="demo, cifar10-small: two cores; cifar10: a GPU; imagenet and -large: the paper's")
    add("--data", help="folder with train/ and val/ or test/ in place of the preset's")
    add("--mae", metavar="FILE", help="public weights in place of the MAE run")
    add("--moco", metavar="FILE", help="public weights in place of the MoCo v3 run")
    add("--labels-1", metavar="LIST", help="list of the 1%% of the images whose labels are used")
    add("--labels-10", metavar="LIST", help="the same for the 10%%")
    add("--ade20k", metavar="FOLDER", help="ADE20K, for table6")
    add("--only", help=f"comma list of {', '.join([*TABLES, ANALYSES])} (default: the paper's "
        "tables and figures)")
    add("--seeds", type=numbers(kind=int, high=2 ** 31), help="comma list (0; cifar10: 0,1,2)")
    add("--common", default="", help="options for every training run, in quotes: not those that "
        f"tell systems apart, {', '.join(APART)}")
    add("--out", help="default out/PRESET")
    add("--dry-run", action="store_true", help="print the commands and what they take, and stop")
    args = parser.parse_args(argv)
    p = PRESETS[args.preset]
    default = [name for name in p.get("only", PAPERS) if name != "table6" or args.ade20k]
    args.only = args.only.split(",") if args.only else [*default, ANALYSES]
    for name in args.only:
        if name not in TABLES and name != ANALYSES:
            parser.error(f"--only {name}: there are {', '.join([*TABLES, ANALYSES])}")
        if name in p.get("never", ()):
            parser.error(f"--only {name}: preset {args.preset} has none of it")
    apart = [word for word in shlex.split(args.common) if word.split("=")[0] in APART]
    if apart:
        parser.error(f"--common: {apart[0]} is each system's own; it would make them alike")
    if "table6" in args.only and not args.ade20k:
        parser.error("--only table6 needs --ade20k FOLDER")
    for path in (args.mae, args.moco, args.labels_1, args.labels_10, args.ade20k):
        if path and not os.path.exists(path):
            parser.error(f"{path}: no such file or folder")
    if args.preset.startswith("imagenet"):
        args.data = args.data or os.environ.get("DATA")
    if args.preset.startswith("imagenet") and not args.data:
        parser.error(f"--preset {args.preset} needs --data FOLDER (with train/ and val/)")
    seeds = [0, 1, 2] if args.preset == "cifar10" else [0]
    run.fill(args, dict(out=os.path.join("out", args.preset), seeds=seeds))
    run.check(parser, args)
    return args


def plan(args):
    """The preset with what the command line puts in its place."""
    p = PRESETS[args.preset]
    given = {name: path for name, path in (("MAE", args.mae), ("MoCo v3", args.moco)) if path}
    return p | dict(data=args.data or p["data"], given=given, out=args.out, only=args.only,
                    lists=(args.labels_1 or p["few"], args.labels_10 or p["many"]),
                    more=shlex.split(args.common), ade20k=args.ade20k)


def depth_of(p):
    return ARCHS[p["arch"]["arch"]][0][2]


# ------------------------------------------------------------------------ systems and protocols
def systems(p):
    """Name -> (stage, its options). {NAME} stands for the folder of that other system."""
    lower = dict(freeze_blocks=depth_of(p) * 2 // 3)    # what grafting keeps: two of three stages
    mae = p["common"] | p["mae"]
    contrastive = p["common"] | p["contrastive"]
    scratch = dict(init="none") | p["arch"] | contrastive
    grafted = dict(init="{MAE}") | contrastive | dict(lr=p["rates"])
    short = dict(epochs=p["short"])
    vicreg = dict(loss="vicreg") | p["vicreg"] | short
    anchor = dict(anchor_weight="1e-5", anchor_blocks=depth_of(p) // 2)
    thirds = -(-p["contrastive"]["epochs"] // 3)        # 100, 200 and 300 in the paper
    total = dict(epochs=p["mae"]["epochs"] + p["contrastive"]["epochs"])
    found = {
        "MAE": (mae_pretrain, p["arch"] | mae),
        "MoCo v3": (graft_train, scratch),
        "MTL": (graft_train, scratch | dict(mim_weight=1, every_epochs=thirds)),
        "CL -> MIM grafting": (mae_pretrain, dict(init="{MoCo v3}") | mae | lower | short),
        "MIM -> CL grafting": (graft_train, dict(init="{MAE}") | contrastive | lower | short),
        "Layer grafted": (graft_train, grafted),
        "Layer grafted, anchored": (graft_train, grafted | anchor),
        "VICReg": (graft_train, scratch | vicreg),
        "Layer grafted VICReg": (graft_train, grafted | vicreg | dict(lr=p["rates"])),
        TOTAL: (graft_train, scratch | total),
    }
    for name in ("MAE", "MoCo v3", "Layer grafted"):
        stage, options = found[name]
        init = dict(init=f"{{MAE{TAIL}}}") if name == "Layer grafted" else {}
        found[name + TAIL] = (stage, options | init | dict(data="{" + TAIL + "}"))
    for rates in map(",".join, itertools.product(*p["grid"])):
        found[f"grid {rates}"] = (graft_train, grafted | dict(lr=rates, epochs=p["grid_epochs"]))
    whole = flops(p, *found["MAE"]) + flops(p, *found["Layer grafted"])
    for name, shorter in EQUAL.items():
        stage, options = found[shorter]
        epochs = whole / flops(p, stage, options) * options["epochs"]
        found[name] = (stage, options | dict(epochs=max(1, round(epochs))))
    for name, (epochs, rates, crops) in p.get("tuned", {}).items():
        stage, options = found[name]
        own = options.get("crop_min", crops[0])
        for lr, crop in [(lr, own) for lr in rates] + [(options["lr"], crop) for crop in crops]:
            found[f"tune {name} {lr} crop {crop}"] = (stage, options | dict(
                epochs=epochs, lr=lr, crop_min=crop))
    return found


def protocols(p, column, name):
    """Column of a table -> [(title, the result's name, script, options)]. Titles of one result are
    one evaluation: without new blocks on the last one it is linear evaluation (Table 5), with no
    block fixed it is fine-tuning (Figure 5)."""
    linear, tail = dict(mode="linear") | p["linear"], dict(data="{" + TAIL + "}")
    few, many = (dict(labels=labels) for labels in p["lists"])
    # MAE and what ends with MAE has no projector: from the class token, else the same
    if not name.startswith(("MAE", "CL -> MIM")):
        many["from_projector"] = True

    def probe(k, n):
        if n:
            return finetune, dict(probe_block=k, blocks=n) | p["fine"]
        return evaluate, linear | (dict(block=k) if k < depth_of(p) else {})

    found = {
        "linear": [("linear", evaluate, linear)],
        "k-NN": [("k-NN", evaluate, dict(mode="knn"))],
        "few": [(f"few-shot {p['few']}", evaluate, dict(mode="fewshot") | few)],
        "many": [(f"fine-tune {p['many']}", finetune, many | p["few_fine"])],
        "fine-tune": [("fine-tune", finetune, p["fine"])],
        "partial": [(f"{k} blocks fixed", finetune, p["fine"] | dict(freeze_blocks=k))
                    for k in p["partial"]],
        "probe": [(f"block {k} + {n}", *probe(k, n)) for k, n in itertools.product(*p["probes"])],
        "segment": [("UperNet", segment, dict(data=p["ade20k"]))],
        "tail": [("linear, labels of the tail", evaluate, linear | tail),
                 ("k-NN, labels of the tail", evaluate, dict(mode="knn") | tail)],
    }[column]
    same = {f"block {depth_of(p)} + 0": "linear", "0 blocks fixed": "fine-tune"}
    return [(title, same.get(title, title), *job) for title, *job in found]


def paper_figure(p, table, column, name, title):
    """The paper's figure for a cell of a table in brackets, or nothing. Its Table 7 is of ViT-L."""
    if table == "table7" and p["arch"]["arch"] != "vit_large":
        return ""
    figures = PAPER.get(p["arch"]["arch"], PAPER["vit_base"]).get(name)
    if column == "probe" and p["probes"] == PROBES:
        places = [f"block {k} + {n}" for k, n in itertools.product(*PROBES)]
        found = PAPER_PROBES[name][places.index(title)]
    else:
        columns = ("linear", "few", "many", "fine-tune", "segment")
        found = dict(zip(columns, figures or ())).get(column)
    return f" ({found:.1f})" if found else ""


def folder(p, seed, name):
    """Where a system is: its run's folder, or the file that was given for it."""
    if name == TAIL:
        return os.path.join(p["out"], "longtail")
    return p["given"].get(name) or os.path.join(p["out"], f"seed{seed}", slug(name))


def slug(name):
    return re.sub(r"[^a-z0-9.]+", "-", name.lower())


def needed(p, name):
    """What a system is made of and itself, in the order in which they are made, each once."""
    if name == TAIL:
        return [name]
    inside = re.findall(r"\{(.+?)\}", " ".join(map(str, systems(p)[name][1].values())))
    before = itertools.chain.from_iterable(needed(p, other) for other in inside)
    return [*dict.fromkeys(before), name]


def command(p, seed, options, *more):
    """Options as a list of arguments; {NAME} becomes that system's folder."""
    found = []
    for key, value in ((dict(data=p["data"]) if p["data"] else {}) | options).items():
        value = re.sub(r"\{(.+?)\}", lambda match: folder(p, seed, match[1]), str(value))
        found += ["--" + key.replace("_", "-"), *([] if value == "True" else [value])]
    return [*found, *more]


def rows_of(p, table):
    """The systems of a table, in order."""
    known = systems(p)
    rows = []
    for row in p.get(table, TABLES[table][1]):
        rows += [name for name in known if name.startswith(row)] if row[-1] == " " else [row]
    return rows


def jobs(p, seeds):
    """Every (seed, system, result's name) asked for, each once -> (script, options)."""
    found = {}
    for table in p["only"]:
        _, _, columns = TABLES.get(table, ("", (), ()))
        for name, seed in itertools.product(rows_of(p, table) if columns else (), seeds):
            for column in columns:
                for _, protocol, script, options in protocols(p, column, name):
                    found[(seed, name, protocol)] = (script, options)
    return found


# ---------------------------------------------------------------------------------- operations
def block_flops(width, tokens, asking=None):
    """Operations of a transformer block forward on one image. asking: tokens whose output is
    needed, of an encoder's last block the class token alone."""
    asking = asking or tokens
    # keys and values of all; query, output and MLP of those that ask
    return 2 * width ** 2 * (2 * tokens + 10 * asking) + 4 * width * tokens * asking


def encoder_flops(p, depth=None):
    """(operations forward on one image for block `depth`'s class token, those of one block, the
    step of MAE without backward through frozen blocks)."""
    (_, width, layers, _), (narrow, of_decoder, _) = ARCHS[p["arch"]["arch"]]
    patches = (p["arch"]["img_size"] // p["arch"]["patch_size"]) ** 2
    pixels = 3 * p["arch"]["patch_size"] ** 2
    block, last = (block_flops(width, 1 + patches, asking) for asking in (None, 1))
    forward = 2 * pixels * width * patches + ((depth or layers) - 1) * block + last
    kept = patches // 4
    decoder = of_decoder * block_flops(narrow, 1 + patches)
    decoder += 2 * narrow * (width * (1 + kept) + pixels * (1 + patches))
    small = block_flops(width, 1 + kept)
    # backward takes twice the forward; there is no gradient of the pixels
    mae = 3 * layers * small + 3 * decoder + 4 * pixels * width * kept
    return forward, block, mae, small


def flops(p, stage, options):
    """Operations of a training run, a multiplication and an addition being two: its matrix
    products, what the run starts from not counted."""
    forward, block, mae, small = encoder_flops(p)
    frozen = options.get("freeze_blocks", 0)
    width = ARCHS[p["arch"]["arch"]][0][1]
    vicreg = options.get("loss") == "vicreg"
    hidden = options.get("hidden_dim", 8192 if vicreg else 4096)
    step = 0
    if stage is mae_pretrain or "mim_weight" in options:
        step += mae - 2 * frozen * small
    if stage is graft_train:
        view = 3 * forward - 2 * frozen * block             # of each of two
        if vicreg:
            view += 6 * (width * hidden + 2 * hidden ** 2)
        else:                                               # and the momentum encoder's forward
            projector = 2 * (width * hidden + hidden ** 2 + 256 * hidden)
            view += forward + 4 * projector + 6 * 2 * 256 * hidden
        step += 2 * view
    share = sum(tail_share(10)) / 10 if TAIL in str(options.get("data")) else 1
    return step * options["epochs"] * p["images"] * share


def cost(p, name):
    """Operations of a system with all that it starts from."""
    return sum(flops(p, *systems(p)[each]) for each in needed(p, name) if each != TAIL)


def evaluation_flops(p, script, options):
    """Operations of an evaluation; classifiers on features and UperNet are not counted."""
    if script is segment:                                   # 160,000 steps of 16 crops of 512
        crop = p["arch"] | dict(img_size=512)
        return 160000 * 16 * 3 * encoder_flops(p | dict(arch=crop))[0]
    forward, block, *_ = encoder_flops(p, options.get("block", options.get("probe_block")))
    tests = forward * p["tests"]
    if script is evaluate:
        passes = 90 if options["mode"] == "linear" and "cache_features" not in options else 1
        return passes * forward * p["images"] * (0.01 if "labels" in options else 1) + tests
    step = 3 * forward - 2 * options.get("freeze_blocks", 0) * block
    if "probe_block" in options:
        step = forward + 3 * options["blocks"] * block
    share = float(p["many"].rstrip("%")) / 100 if "labels" in options else 1
    return step * options["epochs"] * p["images"] * share + tests


# ----------------------------------------------------------------------------------- long tail
def tail_share(classes, imbalance=100):
    """The share of each class that CIFAR-LT's rule keeps: imbalance^(-i / (classes - 1))."""
    return [imbalance ** (-i / (classes - 1)) for i in range(classes)]


def write_long_tail(source, out):
    """A folder with the first images of each class, ever fewer, and all test images, of a dataset
    in memory; list.txt, written last, says what is in it."""
    if os.path.exists(os.path.join(out, "list.txt")):
        return
    names = []
    for part, train in (("train", True), ("test", False)):
        dataset = data.load(source, train)
        if dataset.images is None or dataset.labels is None:
            raise UsageError(f"{source}: the long tail needs small images with labels")
        for c, share in enumerate(tail_share(len(dataset.classes))):
            ids = (dataset.labels == c).nonzero()[:, 0].tolist()
            place = os.path.join(out, part, dataset.classes[c])
            os.makedirs(place, exist_ok=True)
            for i in ids[:max(1, int(share * len(ids)))] if train else ids:
                pixels = dataset.images[i].permute(1, 2, 0).cpu().numpy()
                Image.fromarray(pixels).save(os.path.join(place, f"{i:05}.png"))
                names += [f"{dataset.classes[c]}/{i:05}.png"] * train
    with run.atomic(os.path.join(out, "list.txt")) as temporary, open(temporary, "w") as f:
        f.write("\n".join(names) + "\n")


# ------------------------------------------------------------------------------------- reports
def cell(results, name, protocol, figure="top1"):
    """Mean ± standard deviation over seeds of top-1 (or another figure), or nothing. Of two
    results of one seed the last counts."""
    found = {e["seed"]: e[figure] for e in results
             if e["name"] == name and e["protocol_name"] == protocol}
    found = list(found.values())
    if not found:
        return ""
    spread = f" ± {statistics.stdev(found):.1f}" if len(found) > 1 else ""
    return f"{statistics.mean(found):.1f}{spread}"


def table_lines(titles, rows):
    lines = [titles, ["---"] * len(titles), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines] + [""]


def grid_lines(results, p, protocol):
    """Figure 4 as numbers: for each rate of the third stage the first in rows, the second in
    columns."""
    lines = []
    firsts, seconds, thirds = p["grid"]
    for third in reversed(thirds):
        rows = [[first] + [cell(results, f"grid {first},{second},{third}", protocol)
                           for second in seconds] for first in firsts]
        lines += table_lines([f"{protocol}, third stage {third}", *seconds], rows)
    return lines


def markdown(results, p):
    """Every table that was asked for or is filled already, the paper's figure (ImageNet-1k) in
    brackets where it has one."""
    lines = []
    there = {(e["name"], e["protocol_name"]) for e in results}
    for table, (title, _, columns) in TABLES.items():
        if table in p.get("never", ()):
            continue
        asked = {(name, protocol) for name in rows_of(p, table) for column in columns
                 for _, protocol, *_ in protocols(p, column, name)}
        if table not in p["only"] and not asked <= there:
            continue
        lines += [f"### {title}", ""]
        if table == "figure4":
            lines += [line for column in columns for line in grid_lines(results, p, column)]
            continue
        heads = [(column, head, protocol) for column in columns
                 for head, protocol, *_ in protocols(p, column, "Layer grafted")]
        costs = ["operations (10^15)"] * (table in ("main", "longer", "longtail"))
        rows = []
        for name in rows_of(p, table):
            rows.append([name] + [f"{cost(p, name) / 1e15:.3g}" for _ in costs])
            for column, head, protocol in heads:
                text = cell(results, name, protocol, SHOWN.get(table, "top1"))
                rows[-1].append(text + paper_figure(p, table, column, name, head))
        lines += table_lines(["system", *costs, *(head for _, head, _ in heads)], rows)
    return "\n".join(lines)


# ----------------------------------------------------------------------------------------- main
def main(args):
    """Every run and evaluation asks for the same images: what data.load returned is kept."""
    load, kept = data.load, {}
    os.environ.pop("DATA", None)            # a preset without --data means the embedded set

    def read(*args, **more):
        key = repr((args, sorted(more.items())))
        if key not in kept:
            kept[key] = load(*args, **more)
        return copy.copy(kept[key])                         # class numbers may be changed

    data.load = read
    try:
        return reproduce(args)
    finally:
        data.load = load


def train(args, p, seed, name, say):
    """Train one system, or make the set that some are trained on."""
    out = folder(p, seed, name)
    if name == TAIL:
        if int(os.environ.get("RANK", 0)) == 0 and not args.dry_run:
            write_long_tail(p["data"], out)
        while not args.dry_run and not os.path.exists(os.path.join(out, "list.txt")):
            time.sleep(1)                                   # there is no process group yet
        return
    stage, options = systems(p)[name]
    options = command(p, seed, options, *p["more"], "--seed", str(seed), "--out", out)
    say(f"== {name}, seed {seed}: python {stage.__name__}.py {shlex.join(options)}")
    if not args.dry_run:
        stage.main(stage.get_args(options))
        run.same("systems", name)                   # what one process wrote is there for all


def results_of(path):
    """The entries that were filed here; evaluate.py may have written others beside them."""
    there = run.read_results(path) if os.path.exists(path) else []
    return [entry for entry in there if "protocol_name" in entry]


def same_inputs(args, p, first):
    """Refuse an --out whose results are of other images, weights or options: what is done there is
    skipped. inputs.json holds what they are of."""
    inputs = dict(preset=args.preset, data=p["data"], mae=args.mae, moco=args.moco,
                  labels=list(p["lists"]), common=args.common, ade20k=args.ade20k)
    path = os.path.join(args.out, "inputs.json")
    if os.path.exists(path):
        with open(path) as f:
            there = json.load(f)
        for name, value in inputs.items():
            if there.get(name) != value:
                raise UsageError(f"{args.out} holds results with {name} {there.get(name)}, now it "
                                 f"is {value}: use another --out")
    elif first and not args.dry_run:
        os.makedirs(args.out, exist_ok=True)
        with run.atomic(path) as temporary, open(temporary, "w") as f:
            json.dump(inputs, f)


def reproduce(args):
    """Train what is missing, evaluate it, write the tables, draw the figures -> the results."""
    p = plan(args)
    first = int(os.environ.get("RANK", 0)) == 0
    say = functools.partial(print, flush=True) if first else lambda line: None
    path = os.path.join(args.out, "results.jsonl")
    results = results_of(path)
    done = {(e["seed"], e["name"], e["protocol_name"]) for e in results}
    todo = {key: job for key, job in jobs(p, args.seeds).items() if key not in done}
    of_job = {(seed, name): [each for each in needed(p, name) if each not in p["given"]]
              for seed, name, _ in todo}
    models = {(seed, each) for (seed, _), names in of_job.items() for each in names
              if each != TAIL}
    for _, name in models:                                  # is --common right?
        stage, options = systems(p)[name]
        if "{" not in options.get("init", "") + options.get("data", ""):    # what is not there yet
            stage.get_args(command(p, 0, options, *p["more"]))
    same_inputs(args, p, first)
    training = sum(flops(p, *systems(p)[name]) for _, name in models)
    evaluating = sum(evaluation_flops(p, *job) for job in todo.values())
    say(f"{len(models)} systems to train or resume, {len(todo)} evaluations, {len(done)} results "
        f"are there; {training:.3g} operations to train, {evaluating:.3g} to evaluate, "
        f"for the preset's {p['images']:,} images: about "
        f"{run.duration((training + evaluating) / p['rate'])} on one device at {p['rate']:.2g} "
        "a second")
    started, trained = time.perf_counter(), set()
    for (seed, name, protocol), (script, options) in todo.items():
        for each in of_job[seed, name]:
            if (seed, each) not in trained:
                train(args, p, seed, each, say)
            trained.add((seed, each))
        own = os.path.join(args.out, f"seed{seed}", slug(name), slug(protocol))
        arguments = command(p, seed, options, "--seeds" if script is evaluate else "--seed",
                            str(seed), "--init" if script is segment else "--checkpoint",
                            folder(p, seed, name), "--out", own)
        say(f"== {name}, seed {seed}, {protocol}: python {script.__name__}.py "
            f"{shlex.join(arguments)}")
        if args.dry_run:
            continue
        entry = script.main(script.get_args(arguments))
        run.same("evaluations", protocol)
        entry = dict(entry[0] if isinstance(entry, list) else entry)
        entry |= dict(name=name, protocol_name=protocol, seed=seed, preset=args.preset,
                      operations=cost(p, name))
        if name.startswith("grid "):
            entry["lr"] = [float(rate) for rate in name.removeprefix("grid ").split(",")]
        if first:
            run.append_line(path, json.dumps(entry))
            results = results_of(path)                      # another process may have written too
    if run.peers is not None:                               # the figures are one process's
        run.peers.part()
        run.peers = None
    if first and not args.dry_run:
        with run.atomic(os.path.join(args.out, "results.md")) as name, open(name, "w") as f:
            f.write(markdown(results, p) + "\n")
        if ANALYSES in args.only:
            draw(p, args.seeds[0], bool(todo))
        say(markdown(results, p))
        say(f"wrote {args.out}/results.md; {run.duration(time.perf_counter() - started)}")
    return results


def draw(p, seed, again):
    """The paper's figures of the systems that are there, in one process; again: also those that are
    drawn already."""
    for name in ("RANK", "WORLD_SIZE"):
        os.environ.pop(name, None)
    kept = sorted(glob.glob(os.path.join(folder(p, seed, "MTL"), "epoch*.pt")))
    if kept and int(kept[-1][-7:-3]) < p["contrastive"]["epochs"]:      # the end is in last.pt
        kept.append(os.path.join(folder(p, seed, "MTL"), "last.pt"))
    there = [folder(p, seed, name) for name in ("MAE", "MoCo v3", "Layer grafted")]
    there = [path for path in there if os.path.exists(checkpoint.in_folder(path))]
    fine = os.path.join(p["out"], f"seed{seed}", "mae", "fine-tune")    # Figure 6 has it
    curves = there + [fine] * os.path.exists(os.path.join(fine, "classifier.pt"))
    of_encoders = dict(gradients=kept, vic=curves, attention=there, tsne=there)
    found = {name: command(p, seed, {}, "--checkpoint", *paths)
             for name, paths in of_encoders.items() if paths}
    found |= {name: ["--results", p["out"]] for name in ("lr-grid", "partial", "depth")}
    out = os.path.join(p["out"], "figures")
    for name, options in found.items():
        if not again and os.path.exists(os.path.join(out, f"{name}.csv")):
            continue
        print(f"== python analyze.py {shlex.join([name, *options])}", flush=True)
        try:
            analyze.main(analyze.get_args([name, *options, "--out", out]))
        except (ValueError, RuntimeError) as error:
            if not hasattr(error, "exit_code"):
                raise
            print(f"no {name}: {error}", flush=True)        # the results hold nothing of the kind


if __name__ == "__main__":
    run.program(main, get_args)
