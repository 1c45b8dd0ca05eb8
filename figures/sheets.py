"""Sheets of images: MAE reconstructions, the views of a dataset, where the class token looks.

Called by analyze.py, which holds the command line. The pixels are written first (.npz), then the
sheet (.png).
"""
import os

import numpy as np
import torch

import augment as views
import checkpoint
import data
from figures import plots
from model import MaskedAutoencoder, patchify, unpatchify
from run import UsageError


# -------------------------------------------------------------------------------- images and sheets
def shown_images(args, in_chans, value_range=None):
    """The images of --files, or --show of the dataset."""
    if not args.files:
        dataset = data.load(args.data, args.split == "train", in_chans, value_range=value_range)
        return dataset.select(views.shuffled(len(dataset), args.seed, views.SUBSET)[:args.show])
    files = []
    for path in args.files:
        inside = data.list_files(path) if os.path.isdir(path) else None
        files += [path] if inside is None else [os.path.join(path, name) for name in inside]
    if not files:
        raise UsageError(f"--files {' '.join(args.files)}: no images found there")
    dataset = data.Dataset(data.FileSource("", files), in_chans=in_chans, name="--files")
    dataset.range = data.find_range(dataset, value_range)
    for i, path in enumerate(files):                    # a loader would leave it out
        try:
            dataset.read(i)
        except ValueError as error:
            raise UsageError(f"--files {path}: not an image that can be read ({error})") from None
    return dataset


def batch_of(dataset, specs, size, seed=0, epoch=0, mean=None, std=None, device="cpu"):
    """All the given images in their order as one batch with a view for each spec, and its loader,
    which undoes the normalisation."""
    loader = data.Loader(dataset, specs, size, len(dataset), seed, 0, device, shuffle=False,
                         mean=mean, std=std)
    return next(iter(loader.epoch(epoch))), loader


def to_pixels(x, loader):
    """Normalised (N, C, H, W) -> uint8 (N, H, W, C)."""
    x = (x * loader.std + loader.mean).clamp(0, 1)
    return (x * 255 + 0.5).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


@plots.saved
def sheet(cells, rows=None, columns=None, title=None):
    """Images in rows and columns: cells[i][j] is uint8 (H, W, C), or a map (H, W) scaled to its own
    largest value."""
    side = max(cells[0][0].shape[:2])
    height, width = (0.85 * n / side + 0.04 for n in cells[0][0].shape[:2])
    above = 0.06 + 0.25 * bool(columns) + 0.18 * len((title or "").splitlines())
    drawn, axes = plots.figure(len(cells), len(cells[0]), 0.3 + width * len(cells[0]),
                               above + height * len(cells))
    drawn.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0, hspace=0)
    for (i, j), axis in np.ndenumerate(axes):
        content = cells[i][j]
        if content.ndim == 3 and content.shape[2] == 1:
            content = content[..., 0]
        pixels = content.dtype == np.uint8
        axis.imshow(content, cmap="gray" if pixels else plots.MAP, vmin=0,
                    vmax=255 if pixels else None)
        axis.set(xticks=[], yticks=[])
        axis.grid(False)
        axis.spines[:].set_visible(False)
        if rows and j == 0:
            axis.set_ylabel(rows[i], fontsize=8)
        if columns and i == 0:
            axis.set_title(columns[j], fontsize=8, pad=3)
    if title:
        drawn.suptitle(title, fontsize=8)
    return drawn


# --------------------------------------------------------------------- attention of the class token
def class_token_maps(path, label, encoder, stats, shown, block, device):
    """What the class token attends to in each image: mean of the heads, and each head."""
    batch, loader = batch_of(shown, [views.TEST_VIEW], encoder.config["img_size"], device=device,
                             **stats)
    images = batch.view(0)
    weights = encoder.intermediate(images, [block], attention=True)[1][-1]
    maps = weights[:, :, 0, 1:].unflatten(2, encoder.grid).cpu().numpy()    # (N, h, *grid)
    pixels = to_pixels(images, loader)
    files = np.array([shown.file(i) for i in range(len(shown))])
    plots.write_npz(path + ".npz", maps=maps, images=pixels, files=files, block=block)
    columns = ["image", "mean", *(f"head {head + 1}" for head in range(maps.shape[1]))]
    sheet(path + ".png", [[x, own.mean(0), *own] for x, own in zip(pixels, maps)], columns=columns,
          title=f"{label}: attention of the class token, block {block}\n"
          "(each map scaled to its own largest value)")


