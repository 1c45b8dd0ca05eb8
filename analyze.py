"""The paper's analyses, as numbers (CSV or npz) and as pictures (with matplotlib: pip install matplotlib).

    python analyze.py gradients --checkpoint out/mtl            # Figures 1 and 8: do the two losses' gradients agree?
    python analyze.py vic --checkpoint out/mae out/graft        # Figure 6: variance, invariance, covariance by block
    python analyze.py attention                                 # Figure 7: attention distance; maps of the class token
    python analyze.py tsne                                      # Figure 3: features of some classes (scikit-learn)
    python analyze.py reconstruct --checkpoint mae_visualize_vit_large.pth --pictures PICTURES
    python analyze.py augment --data IMAGENET                   # the two views, as the training sees them
    python analyze.py lr-grid|partial|depth --results out/demo  # Figures 4 and 5, Table 5, from results.jsonl
    python analyze.py curves --runs out/mae out/graft           # from log.jsonl

Everything goes into --out (out/analysis), the numbers first. Several checkpoints stand side by side. What reads results
and logs is in plots.py, reconstruct and augment in sheets.py; each analysis here: what is computed, then the command.
With the demonstration's models, on one core of an AMD EPYC: gradients 1 minute, vic and tsne 15 to 20 seconds, the
others under 10. Measured on a CPU only.
"""
import os
from functools import partial
from itertools import chain, count, islice

import numpy as np
import torch
import torch.nn.functional as F

import augment as views
import checkpoint
import data
import plots
import run
import sheets
from data import UsageError
from features import extract
from model import MaskedAutoencoder, MoCoV3, SimCLR, VICReg, VisionTransformer, class_tokens, vicreg_terms
from run import number


