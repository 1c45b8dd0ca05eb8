"""Sheets of pictures: MAE reconstructions, the views of a data set, where the class token looks.

Called by analyze.py, which holds the command line. The pixels are written first (.npz), then the sheet (.png).
"""
import os

import numpy as np
import torch

import augment as views
import checkpoint
import data
import plots
from data import UsageError
from model import MaskedAutoencoder, patchify, unpatchify


# ------------------------------------------------------------------------------------------ pictures and sheets
def shown_pictures(args, in_chans):
    """The pictures of --pictures, or --show of the data set."""
    if not args.pictures:
        pictures = data.load_data(args.data, args.split == "train", in_chans)
        return pictures.select(views.shuffled(len(pictures), args.seed, views.SUBSET)[:args.show])
    files = []
    for path in args.pictures:
        files += [os.path.join(path, name) for name in data.list_files(path)] if os.path.isdir(path) else [path]
    pictures = data.Pictures(files, "", in_chans=in_chans, name="--pictures")
    for i, path in enumerate(files):                                        # a loader would show another in its place
        try:
            pictures.read(i)
        except (OSError, ValueError, SyntaxError) as error:
            raise UsageError(f"--pictures {path}: not a picture that can be read ({error})") from None
    if not files:
        raise UsageError(f"--pictures {' '.join(args.pictures)}: no pictures found there")
    return pictures


def batch_of(pictures, specs, size, seed=0, epoch=0, mean=None, std=None, device="cpu"):
    """All the given pictures in their order as one batch with a view for each spec, and the loader that undoes it."""
    loader = data.Loader(pictures, specs, size, len(pictures), seed, 0, device, shuffle=False, mean=mean, std=std)
    return next(iter(loader.epoch(epoch))), loader


def to_pixels(x, loader):
    """Normalised (N, C, H, W) -> uint8 (N, H, W, C)."""
    x = (x * loader.std + loader.mean).clamp(0, 1)
    return (x * 255 + 0.5).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def sheet(path, cells, rows=None, columns=None, title=None, cell=0.85):
    """Pictures in rows and columns: cells[i][j] is uint8 (H, W, C) or a map (H, W) scaled to its own largest value."""
    side = max(cells[0][0].shape[:2])
    height, width = (cell * n / side for n in cells[0][0].shape[:2])
    picture, axes = plots.figure(len(cells), len(cells[0]), 0.3 + (width + 0.04) * len(cells[0]),
                                 0.25 * bool(columns) + 0.18 * len((title or "").splitlines()) + 0.06 +
                                 (height + 0.04) * len(cells))
    if picture is None:
        return
    picture.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0, hspace=0)
    for i, line in enumerate(cells):
        for j, content in enumerate(line):
            axis = axes[i, j]
            content = content[..., 0] if content.ndim == 3 and content.shape[2] == 1 else content
            if content.dtype == np.uint8:
                axis.imshow(content, cmap="gray", vmin=0, vmax=255)
            else:
                axis.imshow(content, cmap=plots.MAP, vmin=0)
            axis.set_xticks([])
            axis.set_yticks([])
            axis.grid(False)
            axis.spines[:].set_visible(False)
            if rows and j == 0:
                axis.set_ylabel(rows[i], fontsize=8)
            if columns and i == 0:
                axis.set_title(columns[j], fontsize=8, pad=3)
    if title:
        picture.suptitle(title, fontsize=8)
    plots.save(picture, path)


# ---------------------------------------------------------------------------------- attention of the class token
def class_token_maps(path, label, encoder, stats, shown, block, device):
    """What the class token attends to in each picture: mean of the heads, and each head; .npz and .png."""
    batch, loader = batch_of(shown, [views.TEST_VIEW], encoder.config["img_size"], device=device, **stats)
    images = batch.views[0][:]
    weights = encoder.intermediate(images, [block], attention=True)[1][-1]
    maps = weights[:, :, 0, 1:].unflatten(2, encoder.grid).cpu().numpy()     # (N, h, grid height, grid width)
    pixels = to_pixels(images, loader)
    files = [shown.file(i) for i in range(len(shown))]
    plots.write_npz(path + ".npz", maps=maps, pictures=pixels, files=np.array(files), block=block)
    heads = maps.shape[1]
    sheet(path + ".png", [[pixels[n], maps[n].mean(0), *maps[n]] for n in range(len(pixels))],
          columns=["picture", "mean", *(f"head {h + 1}" for h in range(heads))],
          title=f"{label}: attention of the class token, block {block}\n(each map scaled to its own largest value)")


