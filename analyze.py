"""The paper's analyses, as numbers (CSV or npz) and as figures (pip install matplotlib).

    python analyze.py gradients --checkpoint out/mtl            # Figures 1, 8: the gradients
    python analyze.py vic --checkpoint out/mae out/graft        # Figure 6: variance, ... by block
    python analyze.py attention                                 # Figure 7: attention distance, maps
    python analyze.py tsne                                      # Figure 3: features of some classes
    python analyze.py reconstruct --checkpoint mae_visualize_vit_large.pth --files IMAGES
    python analyze.py augment --data IMAGENET                   # the views of the training
    python analyze.py lr-grid|partial|depth --results out/demo  # Figures 4, 5, Table 5
    python analyze.py curves --checkpoint out/mae out/graft     # from log.jsonl

Everything goes into --out (out/analysis), the numbers first. Several checkpoints stand side by
side. What reads results and logs is in figures/plots.py, reconstruct and augment in
figures/sheets.py; each analysis here: what is computed, then the command. With the demonstration's
models, on one core of an AMD EPYC: gradients 1 minute, vic and tsne 15 to 20 seconds, the others
under 10. Measured on a CPU only.
"""
import run  # first: a Ctrl-C while torch is imported ends in one line

import argparse
import os
from functools import partial
from itertools import chain, count, islice

import numpy as np
import torch
import torch.nn.functional as F

import augment as views
import checkpoint
import data
from figures import plots, sheets
from model import (MaskedAutoencoder, MoCoV3, SimCLR, VICReg, VisionTransformer, class_tokens,
                   mae_loss, vicreg_terms)
from run import UsageError, number


# ---------------------------------------------------------------------------------------- options
OPTIONS = run.OPTIONS | {
    "out": dict(default="out/analysis", help="folder for numbers and figures"),
    "checkpoint": dict(nargs="+", default=["out/mae", "out/graft"],
                       help="folders of runs, or files that --init reads"),
    "split": dict(choices=("train", "test"), default="train", help="which images of it"),
    "images": dict(type=number(int, 2), help="how many, a random subset"),
    "batch-size": dict(type=number(int, 1), help="images at once: sets the memory only"),
    "batches": dict(type=number(int, 2), default=32, help="batches: the values in each box"),
    "files": dict(nargs="+", help="image files or folders to show (default: of the dataset)"),
    "show": dict(type=number(int, 1, 64), default=8, help="how many of the dataset"),
    "crop-min": dict(type=number(float, 0, 1, above=True),
                     help="smallest crop of a view (default .08; embedded .2)"),
    "block": dict(type=number(int, 1), help="the maps' block (default: the last)"),
    "classes": dict(type=number(int, 2, 40), default=10, help="the first K classes"),
    "per-class": dict(type=number(int, 2), default=100, help="images of each, for all the same"),
    "norm-pix-loss": dict(action=argparse.BooleanOptionalAction, help="whether the decoder was "
                          "trained on patches normalised one by one (default: as our files say; "
                          "others: no, as mae_visualize_vit_*.pth)"),
    "in-chans": dict(type=int, choices=(1, 3, 4), default=3, help="1 grey, 3 RGB, 4 RGBA"),
    "results": dict(nargs="+", default=["out/demo"], help="results.jsonl, or folders with one")}


