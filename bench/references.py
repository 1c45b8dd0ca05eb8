"""What bench.py measures beside our code: networks, pipelines and solvers of timm, transformers,
torchvision and scikit-learn. Every package is imported where it is needed."""
import random
from functools import partial

import torch.nn as nn

from data import IMAGENET_STATS
from model import Block


def with_timm_blocks(net):
    """The same network and weights with timm's blocks in place of ours; attention as two products
    and every token through every block, as when MAE and MoCo v3 were published."""
    from timm.models.vision_transformer import Block as TimmBlock

    class Theirs(TimmBlock):
        def forward(self, x, *_, **__):
            return super().forward(x)

    for blocks in [module for module in net.modules() if isinstance(module, nn.ModuleList)]:
        for i, ours in enumerate(blocks):
            if isinstance(ours, Block):
                dim, hidden = ours.mlp.fc1.in_features, ours.mlp.fc1.out_features
                theirs = Theirs(dim, ours.attn.heads, hidden / dim, True,
                                norm_layer=partial(nn.LayerNorm, eps=1e-6))
                theirs.load_state_dict(ours.state_dict())
                theirs.requires_grad_(next(ours.parameters()).requires_grad)
                theirs.attn.fused_attn = False
                blocks[i] = theirs
    return net


def transformers_mae(config, decoder):
    """transformers' ViTMAEForPreTraining as it comes, of the same sizes."""
    from transformers import ViTMAEConfig, ViTMAEForPreTraining
    width, depth, heads = decoder
    return ViTMAEForPreTraining(ViTMAEConfig(
        hidden_size=config["dim"], num_hidden_layers=config["depth"],
        num_attention_heads=config["heads"], intermediate_size=4 * config["dim"],
        image_size=config["img_size"][0], patch_size=config["patch_size"], layer_norm_eps=1e-6,
        decoder_hidden_size=width, decoder_num_hidden_layers=depth,
        decoder_num_attention_heads=heads, decoder_intermediate_size=4 * width, mask_ratio=0.75,
        norm_pix_loss=True))


def with_transformers_upernet(net):
    """A segmenter with transformers' UperNet head in place of ours, of the same widths."""
    from transformers import UperNetConfig
    from transformers.models.upernet.modeling_upernet import UperNetHead
    ours = net.head.upernet
    classes, width = ours.classifier[-1].weight.shape[:2]
    config = UperNetConfig(hidden_size=width, num_labels=classes)
    net.head.upernet = UperNetHead(config, [net.dim] * 4)
    return net


def transformers_upernet(config, channels, classes):
    """transformers' UperNetForSemanticSegmentation as it comes, BEiT of the same sizes under it:
    the same taps, pyramid, relative positions and auxiliary head as our Segmenter."""
    from transformers import BeitConfig, UperNetConfig, UperNetForSemanticSegmentation
    depth = config["depth"]
    encoder = BeitConfig(
        hidden_size=config["dim"], num_hidden_layers=depth,
        num_attention_heads=config["heads"], intermediate_size=4 * config["dim"],
        image_size=config["img_size"][0], patch_size=config["patch_size"],
        use_absolute_position_embeddings=True, use_relative_position_bias=True,
        out_features=[f"stage{round(depth * share)}" for share in (1 / 3, 1 / 2, 2 / 3, 1)],
        add_fpn=True, reshape_hidden_states=True)
    return UperNetForSemanticSegmentation(UperNetConfig(
        backbone_config=encoder, hidden_size=channels, num_labels=classes,
        auxiliary_in_channels=config["dim"]))


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
    return lambda: fit(x.numpy(), labels.numpy())
