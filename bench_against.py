"""What bench.py measures beside our code: the same networks, pipelines and solvers from timm, transformers, torchvision
and scikit-learn, each used as the published training code of MAE and MoCo v3 uses it. Every import is made when needed.

Shapes: N images, L patches, T = 1 + L tokens, D width.
"""
import random
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F

from data import IMAGENET_STATS
from model import sincos_pos_embed


def step(net, inputs, dtype):
    """A training step with torch's AdamW as it comes: net(*inputs) is the loss, dtype the autocast type or None."""
    net.train()
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-4)
    device = inputs[0].device.type
    scaler = torch.amp.GradScaler(device, enabled=dtype == torch.float16)

    def call():
        with torch.autocast(device, dtype, enabled=dtype is not None):
            loss = net(*inputs)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    return call


# -------------------------------------------------------------------------------------------- MAE and MoCo v3
def timm_blocks(depth, dim, heads, mlp_ratio=4.0):
    """timm's blocks with attention as two products, the way they were when both methods were published."""
    from timm.models.vision_transformer import Block
    blocks = nn.Sequential(*(Block(dim, heads, mlp_ratio, qkv_bias=True, norm_layer=partial(nn.LayerNorm, eps=1e-6))
                             for _ in range(depth)))
    for block in blocks:
        block.attn.fused_attn = False
    return blocks