def get_args(argv=None):
    parser = run.Parser(__doc__)
    commands = parser.add_subparsers(dest="analysis", required=True, metavar="ANALYSIS")

    def command(name, function, help, options, **other):
        """An analysis with some of OPTIONS; other: what is not as there, by option."""
        sub = commands.add_parser(name, help=help, doc=function.__doc__)
        sub.set_defaults(function=function)
        for option in ("out", *options.split()):
            entry = OPTIONS[option] | other.get(option.replace("-", "_"), {})
            sub.add_argument(f"--{option}", **entry)

    common = "checkpoint device workers seed data split batch-size"
    encoders = f"{common} weights heads init-size"
    command("gradients", gradients, "Figures 1, 8: cosine between the losses' gradients",
            f"{common} batches",
            checkpoint=dict(default=["out/mtl"], help="MTL runs (their last.pt) or kept "
                            "epochNNNN.pt of one"),
            batch_size=dict(type=number(int, 2), help="default: as the run was trained"))
    command("vic", vic, "Figure 6: variance, invariance, covariance of each block's features",
            f"{encoders} images crop-min", images=dict(default=2048), batch_size=dict(default=128))
    command("attention", attention, "Figure 7: attention distance; maps of the class token",
            f"{encoders} images files show block", images=dict(default=512),
            batch_size=dict(default=32), show=dict(default=4))
    command("tsne", tsne, "Figure 3: t-SNE of the class tokens of some classes",
            f"{encoders} classes per-class", batch_size=dict(default=256))
    command("reconstruct", sheets.reconstruct, "image, masked, filled in by a MAE",
            "checkpoint mask-ratio norm-pix-loss seed data split files show",
            checkpoint=dict(default=["out/mae"], help="MAE runs or files with its decoder"))
    command("augment", sheets.augment, "the views of a dataset, as the training sees them",
            "seed img-size data split files show in-chans crop-min range")
    command("lr-grid", plots.lr_grid, "Figure 4: accuracy by the rates of three stages", "results")
    command("partial", plots.partial, "Figure 5: fine-tuning with the first blocks fixed",
            "results")
    command("depth", plots.depth, "Table 5: new blocks on frozen features", "results")
    command("curves", plots.curves, "loss, k-NN accuracy, rates, rank and speed of runs",
            "checkpoint", checkpoint=dict(help="folders of runs, or their log.jsonl"))
    args = parser.parse_args(argv)
    if hasattr(args, "data"):
        args.data = args.data or os.environ.get("DATA")
    run.check(parser, args, getattr(args, "checkpoint", []))
    if hasattr(args, "crop_min"):
        run.fill(args, dict(crop_min=0.08 if args.data else 0.2))
    return args


# ------------------------------------------------------------------------------ encoders, images
def load_encoders(args, device):
    """[(label, encoder in evaluation mode, mean and std of its images)] of --checkpoint, and the
    range of values of their images, of the first that has one."""
    sources = []
    for path in args.checkpoint:
        fine_tuned = os.path.join(path, "classifier.pt")
        alone = not os.path.exists(os.path.join(path, "encoder.pt")) and os.path.isfile(fine_tuned)
        sources.append(checkpoint.read_encoder(fine_tuned if alone else path, args.weights,
                                               args.heads, args.init_size))
        print("\n".join(checkpoint.report(sources[-1])), flush=True)
    if len({source["config"]["in_chans"] for source in sources}) > 1:
        raise UsageError("--checkpoint: these encoders take different numbers of channels, no "
                         "image fits them all")
    names = [source["meta"].get("system") for source in sources]
    found = []
    for label, source in zip(plots.labelled(args.checkpoint, names), sources):
        encoder = VisionTransformer(**source["config"])
        encoder.load_state_dict(source["state"])
        found.append((label, encoder.to(device).eval().requires_grad_(False),
                      {k: source["meta"].get(k) for k in ("mean", "std")}))
    ranges = [source["meta"].get("range") for source in sources]
    return found, next(filter(None, ranges), None)


def load_images(args, in_chans, value_range, most=None):
    """The dataset of --data, or a random subset of at most `most`: the same for the same --seed."""
    dataset = data.load(args.data, args.split == "train", in_chans, value_range=value_range)
    if most is None:
        return dataset
    return dataset.select(views.shuffled(len(dataset), args.seed, views.SUBSET)[:most])


# --------------------------------------------------------------------- gradients (Figures 1, 8)
def load_two_losses(path):
    """(model with MAE's and a contrastive loss on one encoder, what the file says) of a run."""
    path = checkpoint.in_folder(path, "last.pt")
    content = checkpoint.read(path)
    source = checkpoint.read_encoder(path)
    needed = {"MAE decoder": "decoder_embed.weight", "contrastive head": "head.0.weight"}
    lacking = [what for what, key in needed.items() if key not in source["rest"]]
    if lacking or "settings" not in content:
        raise UsageError(f"{path}: no {' and no '.join(lacking) or 'settings of a run'} in it. "
                         "Both losses on one encoder are needed: last.pt or epochNNNN.pt of an MTL "
                         f"run, as {run.MTL} writes them")
    settings = content["settings"]
    encoder = MaskedAutoencoder(**checkpoint.decoder_config(source), **source["config"])
    hidden, out = (source["rest"][f"head.{i}.weight"].shape[0] for i in (0, 6))
    if settings["loss"] == "vicreg":
        net = VICReg(encoder, hidden, out)
    else:
        kind = {"moco": MoCoV3, "simclr": SimCLR}[settings["loss"]]
        net = kind(encoder, hidden, out, settings["temperature"])
    net.load_state_dict(content["model"])
    return net, content


