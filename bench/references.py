"""What bench.py measures beside our code: networks, pipelines and solvers of timm, transformers,
torchvision and scikit-learn. Every package is imported where it is needed."""
import copy
import random
from functools import partial

import torch
import torch.nn as nn

from data import IMAGENET_STATS
from model import MaskedAutoencoder, MoCoV3, VisionTransformer, info_nce


def timm_blocks(blocks, heads):
    """timm's blocks with the weights of ours; attention as two products, as it was in 2021."""
    from timm.models.vision_transformer import Block
    norm, theirs = partial(nn.LayerNorm, eps=1e-6), nn.ModuleList()
    for block in blocks:
        ratio = block.mlp.fc1.out_features / block.mlp.fc1.in_features
        theirs.append(Block(block.mlp.fc1.in_features, heads, ratio, True, norm_layer=norm))
        theirs[-1].load_state_dict(block.state_dict())
        theirs[-1].attn.fused_attn = False
    return theirs


class TimmMAE(nn.Module):
    """Our masked autoencoder with timm's blocks in place of ours. forward(images) is the loss."""

    def __init__(self, config, decoder):
        super().__init__()
        self.net = MaskedAutoencoder(*decoder, **config)
        self.net.blocks = timm_blocks(self.net.blocks, config["heads"])
        self.net.decoder_blocks = timm_blocks(self.net.decoder_blocks, decoder[2])

    def forward(self, images, noise=None):
        return self.net(images, 0.75, noise)[0]


class TransformersMAE(nn.Module):
    """transformers' ViTMAEForPreTraining as it comes, of the same sizes."""

    def __init__(self, config, decoder):
        super().__init__()
        from transformers import ViTMAEConfig, ViTMAEForPreTraining
        dim, (width, depth, heads) = config["dim"], decoder
        self.net = ViTMAEForPreTraining(ViTMAEConfig(
            hidden_size=dim, num_hidden_layers=config["depth"], intermediate_size=4 * dim,
            num_attention_heads=config["heads"], layer_norm_eps=1e-6,
            image_size=config["img_size"][0], patch_size=config["patch_size"],
            decoder_hidden_size=width, decoder_num_hidden_layers=depth,
            decoder_num_attention_heads=heads, decoder_intermediate_size=4 * width,
            mask_ratio=0.75, norm_pix_loss=True))

    def forward(self, images):
        return self.net(pixel_values=images).loss


MAE = {"timm": TimmMAE, "transformers": TransformersMAE}


class TimmMoCo(nn.Module):
    """MoCo v3 (Chen et al., 2021, Algorithm 1) on timm's ViT: each view passes each encoder on its
    own, the momentum update goes weight by weight. forward(x1, x2) is the loss."""

    def __init__(self, config, hidden, out, momentum=0.99):
        super().__init__()
        from timm.models.vision_transformer import VisionTransformer as TimmViT
        ours, self.momentum = MoCoV3(VisionTransformer(**config), hidden, out), momentum
        vit = TimmViT(config["img_size"], config["patch_size"], config["in_chans"], 0, "token",
                      config["dim"], config["depth"], config["heads"], config["mlp_ratio"],
                      norm_layer=partial(nn.LayerNorm, eps=1e-6))
        vit.patch_embed.requires_grad_(False)
        vit.pos_embed.requires_grad_(False)
        for block in vit.blocks:
            block.attn.fused_attn = False
        self.base, self.predictor = nn.Sequential(vit, ours.base_encoder.head), ours.predictor
        self.slow = copy.deepcopy(self.base).requires_grad_(False)

    def forward(self, x1, x2):
        q1, q2 = self.predictor(self.base(x1)), self.predictor(self.base(x2))
        with torch.no_grad():
            for fast, slow in zip(self.base.parameters(), self.slow.parameters()):
                slow.copy_(slow * self.momentum + fast * (1 - self.momentum))
            k1, k2 = self.slow(x1), self.slow(x2)
        return info_nce(q1, k2, 0.2) + info_nce(q2, k1, 0.2)


def pillow_views(size):
    """torchvision's transforms of both papers, pillow image -> normalised tensors: {name: call}."""
    from PIL import ImageFilter, ImageOps
    from torchvision import transforms as T
    end = [T.RandomHorizontalFlip(), T.ToTensor(), T.Normalize(*IMAGENET_STATS)]

    def blur(image):
        return image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))

    def view(blurred, solarised):
        return T.Compose([
            T.RandomResizedCrop(size, scale=(0.08, 1.0)),
            T.RandomApply([T.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
            T.RandomGrayscale(p=0.2), T.RandomApply([blur], p=blurred),
            T.RandomApply([ImageOps.solarize], p=solarised), *end])

    one, two = view(1.0, 0.0), view(0.1, 0.2)
    crop = T.RandomResizedCrop(size, (0.2, 1.0), interpolation=T.InterpolationMode.BICUBIC)
    return {"crop": T.RandomResizedCrop(size, scale=(0.08, 1.0)),
            "MAE view": T.Compose([crop, *end]),
            "pair of views": lambda image: (one(image), two(image))}


def scikit_learn(x, labels, penalty, tolerance=1e-6):
    """A call that fits the few-shot classifier: penalty is lambda times the number of rows of x."""
    from sklearn.linear_model import LogisticRegression
    fit = LogisticRegression(C=1 / penalty, fit_intercept=False, tol=tolerance, max_iter=5000).fit
    return lambda: fit(x.cpu().numpy(), labels.cpu().numpy())