# ------------------------------------------------------------------------------------------------------- options
def get_args(argv=None):
    parser = run.Parser(description=__doc__.split("\n")[0], allow_abbrev=False)
    commands = parser.add_subparsers(dest="analysis", required=True, metavar="ANALYSIS")

    def command(name, function, help):
        sub = commands.add_parser(name, help=help, description=function.__doc__.split("\n")[0], allow_abbrev=False)
        sub.set_defaults(function=function)
        sub.add_argument("--out", default="out/analysis", help="folder for numbers and pictures")
        return sub.add_argument

    def of_data(add):
        add("--data", help="folder of pictures, list file, cifar10 or cifar100 (default: $DATA, else an embedded set)")
        add("--split", choices=("train", "test"), default="train", help="which pictures of it")
        add("--workers", type=number(int, 0, 256), default=min(os.cpu_count(), 10), help="reading processes")
        add("--seed", type=number(int, 0, 2 ** 31), default=0, help="of the choice of pictures, crops and masks")

    def of_encoders(add, images, batch_size):
        add("--checkpoint", nargs="+", default=["out/mae", "out/graft"], help="folders of runs, or files --init reads")
        add("--device", default="auto", choices=("auto", "cpu", "cuda"))
        of_data(add)
        if images:
            add("--images", type=number(int, 2), default=images, help="pictures, a random subset")
        add("--batch-size", type=number(int, 1), default=batch_size, help="pictures at once: sets the memory only")

    def of_pictures(add, show):
        add("--pictures", nargs="+", help="picture files or folders to show (default: some of the data set)")
        add("--show", type=number(int, 1, 64), default=show, help="how many of the data set")

    add = command("gradients", gradients, "Figures 1 and 8: cosine between the two losses' gradients, per block")
    add("--checkpoint", nargs="+", default=["out/mtl"], help="MTL runs (their last.pt) or kept epochNNNN.pt of one")
    add("--batches", type=number(int, 2), default=32, help="batches: the values in each box")
    add("--batch-size", type=number(int, 2), help="pictures in a batch (default: as the run was trained)")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"))
    of_data(add)

    add = command("vic", vic, "Figure 6: variance, invariance and covariance of each block's features")
    of_encoders(add, 2048, 128)
    add("--crop-min", type=number(float, 0, 1, above=True), help="smallest crop of a view (default .08; embedded .2)")

    add = command("attention", attention, "Figure 7: attention distance per head; attention maps of the class token")
    of_encoders(add, 512, 32)
    of_pictures(add, 4)
    add("--block", type=number(int, 1), help="the maps' block (default: the last)")

    add = command("tsne", tsne, "Figure 3: t-SNE of the class tokens of some classes (needs scikit-learn)")
    of_encoders(add, 0, 256)
    add("--classes", type=number(int, 2, 40), default=10, help="the first K classes")
    add("--per-class", type=number(int, 2), default=100, help="pictures of each, the same for every checkpoint")

    add = command("reconstruct", sheets.reconstruct, "picture, masked, filled in by a masked autoencoder")
    add("--checkpoint", nargs="+", default=["out/mae"], help="MAE runs (their last.pt) or files with MAE's decoder")
    add("--mask-ratio", type=number(float, 0, 0.99, above=True), default=0.75, help="share of patches removed")
    add("--norm-pix-loss", action=run.argparse.BooleanOptionalAction, help="whether the decoder was trained on patches "
        "normalised one by one (default: as our files say; others: no, as mae_visualize_vit_*.pth)")
    of_data(add)
    of_pictures(add, 8)

    add = command("augment", sheets.augment, "the views of a data set, as the training sees them")
    of_data(add)
    of_pictures(add, 8)
    add("--img-size", type=run.image_size, help="224 or HEIGHTxWIDTH (default 224; embedded 32)")
    add("--in-chans", type=int, choices=(1, 3, 4), default=3, help="1 grey, 3 RGB, 4 RGBA")
    add("--crop-min", type=number(float, 0, 1, above=True), help="smallest crop of a view (default .08; embedded .2)")

    for name, function, help in (("lr-grid", plots.lr_grid, "Figure 4: accuracy by the rates of three stages"),
                                 ("partial", plots.partial, "Figure 5: fine-tuning with the first blocks fixed"),
                                 ("depth", plots.depth, "Table 5: new blocks on frozen features")):
        command(name, function, help)("--results", nargs="+", default=["out/demo"], help="results.jsonl, or folders")
    add = command("curves", plots.curves, "loss, k-NN accuracy, rates, rank and speed of runs")
    add("--runs", nargs="+", default=["out/mae", "out/graft"], help="runs' folders, or their log.jsonl")

    args = parser.parse_args(argv)
    if hasattr(args, "data"):
        args.data = args.data or os.environ.get("DATA")
    run.check(parser, args)
    if hasattr(args, "crop_min"):
        run.fill(args, dict(crop_min=0.08 if args.data else 0.2))
    for path in getattr(args, "checkpoint", []):
        if not os.path.exists(path):
            parser.error(f"no checkpoint {path}: {TRAIN_FIRST.get(path, 'no such file or folder')}")
    return args


MTL_COMMAND = "`python graft_train.py --mim-weight 1 --out out/mtl`"
TRAIN_FIRST = {"out/mae": "run `python mae_pretrain.py` first, or give --checkpoint",
               "out/graft": "run `python mae_pretrain.py` and `python graft_train.py` first, or give --checkpoint",
               "out/mtl": f"run `python mae_pretrain.py` and {MTL_COMMAND} first, or give --checkpoint"}