def block_gradients(loss, encoder):
    """For each block, the gradient of the loss by all its weights as one vector."""
    weights = [list(block.parameters()) for block in encoder.blocks]
    found = iter(torch.autograd.grad(loss, [w for block in weights for w in block]))
    return [torch.cat([next(found).flatten() for _ in block]) for block in weights]


def both_backward(encoder, mask_ratio, n):
    """What a backward pass keeps for n images, to find out how many fit the memory."""
    x = torch.zeros(n, encoder.config["in_chans"], *encoder.config["img_size"],
                    device=encoder.cls_token.device)
    sum(f.sum() for f in class_tokens(encoder, x, x)).backward()
    encoder(x, mask_ratio)[0].backward()
    encoder.zero_grad(set_to_none=True)


def gradient_rows(net, settings, loader, batches, micro_batch):
    """For each batch and block: cosine between the MAE and the contrastive gradient (equation 3),
    and their lengths. In training mode, as the run was: its BatchNorms use the batch. Each loss has
    its own backward pass, in float32."""
    encoder, rows = net.base_encoder, []
    net.train()
    for i, batch in enumerate(islice(chain.from_iterable(map(loader.epoch, count())), batches)):
        noise = batch.noise(encoder.grid[0] * encoder.grid[1])
        contrastive = block_gradients(net(batch.view(0), batch.view(1), micro_batch)[0], encoder)
        mim = mae_loss(encoder, batch.view(2), noise, settings["mask_ratio"], micro_batch)
        mae = block_gradients(mim, encoder)
        for block, (a, b) in enumerate(zip(mae, contrastive), start=1):
            rows.append(dict(batch=i, block=block, cosine=F.cosine_similarity(a, b, dim=0).item(),
                             mae_norm=a.norm().item(), contrastive_norm=b.norm().item()))
    return rows


def gradients(args):
    """Figures 1 and 8: per block, over batches, the cosine between the gradients of both losses."""
    env = run.setup(args)
    torch.backends.cuda.matmul.allow_tf32 = False       # small cosines: float32 throughout
    loaded, names, rows = [], [], []
    for path in args.checkpoint:
        loaded.append(load_two_losses(path))
        content = loaded[-1][1]
        system = content["meta"].get("system")
        names.append(f"{system}, epoch {content['epoch']}" if "epoch" in content else system)
    labels = plots.labelled(args.checkpoint, names)
    for label, path, (net, content) in zip(labels, args.checkpoint, loaded):
        settings, encoder = content["settings"], net.to(env.device).base_encoder
        dataset = load_images(args, encoder.config["in_chans"], content["meta"].get("range"))
        dataset.hold(env.device)
        size = args.batch_size or min(settings["batch_size"], len(dataset))
        if size > len(dataset):
            raise UsageError(f"--batch-size {size} is more than the {len(dataset)} images of "
                             f"{dataset.name}")
        specs = [view | dict(scale=(settings["crop_min"], 1.0)) for view in views.MOCO_VIEWS]
        loader = data.Loader(dataset, specs + [views.MAE_VIEW], encoder.config["img_size"], size,
                             args.seed, args.workers, env.device, mean=content["meta"]["mean"],
                             std=content["meta"]["std"])
        step = partial(both_backward, encoder, settings["mask_ratio"])
        fits = run.micro_batch(0, step, size, env)
        found = gradient_rows(net, settings, loader, args.batches, fits)
        epoch = content.get("epoch", "")
        rows += [dict(system=label, checkpoint=path, epoch=epoch) | row for row in found]
        net.cpu()
    plots.write_csv(os.path.join(args.out, "gradients.csv"), rows)
    summary = gradient_summary(rows)
    plots.write_csv(os.path.join(args.out, "gradients-summary.csv"), summary)
    plots.draw_gradients(os.path.join(args.out, "gradients.png"), rows, summary)
    return summary


