"""What a worker process does: picture files in, batches of uint8 crops out. Needs torch, numpy, pillow.

Shapes: N pictures of a batch, C channels, (h, w) output pixels; boxes (top, left, height, width).
"""
import copy

import torch

from augment import PIXELS, SUBSET, per_picture, shuffled
from decode import BadFile, crop, exact_crop, jpeg_decoder


class Reader(torch.utils.data.Dataset):
    """Reads, decodes no larger than the crops need, crops and resizes: a batch at a time.

    With a decoder (decode.device_decoder) workers leave plain JPEGs as they are, and the main process has the device
    decode and crop them, by `decode`. Not for evaluations, which crop as pillow does, nor for functions under "pixels".
    """

    TOGETHER = 64                                                           # pictures that are opened at once

    def __init__(self, loader, decoder=None):
        self.pictures, self.views, self.size = loader.pictures, loader.views, loader.size
        # a copy, which is without the DataLoader: collected in a cycle, that waits 5 s for each of its workers
        self.boxes, self.seed = copy.copy(loader).boxes, loader.seed
        usable = self.pictures.in_chans == 3 and all(v["scale"] and not v.get("pixels") for v in self.views)
        self.decoder = decoder if usable else None
        # in shared memory, so that workers see it change
        self.hand_over = torch.tensor([self.decoder is not None]).share_memory_()
        jpeg_decoder()                                                      # imported once, before workers are forked

    def __getstate__(self):
        return self.__dict__ | dict(decoder=None)                           # the device is the main process's

    def __getitems__(self, keys):
        """keys [(epoch, i), ...] -> ids (N,) int64; list of the pictures that are shown, where one cannot be read
        another, the same on every run; {i: what is wrong with it}; for each view its crops, uint8 (N, C, h, w) with
        channels last in memory; what is left for `decode`, or None."""
        epoch, wanted = keys[0][0], [i for _, i in keys]
        shown, bad = list(wanted), {}
        shape = len(keys), *self.size, self.pictures.in_chans
        crops = [torch.empty(shape, dtype=torch.uint8).permute(0, 3, 1, 2) for _ in self.views]
        left = [] if self.hand_over else None
        for start in range(0, len(keys), self.TOGETHER):
            self.fill(range(start, min(start + self.TOGETHER, len(keys))), wanted, shown, bad, crops, epoch, left)
        if left:
            rows, contents, boxes = zip(*left)
            left = rows, torch.cat(contents), [len(content) for content in contents], boxes
        return torch.tensor(wanted), shown, bad, crops, left

    def fill(self, rows, wanted, shown, bad, crops, epoch, left=None):
        """Put pictures into these rows of the crops, others in place of those that cannot be read."""
        for attempt in range(20):
            failed = self.attempt(rows, shown, crops, epoch, left)
            bad.update((wanted[row], trouble) for row, trouble in failed.items() if wanted[row] not in bad)
            rows = list(failed)
            if not rows:
                return
            for row in rows:
                shown[row] = int(shuffled(len(self.pictures), wanted[row], SUBSET)[attempt + 1])
        from data import RunError                                           # which imports this file
        raise RunError(f"20 pictures in a row cannot be read, among them {self.pictures.file(wanted[rows[0]])}: "
                       f"{bad[wanted[rows[0]]]}")

    def attempt(self, rows, shown, crops, epoch, left):
        """Put the crops of picture shown[row] into each row; returns {row: what is wrong with its picture}.

        left: None, or a list for (row, bytes, its boxes) of those that the device is to decode.
        """
        opened, failed = {}, {}
        for row in rows:
            try:
                opened[row] = self.pictures.open(shown[row])
            except BadFile as error:
                failed[row] = str(error)
        if not opened:
            return failed
        # boxes for all of them at once: a dozen small tensor operations each would cost as much as the decoding
        ids = torch.tensor([shown[row] for row in opened])
        full = torch.tensor([picture.size for picture in opened.values()])
        handed = [left is not None and picture.plain is not None for picture in opened.values()]
        # the largest of JPEG's own reductions that keeps every crop at least as large as its output
        sides = torch.stack(self.plan(ids, full, epoch))[:, :, 2:]          # (views, N, 2)
        room = (sides / torch.tensor(self.size)).amin((0, 2))
        room[torch.tensor([hand or not picture.is_jpeg for hand, picture in zip(handed, opened.values())])] = 1
        factors = 1 + (room >= 2).long() + 2 * (room >= 4).long() + 4 * (room >= 8).long()
        small = -(-full // factors[:, None])
        plans = torch.stack(self.plan(ids, small, epoch), 1).tolist()       # (N, views, 4)
        for at, (row, factor, size) in enumerate(zip(list(opened), factors.tolist(), small.tolist())):
            picture, boxes = opened.pop(row), plans[at]
            if handed[at]:
                left.append((row, torch.frombuffer(picture.content, dtype=torch.uint8), boxes))
                continue
            try:
                pixels = picture.pixels(self.pictures.in_chans, factor)
            except BadFile as error:
                failed[row] = str(error)
                continue
            if list(pixels.shape[:2]) != size:                              # a format that is turned as it is decoded
                turned = torch.tensor([pixels.shape[:2]])
                boxes = [plan[0].tolist() for plan in self.plan(ids[at:at + 1], turned, epoch)]
            for k, (box, view) in enumerate(zip(boxes, self.views)):
                cut = (exact_crop if view["scale"] is None else crop)(pixels, box, self.size, view["mode"])
                if view.get("pixels"):
                    key = PIXELS, k, self.seed, epoch
                    cut = per_picture(cut[None].contiguous(), ids[at:at + 1], view["pixels"], *key)[0]
                crops[k][row] = cut
        return failed

    def plan(self, ids, sizes, epoch):
        """The boxes (N, 4) of each view for pictures of sizes (N, 2)."""
        return [self.boxes(ids, sizes, k, epoch) for k in range(len(self.views))]

    def decode(self, left, ids, shown, bad, crops, epoch, device):
        """The crops on the device, with those of the JPEGs that were left to it; the rest as from `__getitems__`.

        What it cannot decode is decoded here, on the CPU; when that is all of a batch, from now on by the workers.
        """
        rows, content, lengths, boxes = left
        images = decode_each(self.decoder, content.split(lengths))
        missing = [row for row, image in zip(rows, images) if image is None]
        if len(missing) == len(rows) and self.hand_over:
            print(f"warning: none of {len(rows)} JPEGs could be decoded on {device}; the workers decode from now on",
                  flush=True)
            self.hand_over.fill_(False)
        if missing:
            self.fill(missing, ids.tolist(), shown, bad, crops, epoch)
        crops = [view.to(device, non_blocking=True) for view in crops]
        for row, image, places in zip(rows, images, boxes):
            for k, (box, view) in enumerate(zip(places, self.views) if image is not None else ()):
                crops[k][row] = crop(image.permute(1, 2, 0).float(), box, self.size, view["mode"])
        return crops, shown


def decode_each(decoder, contents):
    """Images (3, H, W) of the JPEGs in `contents`: at once or, when that fails, one by one; None where that fails."""
    try:
        return decoder(list(contents))
    except RuntimeError:
        images = []
    for content in contents:
        try:
            images += decoder([content])
        except RuntimeError:
            images.append(None)
    return images


def whole(batch):
    """Collates what comes as a batch already."""
    return batch