# --------------------------------------------------------------------------- encoders, pictures, sheets of pictures
def load_encoders(args, device):
    """[(label, encoder in evaluation mode, mean and std of its pictures)] of --checkpoint, in float32."""
    sources = []
    for path in args.checkpoint:
        fine_tuned = os.path.join(path, "classifier.pt")
        alone = os.path.isfile(fine_tuned) and not os.path.exists(os.path.join(path, "encoder.pt"))
        sources.append(checkpoint.read_encoder(fine_tuned if alone else path))
    if len({source["config"]["in_chans"] for source in sources}) > 1:
        raise UsageError("--checkpoint: these encoders take different numbers of channels, no picture fits them all")
    found = []
    for label, source in zip(plots.labelled(args.checkpoint, [s["meta"].get("system") for s in sources]), sources):
        encoder = VisionTransformer(**source["config"])
        encoder.load_state_dict(source["state"])
        found.append((label, encoder.to(device).eval().requires_grad_(False),
                      dict(mean=source["meta"].get("mean"), std=source["meta"].get("std"))))
    return found


def load_pictures(args, in_chans, most=None):
    """The data set of --data, or a random subset of at most `most`: the same for the same --seed."""
    pictures = data.load_data(args.data, args.split == "train", in_chans)
    if most is None:
        return pictures
    return pictures.select(views.shuffled(len(pictures), args.seed, views.SUBSET)[:most])


# ---------------------------------------------------------------------------------------- gradients (Figures 1, 8)
def load_two_losses(path):
    """(model with MAE's and a contrastive loss on one encoder, what the file says) of an MTL run's last.pt."""
    path = checkpoint.in_folder(path, "last.pt")
    content = checkpoint.read(path)
    source = checkpoint.read_encoder(path)
    lacking = [what for what, key in (("MAE decoder", "decoder_embed.weight"), ("contrastive head", "head.0.weight"))
               if key not in source["rest"]]
    if lacking or "settings" not in content:
        raise UsageError(f"{path}: no {' and no '.join(lacking) or 'settings of a run'} in it. Both losses on one "
                         f"encoder are needed: last.pt or epochNNNN.pt of an MTL run, as {MTL_COMMAND} writes them")
    settings = content["settings"]
    encoder = MaskedAutoencoder(**checkpoint.decoder_config(source), **source["config"])
    hidden, out = (source["rest"][f"head.{i}.weight"].shape[0] for i in (0, 6))
    if settings["loss"] == "vicreg":
        net = VICReg(encoder, hidden, out)
    else:
        net = {"moco": MoCoV3, "simclr": SimCLR}[settings["loss"]](encoder, hidden, out, settings["temperature"])
    net.load_state_dict(content["model"])
    return net, content


def block_gradients(loss, encoder):
    """One backward pass: for each block, the gradient of the loss by all its weights as one vector."""
    weights = [list(block.parameters()) for block in encoder.blocks]
    found = iter(torch.autograd.grad(loss, [w for block in weights for w in block]))
    return [torch.cat([next(found).flatten() for _ in block]) for block in weights]


def both_backward(encoder, mask_ratio, n):
    """What a backward pass keeps for n pictures, to find out how many fit the memory."""
    x = torch.zeros(n, encoder.config["in_chans"], *encoder.config["img_size"], device=encoder.cls_token.device)
    sum(f.sum() for f in class_tokens(encoder, x, x)).backward()
    encoder(x, mask_ratio)[0].backward()
    encoder.zero_grad(set_to_none=True)


def gradient_rows(net, settings, loader, batches, micro_batch):
    """For each batch and block: cosine between the MAE and the contrastive gradient (equation 3), and their lengths.

    In training mode, as the run was: its BatchNorms use the batch. Each loss has its own backward pass, in float32.
    """
    encoder, rows = net.base_encoder, []
    net.train()
    for i, batch in enumerate(islice(chain.from_iterable(map(loader.epoch, count())), batches)):    # epoch after epoch
        x1, x2, minimal = (view[:] if micro_batch >= len(batch) else view for view in batch.views)
        noise = batch.noise(encoder.grid[0] * encoder.grid[1])
        contrastive = block_gradients(net(x1, x2, micro_batch), encoder)
        mae = block_gradients(net.mim_loss(minimal, noise, settings["mask_ratio"], micro_batch), encoder)
        for block, (a, b) in enumerate(zip(mae, contrastive), start=1):
            rows.append(dict(batch=i, block=block, cosine=F.cosine_similarity(a, b, dim=0).item(),
                             mae_norm=a.norm().item(), contrastive_norm=b.norm().item()))
    return rows