def gradient_summary(rows):
    """Per system and block: quartiles of the cosine, share of negative ones, and the regression
    line of the medians."""
    summary = []
    for system, own in plots.by(rows, "system").items():
        blocks = plots.by(own, "block")
        cosines = [np.array(plots.column(of_block, "cosine")) for of_block in blocks.values()]
        medians = [np.median(c) for c in cosines]
        # of a single block the line is level
        slope, offset = np.polyfit(list(blocks), medians, 1) if len(blocks) > 1 else (0, *medians)
        for block, median, c in zip(blocks, medians, cosines):
            lower, upper = np.quantile(c, [0.25, 0.75])
            numbers = dict(median=median, lower_quartile=lower, upper_quartile=upper,
                           negative_share=(c < 0).mean(), line=offset + slope * block, slope=slope)
            summary.append(dict(system=system, block=block)
                           | {k: float(v) for k, v in numbers.items()})
    return summary


# ------------------------------------------------------------------------------- vic (Figure 6)
VIC = ("variance", "invariance", "covariance")


def block_means(encoder, images):
    """Images (N, C, H, W) -> (N, blocks, D): the tokens after each block, averaged."""
    return torch.stack([tokens.mean(1) for tokens in encoder.intermediate(images)], 1)


def vic_terms(x, y):
    """(variance, invariance, covariance) of one block's features x, y (N, D) of two views of N
    images (Figure 6).

    Features to unit length; invariance: VICReg's. Then centred and to unit length again: variance,
    the mean over features of sqrt(var + 1e-4), without VICReg's hinge; covariance, the sum of
    squared off-diagonal entries, not divided by D as VICReg does. Both are the mean of two views.
    """
    x, y = F.normalize(x, dim=1), F.normalize(y, dim=1)
    invariance, _, _ = vicreg_terms(x, y)
    x, y = (F.normalize(z - z.mean(0), dim=1) for z in (x, y))
    _, _, covariance = vicreg_terms(x, y)
    variance = sum((z.var(0) + 1e-4).sqrt().mean() for z in (x, y)) / 2
    return variance.item(), invariance.item(), covariance.item() * x.shape[1] / 2


@torch.no_grad()
def vic(args):
    """Figure 6: variance, invariance and covariance of the features after each block.

    In evaluation mode and over a shuffled subset: batches of one class each, as in the released
    code, bias variance and covariance.
    """
    env = run.setup(args)
    encoders, limits = load_encoders(args, env.device)
    in_chans = encoders[0][1].config["in_chans"]
    dataset = load_images(args, in_chans, limits, args.images).hold(env.device)
    specs = [view | dict(scale=(args.crop_min, 1.0)) for view in views.MOCO_VIEWS]
    rows = []
    for label, encoder, stats in encoders:
        loader = data.Loader(dataset, specs, encoder.config["img_size"], args.batch_size, args.seed,
                             args.workers, env.device, shuffle=False, **stats)
        means = [[block_means(encoder, batch.view(k))[batch.readable] for k in (0, 1)]
                 for batch in loader.epoch(0)]
        x, y = (torch.cat(view) for view in zip(*means))            # (N, blocks, D) each
        for block in range(encoder.depth):
            terms = zip(VIC, vic_terms(x[:, block], y[:, block]))
            rows.append(dict(system=label, block=block + 1) | dict(terms))
    plots.write_csv(os.path.join(args.out, "vic.csv"), rows)
    parts = [(term, rows, term) for term in VIC]
    plots.draw_lines(os.path.join(args.out, "vic.png"), parts, "block", "block")
    return rows


# ------------------------------------------------------------------------- attention (Figure 7)
def patch_distances(grid, patch_size):
    """(L, L): distances in pixels between the centres of the patches of a grid (h, w)."""
    y, x = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    place = torch.stack([y, x], -1).reshape(-1, 2).float() * patch_size
    return (place[:, None] - place).square().sum(-1).sqrt()


def attention_distances(weights, distance):
    """weights (N, h, T, T) of one block, distance (L, L) -> (N, h, 3), each a mean over the patches
    as queries: attention-weighted distance to the patches, the class token left out; the same with
    the rows renormalised without the class token (Dosovitskiy et al., 2021, appendix D.7); the
    share of attention that the class token gets."""
    patches = weights[:, :, 1:, 1:]
    raw = torch.einsum("nhij,ij->nhi", patches, distance)
    renormalised = raw / patches.sum(-1).clamp_min(1e-12)
    return torch.stack([raw.mean(-1), renormalised.mean(-1), weights[:, :, 1:, 0].mean(-1)], -1)


