"""Frozen features of a set of pictures, and the k-NN accuracy on them. The encoder is only ever read."""
import hashlib

import torch
import torch.nn.functional as F

import augment
import data
import run
from model import gather


@torch.no_grad()
def extract(encoder, pictures, device="cpu", dtype=None, batch_size=256, workers=0, mean=None, std=None, rank=0,
            processes=1, function=None):
    """(N, D) float32 features of every picture in order, on the device: the class token of its centre crop.

    function(encoder, images) -> (n, ...) replaces the class token after the final norm. Several processes share the
    work and all get the whole. The encoder is put into evaluation mode for it.
    """
    share = -(-len(pictures) // processes)
    mine = (torch.arange(share) + rank * share).clamp_max(len(pictures) - 1)    # the last share may repeat a picture
    part = pictures if processes == 1 else pictures.select(mine)
    loader = data.Loader(part, [augment.TEST_VIEW], encoder.config["img_size"], batch_size, 0, workers, device,
                         shuffle=False, mean=mean, std=std)
    function = function or (lambda net, images: net.forward_features(images))
    training = encoder.training
    encoder.eval()
    parts = []
    for batch in loader.epoch(0):
        with torch.autocast(loader.device.type, dtype, enabled=dtype is not None):
            parts.append(function(encoder, batch.views[0][:]).float())
    encoder.train(training)
    if processes > 1:
        return gather(torch.cat(parts))[:len(pictures)]
    return torch.cat(parts)


def digest(encoder, only=lambda name: True):
    """12 hexadecimal digits of a hash over every weight, or those whose name passes `only`: equal before and after
    an evaluation."""
    total = hashlib.sha256()
    for name, tensor in encoder.state_dict().items():
        if not only(name):
            continue
        total.update(name.encode())
        total.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()[:12]


def knn_scores(queries, bank, labels, classes, k=20, temperature=0.07, chunk=1024):
    """DINO's weighted k-NN: (Q, classes) sums of exp(cos / temperature) over the k nearest of the bank (N, D).

    In chunks of queries, so that memory is chunk x N and not Q x N. k may be a list: then a list is returned.
    """
    ks = [k] if isinstance(k, int) else list(k)
    queries, bank = F.normalize(queries, dim=1), F.normalize(bank, dim=1)
    scores = [torch.zeros(len(queries), classes, device=queries.device) for _ in ks]
    for start in range(0, len(queries), chunk):
        similarity = queries[start:start + chunk] @ bank.T
        nearest, index = similarity.topk(min(max(ks), len(bank)), dim=1)
        weights, votes = (nearest / temperature).exp(), labels[index]
        for score, n in zip(scores, ks):
            score[start:start + chunk].scatter_add_(1, votes[:, :n], weights[:, :n])
    return scores[0] if isinstance(k, int) else scores


def online_knn(encoder, pictures, device, dtype, workers, most=10000):
    """k-NN accuracy (percent) while training: a tenth of at most 10,000 training pictures against the others.

    Their labels are held out of pre-training, and the test pictures are not looked at.
    """
    chosen = pictures.select(augment.shuffled(len(pictures), 2, augment.SUBSET)[:most])
    with run.uncompiled():
        features = extract(encoder, chosen, device, dtype, workers=workers)
    labels, n = chosen.labels.to(device), len(chosen) // 10
    scores = knn_scores(features[:n], features[n:], labels[n:], len(chosen.classes))
    return (scores.argmax(1) == labels[:n]).float().mean().item() * 100