def gradients(args):
    """Figures 1 and 8: per block, over batches, the cosine between the gradients of the MAE and contrastive losses."""
    device, _, _ = run.setup(args.device)
    torch.backends.cuda.matmul.allow_tf32 = False                           # small cosines: float32 throughout
    loaded = [load_two_losses(path) for path in args.checkpoint]
    names = [content["meta"].get("system") for _, content in loaded]
    names = [f"{name}, epoch {content['epoch']}" if "epoch" in content else name
             for name, (_, content) in zip(names, loaded)]
    rows = []
    for label, path, (net, content) in zip(plots.labelled(args.checkpoint, names), args.checkpoint, loaded):
        settings, meta, encoder = content["settings"], content["meta"], net.to(device).base_encoder
        pictures = load_pictures(args, encoder.config["in_chans"]).hold(device)
        size = args.batch_size or min(settings["batch_size"], len(pictures))
        specs = [view | dict(scale=(settings["crop_min"], 1.0)) for view in views.MOCO_VIEWS] + [views.MAE_VIEW]
        loader = data.Loader(pictures, specs, encoder.config["img_size"], size, args.seed, args.workers, device,
                             mean=meta["mean"], std=meta["std"])
        if len(loader) == 0:
            raise UsageError(f"--batch-size {size} is more than the {len(pictures)} pictures of {pictures.name}")
        fits = run.micro_batch(0, partial(both_backward, encoder, settings["mask_ratio"]), size, device, 1, ())
        epoch = content.get("epoch", "")
        found = gradient_rows(net, settings, loader, args.batches, fits)
        rows += [dict(system=label, checkpoint=path, epoch=epoch) | row for row in found]
        net.cpu()
    plots.write_csv(os.path.join(args.out, "gradients.csv"), rows)
    summary = gradient_summary(rows)
    plots.write_csv(os.path.join(args.out, "gradients-summary.csv"), summary)
    draw_gradients(os.path.join(args.out, "gradients.png"), rows, summary)
    return summary


def gradient_summary(rows):
    """Per system and block: quartiles of the cosine, share of negative ones, and the regression line of the medians."""
    summary = []
    for system in plots.unique(r["system"] for r in rows):
        own = [r for r in rows if r["system"] == system]
        blocks = sorted({r["block"] for r in own})
        cosines = [np.array([r["cosine"] for r in own if r["block"] == block]) for block in blocks]
        medians = [np.median(c) for c in cosines]
        slope, offset = np.polyfit(blocks, medians, 1) if len(blocks) > 1 else (0.0, medians[0])
        for block, median, c in zip(blocks, medians, cosines):
            lower, upper = np.quantile(c, [0.25, 0.75])
            numbers = dict(median=median, lower_quartile=lower, upper_quartile=upper, negative_share=(c < 0).mean(),
                           line=offset + slope * block, slope=slope)
            summary.append(dict(system=system, block=block) | {k: float(v) for k, v in numbers.items()})
    return summary