class TimmMAE(nn.Module):
    """MAE (He et al., 2021) from timm's parts: all patches are embedded, then masked; the loss of every patch is
    computed, then averaged over the removed ones. forward(images) is the loss at mask ratio 0.75."""

    def __init__(self, config, decoder):
        super().__init__()
        from timm.layers import PatchEmbed
        dim, side, patch = config["dim"], config["img_size"][0], config["patch_size"]
        width, depth, heads = decoder
        grid = (side // patch, side // patch)
        self.patch = patch
        self.embed = PatchEmbed(side, patch, config["in_chans"], dim)
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, dim))
        self.pos_embed = nn.Parameter(sincos_pos_embed(dim, grid), requires_grad=False)
        self.encoder = timm_blocks(config["depth"], dim, config["heads"], config["mlp_ratio"])
        self.encoder_norm = nn.LayerNorm(dim, eps=1e-6)
        self.to_decoder = nn.Linear(dim, width)
        self.mask_token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.decoder_pos_embed = nn.Parameter(sincos_pos_embed(width, grid), requires_grad=False)
        self.decoder = timm_blocks(depth, width, heads)
        self.decoder_norm = nn.LayerNorm(width, eps=1e-6)
        self.to_pixels = nn.Linear(width, patch * patch * config["in_chans"])

    def pixels(self, images):
        """(N, L, p p C), each patch normalised."""
        n, c, h, w = images.shape
        p = self.patch
        x = torch.einsum("nchpwq->nhwpqc", images.reshape(n, c, h // p, p, w // p, p)).reshape(n, -1, p * p * c)
        return (x - x.mean(dim=-1, keepdim=True)) / (x.var(dim=-1, keepdim=True) + 1e-6) ** 0.5

    def forward(self, images):
        x = self.embed(images) + self.pos_embed[:, 1:]
        n, length, dim = x.shape
        order = torch.rand(n, length, device=x.device).argsort(dim=1)
        back, kept = order.argsort(dim=1), int(length * 0.25)
        removed = (back >= kept).float()                                    # (N, L), 1 = removed
        x = torch.gather(x, 1, order[:, :kept, None].expand(-1, -1, dim))
        x = torch.cat([(self.cls_token + self.pos_embed[:, :1]).expand(n, -1, -1), x], dim=1)
        x = self.to_decoder(self.encoder_norm(self.encoder(x)))
        filled = torch.cat([x[:, 1:], self.mask_token.expand(n, length - kept, -1).to(x.dtype)], dim=1)
        filled = torch.gather(filled, 1, back[:, :, None].expand(-1, -1, filled.shape[2]))
        x = torch.cat([x[:, :1], filled], dim=1) + self.decoder_pos_embed
        predicted = self.to_pixels(self.decoder_norm(self.decoder(x)))[:, 1:]
        error = ((predicted - self.pixels(images)) ** 2).mean(dim=-1)
        return (error * removed).sum() / removed.sum()


class TransformersMAE(nn.Module):
    """transformers' ViTMAEForPreTraining as it comes, of the same sizes. forward(images) is the loss."""

    def __init__(self, config, decoder):
        super().__init__()
        from transformers import ViTMAEConfig, ViTMAEForPreTraining
        dim, (width, depth, heads) = config["dim"], decoder
        self.net = ViTMAEForPreTraining(ViTMAEConfig(
            hidden_size=dim, num_hidden_layers=config["depth"], num_attention_heads=config["heads"],
            intermediate_size=int(dim * config["mlp_ratio"]), layer_norm_eps=1e-6, image_size=config["img_size"][0],
            patch_size=config["patch_size"], num_channels=config["in_chans"], decoder_hidden_size=width,
            decoder_num_hidden_layers=depth, decoder_num_attention_heads=heads, decoder_intermediate_size=4 * width,
            mask_ratio=0.75, norm_pix_loss=True))

    def forward(self, images):
        return self.net(pixel_values=images).loss


def timm_vit(config):
    """timm's ViT with the class token as its output; attention as two products."""
    from timm.models.vision_transformer import VisionTransformer
    net = VisionTransformer(img_size=config["img_size"], patch_size=config["patch_size"], in_chans=config["in_chans"],
                            num_classes=0, global_pool="token", embed_dim=config["dim"], depth=config["depth"],
                            num_heads=config["heads"], mlp_ratio=config["mlp_ratio"],
                            norm_layer=partial(nn.LayerNorm, eps=1e-6))
    for block in net.blocks:
        block.attn.fused_attn = False
    return net


def head(*dims):
    """Linear without bias and BatchNorm after each, ReLU between, no affine at the end."""
    layers = []
    for i, (a, b) in enumerate(zip(dims, dims[1:]), start=2):
        last = i == len(dims)
        layers += [nn.Linear(a, b, bias=False), nn.BatchNorm1d(b, affine=not last)]
        layers += [] if last else [nn.ReLU()]
    return nn.Sequential(*layers)


class TimmMoCo(nn.Module):
    """MoCo v3 (Chen et al., 2021, Algorithm 1) on timm's ViT: each view passes each encoder on its own, the momentum
    update goes weight by weight. forward(x1, x2) is the loss."""

    def __init__(self, config, hidden, out, temperature=0.2, momentum=0.99):
        super().__init__()
        self.temperature, self.momentum = temperature, momentum
        heads = [head(config["dim"], hidden, hidden, out) for _ in range(2)]
        self.base, self.slow = (nn.Sequential(timm_vit(config), projector) for projector in heads)
        self.predict = head(out, hidden, out)
        self.slow.load_state_dict(self.base.state_dict())
        self.slow.requires_grad_(False)
        for vit in (self.base[0], self.slow[0]):
            vit.pos_embed.requires_grad_(False)
            vit.patch_embed.requires_grad_(False)

    def contrast(self, q, k):
        logits = F.normalize(q, dim=1) @ F.normalize(k, dim=1).T / self.temperature
        return 2 * self.temperature * F.cross_entropy(logits, torch.arange(len(q), device=q.device))

    def forward(self, x1, x2):
        q1, q2 = self.predict(self.base(x1)), self.predict(self.base(x2))
        with torch.no_grad():
            for ours, slow in zip(self.base.parameters(), self.slow.parameters()):
                slow.copy_(slow * self.momentum + ours * (1 - self.momentum))
            k1, k2 = self.slow(x1), self.slow(x2)
        return self.contrast(q1, k2) + self.contrast(q2, k1)


# ------------------------------------------------------------------------------------ augmentation on pillow
def blur(low, high):
    """Gaussian blur of a pillow image with a random radius."""
    from PIL import ImageFilter
    return lambda image: image.filter(ImageFilter.GaussianBlur(random.uniform(low, high)))


def pillow_pipelines(size):
    """torchvision's per-image transforms of both papers, pillow image -> normalised tensors: {name: function}."""
    from PIL import ImageOps
    from torchvision import transforms as T
    end = [T.RandomHorizontalFlip(), T.ToTensor(), T.Normalize(*IMAGENET_STATS)]

    def view(blurred, solarised):
        first = [T.RandomResizedCrop(size, scale=(0.08, 1.0)),
                 T.RandomApply([T.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
                 T.RandomGrayscale(p=0.2),
                 T.RandomApply([blur(0.1, 2.0)], p=blurred)]
        return T.Compose(first + [T.RandomApply([ImageOps.solarize], p=solarised)] * bool(solarised) + end)

    one, two = view(1.0, 0.0), view(0.1, 0.2)
    crop = T.RandomResizedCrop(size, scale=(0.2, 1.0), interpolation=T.InterpolationMode.BICUBIC)
    return {"MAE view": T.Compose([crop, *end]), "pair of views": lambda image: (one(image), two(image))}


def pillow_operations(size, images):
    """{name: call}: each operation of bench.py's augment case on every pillow image, one after the other."""
    from PIL import ImageOps
    from torchvision import transforms as T
    smaller = [image.crop((0, 0, size, size)) for image in images]
    whole = pillow_pipelines(size)
    operations = {
        "crop": T.RandomResizedCrop(size, scale=(0.08, 1.0)),
        "brightness": T.ColorJitter(brightness=0.4),
        "contrast": T.ColorJitter(contrast=0.4),
        "saturation": T.ColorJitter(saturation=0.4),
        "hue": T.ColorJitter(hue=0.1),
        "grey": T.Grayscale(3),
        "blur": blur(0.1, 2.0),
        "solarise": ImageOps.solarize,
        "flip": ImageOps.mirror,
        **whole,
    }

    def over(name, function):
        source = images if name == "crop" or name in whole else smaller
        return lambda: [function(image) for image in source]

    return {name: over(name, function) for name, function in operations.items()}


# --------------------------------------------------------------------------------------------- the classifier
def scikit_learn(x, labels, penalty, tolerance=1e-6):
    """A call that fits the few-shot classifier: penalty is lambda times the number of features' rows."""
    from sklearn.linear_model import LogisticRegression
    x, labels = x.numpy(), labels.numpy()

    def call():
        LogisticRegression(C=1 / penalty, fit_intercept=False, tol=tolerance, max_iter=5000).fit(x, labels)
    return call