@torch.no_grad()
def attention(args):
    """Figure 7: mean attention distance in pixels, per block and head; and where the class token
    looks in images."""
    env = run.setup(args)
    encoders, limits = load_encoders(args, env.device)
    least = min(encoder.depth for _, encoder, _ in encoders)
    if args.block and args.block > least:
        raise UsageError(f"--block {args.block}: the encoder has {least} blocks")
    in_chans = encoders[0][1].config["in_chans"]
    shown = sheets.shown_images(args, in_chans, limits)
    dataset = load_images(args, in_chans, limits, args.images).hold(env.device)
    rows = []
    for label, encoder, stats in encoders:
        distance = patch_distances(encoder.grid, encoder.patch_size).to(env.device)

        def measured(net, images, distance=distance):
            weights = net.intermediate(images, attention=True)[1]
            return torch.stack([attention_distances(w, distance) for w in weights], 1)

        found, readable = run.extract(encoder, dataset, env, args.batch_size, args.workers,
                                      function=measured, what="attention", **stats)
        found = found.cpu()[readable].mean(0)                       # (blocks, h, 3)
        for block, head in np.ndindex(*found.shape[:2]):
            numbers = zip(("raw", "renormalised", "class_token_share"), found[block, head].tolist())
            rows.append(dict(system=label, block=block + 1, head=head + 1) | dict(numbers)
                        | dict(uniform=distance.mean().item()))
    plots.write_csv(os.path.join(args.out, "attention.csv"), rows)
    plots.draw_distances(os.path.join(args.out, "attention.png"), rows)
    for label, encoder, stats in encoders:
        path = os.path.join(args.out, f"attention-maps-{plots.slug(label)}")
        sheets.class_token_maps(path, label, encoder, stats, shown, args.block or encoder.depth,
                                env.device)
    return rows


# ------------------------------------------------------------------------------ tsne (Figure 3)
def tsne(args):
    """Figure 3: t-SNE of the class token of the same images of some classes for each encoder."""
    env = run.setup(args)
    encoders, limits = load_encoders(args, env.device)
    dataset = load_images(args, encoders[0][1].config["in_chans"], limits)
    if dataset.labels is None:
        raise UsageError(f"{dataset.name}: no labels, and t-SNE is coloured by class (one folder "
                         "a class)")
    classes = dataset.classes[:args.classes]
    order = views.shuffled(len(dataset), args.seed, views.SUBSET)
    ids = [order[dataset.labels[order] == c][:args.per_class] for c in range(len(classes))]
    dataset = dataset.select(torch.cat(ids)).hold(env.device)
    rows, points = [], []
    for label, encoder, stats in encoders:
        x, readable = run.extract(encoder, dataset, env, args.batch_size, args.workers, **stats)
        x, kept = x.cpu()[readable].numpy(), readable.nonzero()[:, 0].tolist()
        labels, files = dataset.labels[kept].numpy(), [dataset.file(i) for i in kept]
        plots.write_npz(os.path.join(args.out, f"tsne-{plots.slug(label)}.npz"), features=x,
                        labels=labels, classes=np.array(classes), files=np.array(files))
        try:
            from sklearn.manifold import TSNE
        except ImportError:
            print("no t-SNE without scikit-learn: pip install scikit-learn", flush=True)
            continue
        perplexity = min(30.0, (len(x) - 1) / 3)        # it must be less than the number of points
        flat = TSNE(init="pca", perplexity=perplexity, random_state=args.seed).fit_transform(x)
        points.append((label, flat, labels))
        rows += [{"system": label, "file": file, "class": classes[c], "x": float(p[0]),
                  "y": float(p[1])} for file, c, p in zip(files, labels, flat)]
    if rows:
        plots.write_csv(os.path.join(args.out, "tsne.csv"), rows)
        plots.draw_tsne(os.path.join(args.out, "tsne.png"), points, classes)
    return rows


def main(args):
    return args.function(args)


if __name__ == "__main__":
    run.program(main, get_args)