# -------------------------------------------------------------------------------------- reconstruct
def load_autoencoder(path, norm_pix_loss=None):
    """(MaskedAutoencoder in evaluation mode, what its file says of itself): sizes from the file."""
    source = checkpoint.read_encoder(checkpoint.in_folder(path, "last.pt"))
    if "decoder_embed.weight" not in source["rest"]:
        raise UsageError(f"{source['path']}: no MAE decoder in it. Needed: the last.pt of "
                         "mae_pretrain.py (encoder.pt holds the encoder alone), or a file with "
                         "decoder_*, such as mae_visualize_vit_*.pth")
    net = MaskedAutoencoder(**checkpoint.decoder_config(source, norm_pix_loss), **source["config"])
    decoder = {k: v for k, v in source["rest"].items()
               if k == "mask_token" or k.startswith("decoder_")}
    try:
        net.load_state_dict(source["state"] | decoder)
    except RuntimeError as error:
        why = str(error).splitlines()[1].strip()
        raise UsageError(f"{source['path']}: not a decoder that can be rebuilt ({why})") from None
    return net.eval(), source


@torch.no_grad()
def filled_in(net, images, mask_ratio, noise):
    """images (N, C, H, W) and noise (N, L), which decides what is kept -> dict of (N, C, H, W), and
    mask (N, L).

    masked: removed patches 0, the dataset's mean colour; reconstruction: all that the decoder says;
    pasted: its masked patches, the visible ones as they are. Where the targets were normalised by
    patch, the decoder says nothing about a patch's own mean and deviation: they are the image's.
    """
    _, predicted, mask = net(images, mask_ratio, noise)
    patches = patchify(images, net.patch_size)
    if net.norm_pix_loss:
        deviation = (patches.var(-1, keepdim=True) + 1e-6).sqrt()
        predicted = predicted * deviation + patches.mean(-1, keepdim=True)
    removed = mask[..., None] == 1
    found = dict(original=patches, masked=patches.masked_fill(removed, 0.0),
                 reconstruction=predicted, pasted=torch.where(removed, predicted, patches))
    found = {k: unpatchify(v, net.patch_size, net.grid) for k, v in found.items()}
    return found | dict(mask=mask)


def reconstruct(args):
    """Images, their visible patches, the decoder's reconstruction, and the two put together."""
    loaded = [load_autoencoder(path, args.norm_pix_loss) for path in args.checkpoint]
    names = [source["meta"].get("system") for _, source in loaded]
    for label, (net, source) in zip(plots.labelled(args.checkpoint, names), loaded):
        print("\n".join(checkpoint.report(source)), flush=True)
        if args.norm_pix_loss is None and source["layout"] != "ours":
            print(f"{source['path']}: taken as trained on plain pixels (--norm-pix-loss if it was "
                  "not)", flush=True)
        dataset = shown_images(args, net.config["in_chans"], source["meta"].get("range"))
        stats = {k: source["meta"].get(k) for k in ("mean", "std")}
        batch, loader = batch_of(dataset, [views.TEST_VIEW], net.config["img_size"], args.seed,
                                 **stats)
        noise = batch.noise(net.grid[0] * net.grid[1])
        found = filled_in(net, batch.view(0), args.mask_ratio, noise)
        mask = found.pop("mask").numpy()
        pixels = {k: to_pixels(v, loader) for k, v in found.items()}
        files = np.array([dataset.file(i) for i in range(len(dataset))])
        name = os.path.join(args.out, f"reconstruct-{plots.slug(label)}")
        plots.write_npz(name + ".npz", **pixels, mask=mask.astype(np.uint8), files=files)
        title = f"{label}: {100 * mask.mean():.0f}% of the patches removed"
        if net.norm_pix_loss:
            title += "\nMean and deviation of each patch are borrowed from the image"
        rows = ["image", "masked", "reconstruction", "visible\npasted in"]
        sheet(name + ".png", list(pixels.values()), rows, title=title)


# ------------------------------------------------------------------------------------------ augment
def augment(args):
    """A sheet of images, MAE's view of them and the two contrastive views, twice, as the training
    draws them."""
    size = args.img_size or ([224, 224] if args.data or args.files else [32, 32])
    dataset = shown_images(args, args.in_chans, args.range)
    specs = [view | dict(scale=(args.crop_min, 1.0)) for view in views.MOCO_VIEWS]
    specs += [views.MAE_VIEW, views.TEST_VIEW]
    arrays = {}
    for epoch in (0, 1):
        batch, loader = batch_of(dataset, specs, size, args.seed, epoch)
        view1, view2, mae, image = (to_pixels(batch.view(k), loader) for k in range(4))
        if epoch == 0:
            arrays |= dict(image=image, mae=mae)
        arrays |= {f"view1_{epoch}": view1, f"view2_{epoch}": view2}
    files = np.array([dataset.file(i) for i in range(len(dataset))])
    plots.write_npz(os.path.join(args.out, "augment.npz"), **arrays, files=files)
    sheet(os.path.join(args.out, "augment.png"), list(arrays.values()),
          ["image", "MAE", *["view 1", "view 2"] * 2])