def draw_gradients(path, rows, summary):
    systems = plots.unique(r["system"] for r in rows)
    columns = plots.panel_columns(len(systems))
    lines = -(-len(systems) // columns)
    depth = max(r["block"] for r in rows)
    picture, axes = plots.figure(2 * lines, columns, 0.5 + max(3.0, 0.32 * depth) * columns, 3.5 * lines,
                                 height_ratios=[3, 1] * lines, sharey="row")
    if picture is None:
        return
    for axis in axes.flat:
        axis.set_visible(False)
    for i, system in enumerate(systems):
        boxes, bars = (axes[2 * (i // columns) + k, i % columns] for k in (0, 1))
        own = [s for s in summary if s["system"] == system]
        blocks = [s["block"] for s in own]
        values = [[r["cosine"] for r in rows if r["system"] == system and r["block"] == block] for block in blocks]
        boxes.boxplot(values, positions=blocks, widths=0.6, patch_artist=True, flierprops=dict(markersize=2.5),
                      boxprops=dict(facecolor="#cfe6f5", edgecolor=plots.COLOURS[0]),
                      medianprops=dict(color=plots.COLOURS[0], linewidth=1.8))
        boxes.plot(blocks, [s["line"] for s in own], "--", color=plots.COLOURS[1],
                   label=f"line through the medians: {own[0]['slope']:+.3f} per block")
        boxes.axhline(0, color="black", linewidth=0.8)
        boxes.set(title=system, xticks=blocks, xticklabels=[])
        boxes.legend(loc="upper center", bbox_to_anchor=(0.5, 0.0), fontsize=7, borderaxespad=0.4)
        bars.bar(blocks, [100 * s["negative_share"] for s in own], width=0.6, color=plots.COLOURS[1])
        bars.set(ylim=(0, 100), xlabel="block", xticks=blocks, xlim=boxes.get_xlim())
        for axis in (boxes, bars):
            axis.set_visible(True)
        if i % columns == 0:
            boxes.set_ylabel("cosine of the two gradients")
            bars.set_ylabel("negative\n(%)")
    plots.save(picture, path)


# -------------------------------------------------------------------------------------------------- vic (Figure 6)
def block_means(encoder, images):
    """Images (N, C, H, W) -> (N, blocks, D): the tokens after each block, averaged over all of them."""
    return torch.stack([tokens.mean(1) for tokens in encoder.intermediate(images)], 1)


def vic_terms(x, y):
    """(variance, invariance, covariance) of one block's features x, y (N, D) of two views of N pictures (Figure 6).

    Features to unit length; invariance: VICReg's. Then centred and to unit length again: variance, the mean over
    features of sqrt(var + 1e-4), without VICReg's hinge; covariance, the sum of squared off-diagonal entries, not
    divided by D as VICReg does. Both are the mean of the two views.
    """
    x, y = F.normalize(x, dim=1), F.normalize(y, dim=1)
    invariance, _, _ = vicreg_terms(x, y)
    x, y = (F.normalize(z - z.mean(0), dim=1) for z in (x, y))
    _, _, covariance = vicreg_terms(x, y)
    variance = sum((z.var(0) + 1e-4).sqrt().mean() for z in (x, y)) / 2
    return variance.item(), invariance.item(), covariance.item() * x.shape[1] / 2


@torch.no_grad()
def vic(args):
    """Figure 6: variance, invariance and covariance of the features after each block, in evaluation mode.

    Over a shuffled subset: batches of one class each, as in the released code, bias variance and covariance.
    """
    device, _, _ = run.setup(args.device)
    encoders = load_encoders(args, device)
    pictures = load_pictures(args, encoders[0][1].config["in_chans"], args.images).hold(device)
    specs = [view | dict(scale=(args.crop_min, 1.0)) for view in views.MOCO_VIEWS]
    rows = []
    for label, encoder, stats in encoders:
        loader = data.Loader(pictures, specs, encoder.config["img_size"], args.batch_size, args.seed, args.workers,
                             device, shuffle=False, **stats)
        means = [[block_means(encoder, view[:]) for view in batch.views] for batch in loader.epoch(0)]
        x, y = (torch.cat(view) for view in zip(*means))                    # (N, blocks, D) each
        for block in range(encoder.depth):
            terms = zip(("variance", "invariance", "covariance"), vic_terms(x[:, block], y[:, block]))
            rows.append(dict(system=label, block=block + 1) | dict(terms))
    plots.write_csv(os.path.join(args.out, "vic.csv"), rows)
    picture, axes = plots.figure(1, 3, 7.6, 2.8)
    if picture is None:
        return rows
    for axis, term in zip(axes[0], ("variance", "invariance", "covariance")):
        for i, (label, _, _) in enumerate(encoders):
            own = [r for r in rows if r["system"] == label]
            axis.plot([r["block"] for r in own], [r[term] for r in own], label=label, **plots.look(i))
        axis.set(title=term, xlabel="block")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.ticklabel_format(axis="y", scilimits=(-3, 3), useMathText=True, useOffset=False)
    plots.legend(picture, axes)
    plots.save(picture, os.path.join(args.out, "vic.png"))
    return rows


# -------------------------------------------------------------------------------------------- attention (Figure 7)
def patch_distances(grid, patch_size):
    """(L, L): distances in pixels between the centres of the patches of a grid (h, w)."""
    y, x = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    place = torch.stack([y, x], -1).reshape(-1, 2).float() * patch_size
    return (place[:, None] - place).square().sum(-1).sqrt()


def attention_distances(weights, distance):
    """weights (N, h, T, T) of one block, distance (L, L) -> (N, h, 3), each a mean over the patches as queries:

    attention-weighted distance to the patches, the class token left out; the same with the rows renormalised without
    the class token (Dosovitskiy et al., 2021, appendix D.7); the share of attention that the class token gets.
    """
    patches = weights[:, :, 1:, 1:]
    raw = torch.einsum("nhij,ij->nhi", patches, distance)
    renormalised = raw / patches.sum(-1).clamp_min(1e-12)
    return torch.stack([raw.mean(-1), renormalised.mean(-1), weights[:, :, 1:, 0].mean(-1)], -1)


@torch.no_grad()
def attention(args):
    """Figure 7: mean attention distance in pixels, per block and head; and where the class token looks in pictures."""
    device, _, _ = run.setup(args.device)
    encoders = load_encoders(args, device)
    depths = [encoder.depth for _, encoder, _ in encoders]
    if args.block and args.block > min(depths):
        raise UsageError(f"--block {args.block}: the encoder has {min(depths)} blocks")
    in_chans = encoders[0][1].config["in_chans"]
    shown = sheets.shown_pictures(args, in_chans)
    pictures = load_pictures(args, in_chans, args.images).hold(device)
    rows = []
    for label, encoder, stats in encoders:
        distance = patch_distances(encoder.grid, encoder.patch_size).to(device)

        def measured(net, images, distance=distance):
            weights = net.intermediate(images, attention=True)[1]
            return torch.stack([attention_distances(w, distance) for w in weights], 1)      # (n, blocks, h, 3)

        found = extract(encoder, pictures, device, None, args.batch_size, args.workers, function=measured, **stats)
        for block, head in np.ndindex(*found.shape[1:3]):
            raw, renormalised, on_class = found[:, block, head].mean(0).tolist()
            rows.append(dict(system=label, block=block + 1, head=head + 1, raw=raw, renormalised=renormalised,
                             class_token_share=on_class, uniform=distance.mean().item()))
    plots.write_csv(os.path.join(args.out, "attention.csv"), rows)
    draw_distances(os.path.join(args.out, "attention.png"), rows)
    for label, encoder, stats in encoders:
        path = os.path.join(args.out, f"attention-maps-{plots.slug(label)}")
        sheets.class_token_maps(path, label, encoder, stats, shown, args.block or encoder.depth, device)
    return rows


def draw_distances(path, rows):
    systems = plots.unique(r["system"] for r in rows)
    depth = max(r["block"] for r in rows)
    kinds = {"raw": "raw", "renormalised": "without the class token,\nrows renormalised"}
    picture, axes = plots.figure(2, len(systems), 0.8 + max(2.3, 0.24 * depth) * len(systems), 4.8, sharey=True,
                                 sharex="col")
    if picture is None:
        return
    for (line, (kind, words)) in zip(axes, kinds.items()):
        for i, (axis, system) in enumerate(zip(line, systems)):
            own = [r for r in rows if r["system"] == system]
            blocks = sorted({r["block"] for r in own})
            means = [np.mean([r[kind] for r in own if r["block"] == block]) for block in blocks]
            axis.plot([r["block"] for r in own], [r[kind] for r in own], "o", color=plots.COLOURS[0], markersize=4,
                      alpha=0.6, markeredgewidth=0, label=None if i else "one head")
            axis.plot(blocks, means, "-", color=plots.COLOURS[1], label=None if i else "mean of the heads")
            axis.axhline(own[0]["uniform"], color=plots.GREY, linestyle=":",
                         label=None if i else "uniform over the patches")
            axis.set_xticks(blocks)
            axis.set(title=system if kind == "raw" else "", xlabel="" if kind == "raw" else "block")
        line[0].set_ylabel(f"mean distance (pixels),\n{words}")
    plots.legend(picture, axes)
    plots.save(picture, path)


# ------------------------------------------------------------------------------------------------- tsne (Figure 3)
def tsne(args):
    """Figure 3: t-SNE of the class token of the same pictures of some classes for each encoder."""
    device, _, _ = run.setup(args.device)
    encoders = load_encoders(args, device)
    everything = load_pictures(args, encoders[0][1].config["in_chans"])
    if everything.labels is None:
        raise UsageError(f"{everything.name}: no labels, and t-SNE is coloured by class (one folder a class)")
    classes = everything.classes[:args.classes]
    order = views.shuffled(len(everything), args.seed, views.SUBSET)
    ids = torch.cat([order[everything.labels[order] == c][:args.per_class] for c in range(len(classes))])
    pictures = everything.select(ids).hold(device)
    labels, files = pictures.labels.numpy(), [pictures.file(i) for i in range(len(pictures))]
    found = [extract(encoder, pictures, device, None, args.batch_size, args.workers, **stats).cpu().numpy()
             for _, encoder, stats in encoders]
    for (label, _, _), x in zip(encoders, found):
        plots.write_npz(os.path.join(args.out, f"tsne-{plots.slug(label)}.npz"), features=x, labels=labels,
                        classes=np.array(classes), files=np.array(files))
    try:
        from sklearn.manifold import TSNE
    except ImportError:
        print("no t-SNE without scikit-learn: pip install scikit-learn", flush=True)
        return []
    rows, points = [], []
    for (label, _, _), x in zip(encoders, found):
        perplexity = min(30.0, (len(x) - 1) / 3)                            # it must be less than the number of points
        flat = TSNE(init="pca", perplexity=perplexity, random_state=args.seed).fit_transform(x)
        points.append(flat)
        rows += [{"system": label, "file": file, "class": classes[c], "x": float(p[0]), "y": float(p[1])}
                 for file, c, p in zip(files, labels, flat)]
    plots.write_csv(os.path.join(args.out, "tsne.csv"), rows)
    columns = plots.panel_columns(len(encoders))
    lines = -(-len(encoders) // columns)
    picture, axes = plots.figure(lines, columns, 2.8 * columns, 0.2 + 0.18 * -(-len(classes) // 5) + 2.7 * lines)
    if picture is None:
        return rows
    for axis in axes.flat[len(encoders):]:
        axis.set_axis_off()
    for axis, (label, _, _), flat in zip(axes.flat, encoders, points):
        for c, name in enumerate(classes):
            # 7 colours and 6 markers: 40 classes all differ
            axis.plot(*flat[labels == c].T, plots.MARKERS[c % 6], color=plots.COLOURS[c % 7], label=name, markersize=3,
                      markeredgewidth=0, alpha=0.8)
        axis.set(title=label, xticks=[], yticks=[])
        axis.spines[:].set_visible(True)
        axis.grid(False)
    plots.legend(picture, axes, markerscale=1.6)
    plots.save(picture, os.path.join(args.out, "tsne.png"))
    return rows


def main(args):
    return args.function(args)


if __name__ == "__main__":
    run.program(main, get_args)