# ----------------------------------------------------------------------------------------------------- reconstruct
def load_autoencoder(path, norm_pix_loss=None):
    """(MaskedAutoencoder in evaluation mode, what its file says of itself): sizes from the file."""
    source = checkpoint.read_encoder(checkpoint.in_folder(path, "last.pt"))
    if "decoder_embed.weight" not in source["rest"]:
        raise UsageError(f"{source['path']}: no MAE decoder in it. Needed: the last.pt of mae_pretrain.py (encoder.pt "
                         "holds the encoder alone), or a file with decoder_*, such as mae_visualize_vit_*.pth")
    net = MaskedAutoencoder(**checkpoint.decoder_config(source, norm_pix_loss), **source["config"])
    decoder = {k: v for k, v in source["rest"].items() if k == "mask_token" or k.startswith("decoder_")}
    try:
        net.load_state_dict(source["state"] | decoder)
    except RuntimeError as error:
        why = str(error).splitlines()[1].strip()
        raise UsageError(f"{source['path']}: not a decoder that can be rebuilt ({why})") from None
    return net.eval(), source


@torch.no_grad()
def filled_in(net, images, mask_ratio, noise):
    """images (N, C, H, W) and noise (N, L), which decides what is kept -> dict of (N, C, H, W), and mask (N, L).

    masked: removed patches 0, the data set's mean colour; reconstruction: all that the decoder says; pasted: its
    masked patches, the visible ones as they are. Where the targets were normalised by patch, the decoder says nothing
    about a patch's own mean and deviation: they are borrowed from the picture.
    """
    _, predicted, mask = net(images, mask_ratio, noise)
    patches = patchify(images, net.patch_size)
    if net.norm_pix_loss:
        predicted = predicted * (patches.var(-1, keepdim=True) + 1e-6).sqrt() + patches.mean(-1, keepdim=True)
    removed = mask[..., None] == 1
    found = dict(original=patches, masked=patches.masked_fill(removed, 0.0), reconstruction=predicted,
                 pasted=torch.where(removed, predicted, patches))
    return {k: unpatchify(v, net.patch_size, net.grid) for k, v in found.items()} | dict(mask=mask)


def reconstruct(args):
    """Pictures, their visible patches, the decoder's reconstruction, and the two put together, as one sheet."""
    loaded = [load_autoencoder(path, args.norm_pix_loss) for path in args.checkpoint]
    names = [source["meta"].get("system") for _, source in loaded]
    for label, (net, source) in zip(plots.labelled(args.checkpoint, names), loaded):
        if args.norm_pix_loss is None and source["layout"] != "ours":
            print(f"{source['path']}: taken as trained on plain pixels (--norm-pix-loss if it was not)", flush=True)
        pictures = shown_pictures(args, net.config["in_chans"])
        batch, loader = batch_of(pictures, [views.TEST_VIEW], net.config["img_size"], args.seed,
                                 mean=source["meta"].get("mean"), std=source["meta"].get("std"))
        found = filled_in(net, batch.views[0][:], args.mask_ratio, batch.noise(net.grid[0] * net.grid[1]))
        mask = found.pop("mask").numpy()
        pixels = {k: to_pixels(v, loader) for k, v in found.items()}
        files = [pictures.file(i) for i in range(len(pictures))]
        name = os.path.join(args.out, f"reconstruct-{plots.slug(label)}")
        plots.write_npz(name + ".npz", **pixels, mask=mask.astype(np.uint8), files=np.array(files))
        title = f"{label}: {100 * mask.mean():.0f}% of the patches removed"
        if net.norm_pix_loss:
            title += "\nMean and deviation of each patch are borrowed from the picture (targets normalised by patch)"
        rows = ["picture", "masked", "reconstruction", "visible\npasted in"]
        sheet(name + ".png", list(pixels.values()), rows, title=title)


# --------------------------------------------------------------------------------------------------------- augment
def augment(args):
    """A sheet of pictures, MAE's view of them and the two contrastive views, twice, as the training draws them."""
    size = args.img_size or ([224, 224] if args.data or args.pictures else [32, 32])
    pictures = shown_pictures(args, args.in_chans)
    specs = [view | dict(scale=(args.crop_min, 1.0)) for view in views.MOCO_VIEWS] + [views.MAE_VIEW, views.TEST_VIEW]
    arrays, rows = {}, ["picture", "MAE"]
    for epoch in (0, 1):
        batch, loader = batch_of(pictures, specs, size, args.seed, epoch)
        view1, view2, mae, picture = (to_pixels(view[:], loader) for view in batch.views)
        if epoch == 0:
            arrays |= dict(picture=picture, mae=mae)
        arrays |= {f"view1_{epoch}": view1, f"view2_{epoch}": view2}
        rows += ["view 1", "view 2"]
    files = [pictures.file(i) for i in range(len(pictures))]
    plots.write_npz(os.path.join(args.out, "augment.npz"), **arrays, files=np.array(files))
    sheet(os.path.join(args.out, "augment.png"), list(arrays.values()), rows)
