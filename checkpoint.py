"""Checkpoints: written so that a kill loses nothing, read as tensors only, in many layouts.

`read_encoder` takes our own files, MAE's (encoder only or full), MoCo v3's, DINO's, timm's and
torchvision's ViT, transformers' ViT and ViTMAE (safetensors or pickle, a folder or a name in the
local hub cache), told apart by their keys and shapes. For features of your own images,
(N, C, H, W) in [0, 1] -> (N, D):

    import checkpoint
    encoder = checkpoint.load("out/graft")              # frozen, in evaluation mode
    features = encoder.forward_features(encoder.normalise(images))
"""
import argparse
import contextlib
import errno
import glob
import hashlib
import itertools
import json
import math
import os
import pickletools
import re
import struct
import zipfile

import torch
import torch.nn.functional as F

from model import ARCHS, Classifier, VisionTransformer

# pickle operations in a file: a ViT-H with its optimizer has some 50,000
LONGEST = 1_000_000
# the largest a ViT is rebuilt from: far above any that exists, far below what fills a machine
LARGEST = dict(patch_size=256, in_chans=64, dim=16384, depth=256, heads=256)
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
SAFE_TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16,
              "BF16": torch.bfloat16, "I64": torch.int64, "I32": torch.int32, "I16": torch.int16,
              "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}


class CheckpointError(ValueError):
    """A file that cannot be used (exit code 2), or one that cannot be written (1)."""

    def __init__(self, message, exit_code=2):
        super().__init__(message)
        self.exit_code = exit_code


@contextlib.contextmanager
def naming(path, lacking=None):
    """What is wrong within is said of this file; `lacking`: what any other error shows."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    except Exception:                                   # what is hostile fails in many ways
        if lacking is None:
            raise
        raise CheckpointError(f"{path}: {lacking}") from None


# ------------------------------------------------------------------------- writing and reading
@contextlib.contextmanager
def atomic(path):
    """A temporary name to write to, flushed and renamed: `path` is whole, old or new."""
    temporary, folder = f"{path}.tmp", os.path.dirname(path) or "."
    os.makedirs(folder, exist_ok=True)
    try:
        yield temporary
        flush(temporary)
        os.replace(temporary, path)
        flush(folder)                                   # the new name too, should the power fail
    finally:
        with contextlib.suppress(OSError):
            os.remove(temporary)


def flush(path):
    """Have a file or folder reach the disk."""
    opened = os.open(path, os.O_RDONLY)
    os.fsync(opened)
    os.close(opened)


def save(obj, path, write=None):
    """torch.save, or write(obj, file), as a whole or not at all; a CheckpointError says why not."""
    try:
        with atomic(path) as temporary, open(temporary, "wb") as f:
            (write or torch.save)(obj, f)
    except (OSError, RuntimeError) as error:            # torch's RuntimeError hides the system's
        cause = error if isinstance(error, OSError) else error.__context__
        full = getattr(cause, "errno", errno.ENOSPC) in (errno.ENOSPC, errno.EDQUOT)
        why = "the disk is full" if full else cause.strerror or cause
        kept = f"; the one before is intact: {path}" if os.path.exists(path) else ""
        raise CheckpointError(f"cannot write {path}: {why}{kept}", exit_code=1) from None


def write_safetensors(state, f):
    """safetensors' format: the header's length in 8 bytes, the header as JSON, the bytes."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    kinds = {dtype: name for name, dtype in SAFE_TYPES.items()}
    for name, tensor in state.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = dict(dtype=kinds[tensor.dtype], shape=list(tensor.shape),
                            data_offsets=[start, end])
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    f.write(len(text).to_bytes(8, "little") + text)
    for tensor in state.values():
        f.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())


def read_safetensors(path):
    """{name: tensor}. Their bytes are there, once each."""
    size, total, state = os.path.getsize(path), 0, {}
    with open(path, "rb") as f:
        length = int.from_bytes(f.read(8), "little")
        if length > min(size - 8, 1 << 22):
            raise CheckpointError("its header is longer than the file, or than any model's")
        header = json.loads(f.read(length))
        header.pop("__metadata__", None)
        for name, part in header.items():
            (start, end), dtype = part["data_offsets"], SAFE_TYPES[part["dtype"]]
            total += end - start
            if (not 0 <= start <= end or total > size - 8 - length
                    or end - start != math.prod(part["shape"]) * dtype.itemsize):
                raise CheckpointError(f"{name:.40} claims bytes that are not there")
            f.seek(8 + length + start)
            content = bytearray(f.read(end - start))
            state[name] = (torch.frombuffer(content, dtype=dtype).reshape(part["shape"]) if content
                           else torch.empty(part["shape"], dtype=dtype))
    return state


FORMATS = {"f8": "d", "f4": "f", "f2": "e", "i8": "q", "i4": "i", "i2": "h", "i1": "b",
           "u8": "Q", "u4": "I", "u2": "H", "u1": "B", "b1": "?"}


class Dtype:
    """Stands for numpy.dtype where a pickle holds numbers of numpy: no code of it is run."""

    def __init__(self, code, *_):
        self.code = code

    def __setstate__(self, state):
        self.order = state[1].replace("|", "<")


def standing_for(place, found):
    """`found` under the name of something else in a pickle."""
    found.__module__, _, found.__name__ = place.rpartition(".")
    found.__qualname__ = found.__name__
    return found


# the options in MAE's and DINO's own files, and numbers of numpy 1 and 2
HARMLESS = [argparse.Namespace, standing_for("numpy.dtype", Dtype)] + [
    standing_for(f"numpy.{core}.multiarray.scalar", lambda dtype, content: struct.unpack(
        dtype.order + FORMATS[dtype.code], content)[0]) for core in ("core", "_core")]


# what a download may have left in the place of weights
NOT_WEIGHTS = {b"<": "a web page, not weights: download the file that it links to",
               b"version https://git-lfs": "the pointer of Git LFS, not the weights: git lfs pull"}


def read(path):
    """What a checkpoint holds, on the CPU: tensors and plain values. Code is refused, not run."""
    if not os.path.isfile(path):
        raise CheckpointError(f"{path}: no such checkpoint")
    with naming(path):
        try:
            with open(path, "rb") as f:
                if f.read(9)[8:] == b"{":
                    return read_safetensors(path)
            check_pickle(path)
            with torch.serialization.safe_globals(HARMLESS):
                content = torch.load(path, map_location="cpu", weights_only=True)
            check_sizes(content, os.path.getsize(path))
            return content
        except CheckpointError:
            raise
        except Exception as error:                      # torch raises many kinds for a bad file
            said = str(error)
        # torch's words for a class or a function
        if "global" in said.lower() or "unrecognized function" in said:
            named = re.search(r"(GLOBAL|function|class) [<'`]*([\w. -]+\w)", said)
            raise CheckpointError(
                f"refused, it holds more than tensors and plain values "
                f"({named[2] if named else 'a class':.60}), which could run code when read. If you "
                "trust it, save its weights alone: c = torch.load(FILE, weights_only=False); "
                "torch.save(c.get('model') or c['state_dict'], NEW)")
        with open(path, "rb") as f:
            head = f.read(512).lstrip().lower()
        what = next((what for start, what in NOT_WEIGHTS.items() if head.startswith(start)), None)
        raise CheckpointError(what or f"not a readable checkpoint ({said.split('. ')[0]:.80})")


def check_pickle(path):
    """Refuse, before it is read, what would unpack to more than the file or take minutes."""
    with open(path, "rb") as f:
        pickles = [f] * 5                               # torch before 1.6: five, then bytes
        if zipfile.is_zipfile(f):
            archive = zipfile.ZipFile(f)
            parts = archive.infolist()
            if sum(part.file_size for part in parts) > os.path.getsize(path):
                raise CheckpointError("refused, its parts claim more bytes than the file has")
            pickles = [archive.open(part) for part in parts if part.filename.endswith("/data.pkl")]
        f.seek(0)
        operations, longer = itertools.chain.from_iterable(map(pickletools.genops, pickles)), False
        with contextlib.suppress(Exception):            # damaged, or the bytes after the pickles
            longer = any(True for _ in itertools.islice(operations, LONGEST, None))
    if longer:
        raise CheckpointError("refused, its list of contents is longer than that of any model "
                              f"(over {LONGEST:,} operations)")


def check_sizes(content, size):
    """Refuse tensors that are larger than their bytes in a file of that size, before one is
    touched."""
    todo, seen, stored = [content], set(), {}
    while todo:
        value = todo.pop()
        if id(value) in seen:                           # what is nested in itself ends here
            continue
        seen.add(id(value))
        if isinstance(value, torch.Tensor):
            if value.layout is not torch.strided or value.device.type != "cpu":
                raise CheckpointError("refused, it holds a tensor that is not dense or not stored")
            storage = value.untyped_storage()
            stored[storage.data_ptr()] = storage.nbytes()
            if value.numel() * value.element_size() > storage.nbytes():
                raise CheckpointError(f"refused, a tensor of shape {tuple(value.shape)} has only "
                                      f"{storage.nbytes()} bytes in the file")
        elif isinstance(value, dict):
            todo += [*value, *value.values()]
        elif isinstance(value, (list, tuple, set)):
            todo += value
        elif isinstance(value, argparse.Namespace):
            todo.append(vars(value))
    if sum(stored.values()) > size:                     # torch 2.6 would read what is not there
        raise CheckpointError("refused, its tensors claim more bytes than the file has")


def encoder_digest(source, img_size=None):
    """The digest of the encoder in a file that was read, as evaluate.py gives it."""
    state, config = fit(source, img_size)
    encoder = VisionTransformer(**config)
    encoder.load_state_dict(state)
    return digest(encoder)


def digest(encoder, only=lambda name: True):
    """12 hexadecimal digits of a hash over every weight, or over those whose name passes `only`."""
    total = hashlib.sha256()
    for name, tensor in encoder.state_dict().items():
        if only(name):
            content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            total.update(name.encode())
            total.update(content.numpy().tobytes())
    return total.hexdigest()[:12]


# ------------------------------------------------------------------------------------- layouts
# what ends in one of these is the patch projection of a ViT; what stands before it is a prefix
ANCHORS = {"patch_embed.proj.weight": "timm", "conv_proj.weight": "torchvision",
           "embeddings.patch_embeddings.projection.weight": "transformers"}
# facebook/vit-mae-base, not out/mae or a file
HUB_NAME = re.compile(r"(?!out/)[\w.-]+/[\w.-]+(?<!\.pt)(?<!\.pth)(?<!\.safetensors)")
HUB_FILES = ("model.safetensors", "pytorch_model.bin")
WEIGHTS = (".pt", ".pth", ".bin", ".safetensors")
# what a config of ours holds; others have some of these names
OURS = {"img_size", "patch_size", "in_chans", "dim", "depth", "heads"}
WRAPPERS = re.compile(r"(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# name there -> official name; each row is applied to every name in turn
RENAMES = {
    "torchvision": (
        (r"^class_token$", "cls_token"), (r"^encoder\.pos_embedding$", "pos_embed"),
        (r"^conv_proj\.", "patch_embed.proj."), (r"^encoder\.ln\.", "norm."),
        (r"^encoder\.layers\.encoder_layer_(\d+)\.", r"blocks.\1."),
        (r"\.ln_([12])\.", r".norm\1."),
        (r"\.self_attention\.in_proj_", ".attn.qkv."),
        (r"\.self_attention\.out_proj\.", ".attn.proj."),
        (r"\.mlp\.(0|linear_1)\.", ".mlp.fc1."), (r"\.mlp\.(3|linear_2)\.", ".mlp.fc2.")),
    # the files on the hub, those that transformers 5 writes, and its names in memory
    "transformers": (
        (r"^embeddings\.cls_token$", "cls_token"),
        (r"^embeddings\.position_embeddings$", "pos_embed"),
        (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
        (r"^layernorm\.", "norm."), (r"^(encoder\.layer|layers)\.(\d+)\.", r"blocks.\2."),
        (r"^decoder\.(decoder_layers|decoder_encoder\.layer)\.(\d+)\.", r"decoder_blocks.\2."),
        (r"^decoder\.(mask_token|decoder_)", r"\1"),
        (r"\.layernorm_before\.", ".norm1."), (r"\.layernorm_after\.", ".norm2."),
        (r"\.attention\.(attention\.)?([qkv])(uery|ey|alue|_proj)\.", r".attn.\2."),
        (r"\.attention\.(output\.dense|o_proj)\.", ".attn.proj."),
        (r"\.intermediate\.dense\.", ".mlp.fc1."),
        (r"(blocks\.\d+)\.output\.dense\.", r"\1.mlp.fc2."))}
# what a ViT of another kind has, by the names of its tensors
UNLIKE = (
    (r"\b(ls[12]|gamma_[12]|layer_scale\d?)\b", "layer scale"),
    (r"\b[qk]_norm\b", "normalised queries and keys (qk-norm)"),
    (r"\b(reg_tokens?|registers|(register|storage)_tokens)\b", "register tokens"),
    (r"\b(dist_token|distillation_token)\b", "a distillation token"),
    (r"\b(norm_pre|pre_norm|ln_pre|pre_layrnorm)\b",
     "a norm before the blocks, as CLIP (often quick-GELU)"),
    (r"\b(rope|relative_position_bias\w*|rel_pos\w*)\b", "relative positions"),
    (r"\b(w12|fc1_g|fc1_x|weights_in)\b", "gated MLPs"))


def in_folder(path, name="encoder.pt"):
    """The file that a run's folder stands for; a folder of transformers stays as it is."""
    inside = os.path.join(path, name)
    foreign = any(os.path.exists(os.path.join(path, weights)) for weights in HUB_FILES)
    return inside if os.path.isdir(path) and (os.path.exists(inside) or not foreign) else path


def locate(path):
    """The file with the weights, for a file, a run's folder, transformers' folder or hub name.

    A name such as facebook/vit-mae-base is looked up in the local cache, never in the network.
    """
    if not os.path.exists(path) and HUB_NAME.fullmatch(path):
        home = os.environ.get("HF_HOME") or os.path.expanduser("~/.cache/huggingface")
        cache = os.environ.get("HF_HUB_CACHE") or os.path.join(home, "hub")
        kept = os.path.join(glob.escape(cache), "models--" + path.replace("/", "--"), "snapshots")
        found = sorted(glob.glob(os.path.join(kept, "*")), key=os.path.getmtime)
        if not found:
            raise CheckpointError(f"{path}: no such checkpoint, and no model of this name in "
                                  f"{cache}; `hf download {path}` fetches one from the hub")
        path = found[-1]
    if os.path.isdir(path):
        for name in ("encoder.pt", *HUB_FILES):
            if os.path.exists(os.path.join(path, name)):
                return os.path.join(path, name)
        others = [name for name in sorted(os.listdir(path)) if name.endswith(WEIGHTS)]
        if glob.glob(os.path.join(glob.escape(path), "*.index.json")):
            raise CheckpointError(f"{path}: its weights are in several files; save_pretrained with "
                                  "a larger max_shard_size writes one")
        what = f"; it has {others[0]}: give that file" if others else ""
        raise CheckpointError(f"{path}: no encoder.pt, no such checkpoint in this folder{what}")
    return path


def beside(path, name):
    """The settings in a JSON file of transformers or timm, where one is beside its weights."""
    of_hub = os.path.basename(path) in HUB_FILES
    if of_hub or path.endswith((".safetensors", ".bin")):
        try:
            with open(os.path.join(os.path.dirname(path), name), "rb") as f:
                return dict(json.loads(f.read(1 << 20)))
        except FileNotFoundError:
            pass
        except (ValueError, TypeError, OSError, RecursionError) as error:
            if not of_hub:                                  # it may be another's
                return {}
            raise CheckpointError(f"{name} beside it is not readable ({str(error):.80})") from None
    return {}


def groups(content, name="", depth=2):
    """(name, {key: tensor}) of every dict in a checkpoint: under "model", "teacher", ..."""
    for key, value in content.items() if depth else ():
        if isinstance(key, str) and isinstance(value, dict):
            yield from groups(value, f"{name}{key}.", depth - 1)
    yield name, {k: v for k, v in content.items()
                 if isinstance(k, str) and isinstance(v, torch.Tensor)}


def find(content, weights):
    """(place, group, prefix, layout) of the patch projection of the ViT that is asked for, and
    notes for `report`. place: the words before it, such as teacher.backbone."""
    found = {}                                          # place: (rank, kind, group, prefix, layout)
    for group, tensors in groups(content):
        for key, (anchor, layout) in itertools.product(tensors, ANCHORS.items()):
            if f".{key}".endswith(f".{anchor}"):
                prefix = key.removesuffix(anchor)
                place = (group + prefix).strip(".")
                words = set(re.split(r"[._]", place.lower()))
                kind = "ema" if "target" in words else next(        # target: I-JEPA's, MSN's
                    (k for k in ("ema", "momentum") if k in words), "base")
                kind = "momentum" if {"encoder", "k"} <= words else kind        # MoCo v1's and v2's
                rank = {"ema": 2, "momentum": 3}.get(kind, "student" in words)
                found[place] = (rank, kind, group, prefix, layout)
    if not found:
        keys = [k for k in content if isinstance(k, str)]
        raise CheckpointError("no ViT in it (no patch_embed.proj.weight or its like); its first "
                              f"keys are {', '.join(keys[:3]) or 'none'}")
    fitting = [place for place, f in found.items() if weights in ("base", f[1])]
    if not fitting:
        what = {"momentum": "momentum encoder", "ema": "averaged weights (ema)"}[weights]
        raise CheckpointError(f"holds no {what}")
    place = min(fitting, key=lambda place: found[place][0])
    _, taken, group, prefix, layout = found.pop(place)
    plain = not prefix and group in ("", "model.", "state_dict.") and not found
    notes = [] if plain else [f"weights of {place or 'the top level'}"]
    for other, (_, kind, *_) in found.items():
        way = "" if kind in ("base", taken) else f" (--weights {kind})"
        notes.append(f"also there: {other or 'weights at the top level'}{way}")
    return place, group, prefix, layout, notes


def unwrap(content, weights="base"):
    """(state of one ViT, whatever hangs on it, name of the layout, notes for `report`).

    weights: "base"; "momentum", MoCo v3's other encoder; or "ema", the average of the weights.
    """
    if not isinstance(content, dict):
        raise CheckpointError(f"holds a {type(content).__name__}, not a dict of tensors")
    place, group, prefix, layout, notes = find(content, weights)
    if layout == "timm":
        parts = set(place.split("."))
        layout = ("MoCo v3" if parts & {"base_encoder", "momentum_encoder"} else
                  "DINO" if parts & {"teacher", "student"} else
                  "MAE" if group == "model." else "timm")
    state, rest = {}, {}
    for key, value in dict(groups(content))[group].items():
        inside = key.startswith(prefix)
        key = WRAPPERS.sub("", key.removeprefix(prefix if inside else "module."))
        for pattern, new in RENAMES.get(layout, ()):
            key = re.sub(pattern, new, key)
        (state if inside else rest)[key] = value
    if "norm.weight" not in state and "fc_norm.weight" in state:
        state = {re.sub(r"^fc_norm\.", "norm.", k): v for k, v in state.items()}
        notes.append("fc_norm taken as the final norm: it was trained on the mean of the patches")
    return fused(state), fused(rest), layout, notes


def fused(state):
    """q, k and v as one tensor, where they are three."""
    whole = {}
    for key, value in state.items():
        parts = [key.replace(".attn.q.", f".attn.{letter}.") for letter in "qkv"]
        if ".attn.q." in key and all(part in state and state[part].ndim for part in parts):
            whole[key.replace(".q.", ".qkv.")] = torch.cat([state[part] for part in parts])
        elif not re.search(r"\.attn\.[kv]\.", key):
            whole[key] = value
    return whole


def is_encoder(key):
    return (key in ("cls_token", "pos_embed")
            or key.startswith(("patch_embed.", "blocks.", "norm.")))


def grid_of(pos, size, patch):
    """(h, w) in patches of a table of positions (1, 1 + L, D): as `size` says, or square."""
    n = pos.shape[1] - 1
    if size is not None:
        h, w = size[0] // patch, size[1] // patch
        if h * w != n:
            raise CheckpointError(f"images of {size[0]}x{size[1]} have {h}x{w} patches of {patch}, "
                                  f"and it has {n} positions")
        return h, w
    side = math.isqrt(n)
    if side * side != n or not n:
        raise CheckpointError(f"{n} positions are no square grid after one class token; where they "
                              "are another grid, --init-size says which (no distilled models, no "
                              "register tokens, no tables without a class token, as timm's "
                              "no_embed_class)")
    # rows of the true grid resemble their neighbours; those of a wrong one are scrambled
    table, steps = pos[0, 1:].float(), {side: math.inf}
    for h in (h for h in range(-(-side // 4), 4 * side + 1) if n % h == 0 and 1 < h < n):
        grid = table.reshape(h, n // h, -1)
        steps[h] = (grid[1:] - grid[:-1]).square().mean().item()
    best = min(steps, key=steps.get)
    if steps[best] < 0.5 * steps[side]:
        raise CheckpointError(f"its {n} positions look like {best}x{n // best} patches, not "
                              f"{side}x{side}: say the size of its images with --init-size")
    return side, side


def config_of(state, layout, known, heads, size):
    """(VisionTransformer's arguments, notes) for a state dict: from its shapes, and from `known`,
    the config of transformers or timm, where there is one."""
    own = known.get("model_args")                       # timm's
    own = own if isinstance(own, dict) else {}
    for name, its in (("image_size", "img_size"), ("hidden_act", "act_layer"),
                      ("num_attention_heads", "num_heads")):
        known = {name: own[its]} | known if own.get(its) is not None else known
    weight, pos = state["patch_embed.proj.weight"], state.get("pos_embed", torch.zeros(0))
    if (weight.ndim != 4 or pos.ndim != 3 or weight.shape[2] != weight.shape[3]
            or pos.shape[2] != weight.shape[0] or 0 in weight.shape or 0 in pos.shape):
        raise CheckpointError(f"patch projection {tuple(weight.shape)} and pos_embed "
                              f"{tuple(pos.shape)} are not those of a ViT")
    unlike = [f"{words} ({key:.60})" for pattern, words in UNLIKE for key in state
              if re.search(pattern, key)]
    act = known.get("hidden_act", "gelu")
    if act != "gelu" or "quickgelu" in str(known.get("architecture")):
        unlike.append(f"another activation ({act if act != 'gelu' else 'quick_gelu'!r:.20})")
    if "cls_token" not in state:
        unlike.append("no class token")
    if unlike:
        raise CheckpointError(f"a ViT with {unlike[0]}, unlike that of MAE and MoCo v3: its "
                              "features would be others")
    dim, in_chans, patch, _ = weight.shape
    hidden = state.get("blocks.0.mlp.fc1.bias", torch.empty(4 * dim)).numel()
    if "image_size" in known:
        stated = known["image_size"]
        size = size or ([stated, stated] if type(stated) is int else stated)
        if not isinstance(size, (list, tuple)) or [type(side) for side in size] != [int, int]:
            raise CheckpointError(f"its image_size is {stated!r:.40}")
    stated, notes = known.get("num_attention_heads"), []
    if stated is not None and heads not in (None, stated):
        raise CheckpointError(f"its config.json says {stated!r:.20} heads, not {heads}")
    heads = stated or heads
    if heads is None:                                   # they leave no trace in the shapes
        usual = {192: 3, 384: 12 if layout == "MoCo v3" else 6, 768: 12, 1024: 16, 1280: 16,
                 1408: 16, 1664: 16}                    # giant and gigantic
        heads = usual.get(dim, max(dim // 64, 1))
        more = "" if dim in usual else "; no usual ViT has this width"
        more = "; a ViT-S has 6, that of MoCo v3 12" if dim == 384 else more
        notes.append(f"heads: {heads} assumed ({dim // heads} wide{more}); --heads says otherwise")
    if known.get("layer_norm_eps", 1e-6) != 1e-6:
        notes.append(f"its norms add {known['layer_norm_eps']!r:.10} to the variance, here 1e-06")
    return dict(img_size=[side * patch for side in grid_of(pos, size, patch)], patch_size=patch,
                in_chans=in_chans, dim=dim, depth=depth_of(state), heads=heads,
                mlp_ratio=hidden / dim), notes


def depth_of(state, blocks="blocks."):
    """How many blocks there are."""
    return len({key.split(".")[1] for key in state if key.startswith(blocks)})


def check_config(config, state):
    """Refuse what no ViT is, before one of that size is made: a file may claim any width."""
    sides = config.get("img_size")
    pair = isinstance(sides, (list, tuple)) and len(sides) == 2
    claims = [("img_size", side) for side in (sides if pair else [sides])]
    claims += [(k, v) for k, v in config.items() if k in LARGEST]
    wrong = [f"{k} {v!r:.40}" for k, v in claims
             if type(v) is not int or not 1 <= v <= LARGEST.get(k, 16384)]
    if not finite([config.get("mlp_ratio", 4.0)], 1e-3, 64):
        wrong.append(f"mlp_ratio {config['mlp_ratio']!r:.40}")
    blocks, width = depth_of(state), state["cls_token"].numel() if "cls_token" in state else 0
    if config.get("depth", blocks) != blocks:
        wrong.append(f"{config['depth']} blocks and has {blocks}")
    if config.get("dim", width) != width:
        wrong.append(f"a width of {config['dim']} and has {width}")
    if wrong:
        raise CheckpointError(f"refused, it claims a ViT with {wrong[0]}")


def finite(values, low, high):
    return isinstance(values, (list, tuple)) and all(
        isinstance(v, (int, float)) and low <= v <= high for v in values)


def check_meta(meta, config):
    """Mean, std (a number a channel) and range (low, high) that a file gives for its images."""
    channels = config.get("in_chans", 3)
    limits = dict(mean=(-1e4, 1e4, channels), std=(1e-6, 1e4, channels), range=(-1e30, 1e30, 2))
    wrong = [name for name, (low, high, n) in limits.items() if meta.get(name) is not None
             and not (finite(meta[name], low, high) and len(meta[name]) == n)]
    if not wrong and meta.get("range") is not None and meta["range"][0] >= meta["range"][1]:
        wrong = ["range"]
    if not isinstance(meta.get("system", ""), str):
        wrong.append("system")
    if wrong:
        raise CheckpointError(f"refused, its {wrong[0]} is {meta[wrong[0]]!r:.60}, for images of "
                              f"{channels} channels (in it, or in preprocessor_config.json)")


def check_weights(state):
    """Refuse weights that are no numbers: NaN, infinite or beyond any use."""
    for name, tensor in state.items():
        if not tensor.is_floating_point():
            raise CheckpointError(f"{name} holds {str(tensor.dtype).removeprefix('torch.')}, no "
                                  "floating-point numbers (quantised weights are not read)")
        if not (tensor.float().abs() < 1e30).all():
            raise CheckpointError(f"{name} holds what is not a finite number")


def check_linear(content, path, width=None):
    """Refuse a classifier-*.pt that evaluate.py did not write, or not for features of `width`."""
    lacking = "not a classifier that evaluate.py wrote"
    with naming(path, lacking):
        head, classes, channels = content["classifier"], content["classes"], len(content["mean"])
        texts = [*classes, content["checkpoint"], content["encoder_digest"]]
        if not (head["weight"].ndim == 2 and len(classes) > 0 and len(content["std"]) == channels
                and head["bias"].shape == head["weight"].shape[:1] == (len(classes),)
                and isinstance(head["normalise"], bool)
                and all(isinstance(text, str) for text in texts)):
            raise CheckpointError(lacking)
        if width not in (None, head["weight"].shape[1]):
            raise CheckpointError(f"for features {head['weight'].shape[1]} wide, not {width}")
        check_weights({k: head[k] for k in ("weight", "bias")})
        check_meta(content, dict(in_chans=channels))


def read_encoder(path, weights="base", heads=None, size=None):
    """The ViT in a checkpoint file (or in the folder of a run, or of transformers).

    Returns a dict: state (encoder tensors under the official names), config (arguments of
    VisionTransformer), rest (every other tensor found beside them), meta (what the file says
    besides: mean, std, range, system, ...), layout, notes (what was assumed), path, digest.
    weights: "base", "momentum" or "ema", for files that hold several. heads, size (h, w) in
    pixels: for files that do not state them; without, heads are guessed and images square.
    """
    path = locate(path)
    content = read(path)
    with naming(path):
        state, rest, layout, notes = unwrap(content, weights)
        config, meta = content.get("config"), content.get("meta")
        if isinstance(config, dict) and OURS <= set(config):
            layout, meta = "ours", meta if isinstance(meta, dict) else {}
            for name, asked, stated in (("heads", heads, config.get("heads")),
                                        ("size", size and list(size), config["img_size"])):
                if asked is not None and asked != stated:
                    raise CheckpointError(f"its {name} is {stated!r:.40}, not {asked}")
        else:
            known, shown = beside(path, "config.json"), beside(path, "preprocessor_config.json")
            widths = known.get("hidden_size"), known.get("num_features")
            if os.path.basename(path) not in HUB_FILES and state["patch_embed.proj.weight"].shape[
                    0] not in widths:                       # of other weights in this folder
                known = shown = {}
            config, more = config_of(state, layout, known, heads, size)
            notes += more
            meta = foreign_meta(known, shown, config)
        check_config(config, state)
        check_meta(meta, config)
        encoder = {k: v for k, v in state.items() if is_encoder(k)}
        match(encoder, config)
        check_weights(encoder)
    with open(path, "rb") as f:
        file_digest = hashlib.file_digest(f, "sha256").hexdigest()[:12]
    rest |= {k: v for k, v in state.items() if k not in encoder}
    return dict(state=encoder, config=config, meta=meta, rest=rest, layout=layout, path=path,
                notes=notes, digest=file_digest)


def match(encoder, config):
    """Refuse tensors that are not, name by name, those of VisionTransformer(**config)."""
    try:
        with torch.device("meta"):
            expected = VisionTransformer(**config).state_dict()
    except (TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"not a ViT that can be rebuilt ({error})") from None
    missing, surplus = sorted(set(expected) - set(encoder)), sorted(set(encoder) - set(expected))
    wrong = [k for k in expected if k in encoder and encoder[k].shape != expected[k].shape]
    if missing or surplus or wrong:
        raise CheckpointError(f"{len(missing)} encoder tensors missing, {len(surplus)} unknown, "
                              f"{len(wrong)} of another shape; first: "
                              f"{(missing + surplus + wrong)[0]}")


def foreign_meta(known, shown, config):
    """meta from the JSON files of transformers or timm: statistics, range, the MAE decoder's
    settings."""
    meta, factor = {}, shown.get("rescale_factor", 1 / 255) if shown.get("do_rescale", True) else 1
    if "decoder_num_attention_heads" in known:
        meta["decoder"] = dict(decoder_heads=known["decoder_num_attention_heads"],
                               norm_pix_loss=known.get("norm_pix_loss") is True)
    timm = known.get("pretrained_cfg")
    if isinstance(timm, dict) and not shown:            # of the images that it was first trained on
        meta |= {name: timm[name] for name in ("mean", "std") if isinstance(timm.get(name), list)
                 and len(timm[name]) == config["in_chans"]}
    elif shown.get("do_normalize", True):
        meta |= dict(mean=shown.get("image_mean"), std=shown.get("image_std"))
    else:
        meta |= dict(mean=[0.0] * config["in_chans"], std=[1.0] * config["in_chans"])
    own = shown.get("value_range")                      # of our own exports
    if finite(own, -1e30, 1e30) and len(own) == 2 and own[0] < own[1] and finite(
            meta["mean"], -1e4, 1e4):
        meta |= dict(range=own, mean=[m - own[0] / (own[1] - own[0]) for m in meta["mean"]])
    elif finite([factor], 1e-12, 1e12) and 1 / factor > 256:                # of deeper images
        meta["range"] = [0.0, 1 / factor]
    elif finite([factor], 1e-12, 1e12) and factor != 1 / 255:   # ours are divided by 255
        for name in ("mean", "std"):
            if finite(meta.get(name), -1e6, 1e6):
                meta[name] = [value / (255 * factor) for value in meta[name]]
    return meta


def fit(source, img_size=None, in_chans=None):
    """The encoder of `read_encoder` for another image size or number of channels: (state, config).

    Positions are carried, resampled (bicubic) for another grid: MoCo v3's table is not MAE's, and
    trained ones exist. Channels: the patch projection is summed to one, else repeated in turn and
    scaled by old / new.
    """
    state, config = dict(source["state"]), dict(source["config"])
    patch = config["patch_size"]
    if in_chans is not None and in_chans != config["in_chans"]:
        weight = state["patch_embed.proj.weight"]
        old = config["in_chans"]
        if in_chans == 1:
            weight = weight.sum(1, keepdim=True)
        else:
            weight = weight[:, [i % old for i in range(in_chans)]] * (old / in_chans)
        state["patch_embed.proj.weight"] = weight
        config["in_chans"] = in_chans
    if img_size is not None and list(img_size) != list(config["img_size"]):
        old = [s // patch for s in config["img_size"]]
        new = [s // patch for s in img_size]
        pos = state["pos_embed"]
        if pos.shape[1] != 1 + old[0] * old[1]:
            raise CheckpointError(f"{pos.shape[1] - 1} positions are no grid of {old[0]}x{old[1]}")
        if old != new and min(new) > 0:
            grid = pos[:, 1:].reshape(1, *old, -1).permute(0, 3, 1, 2)
            grid = F.interpolate(grid.float(), size=new, mode="bicubic", align_corners=False)
            grid = grid.to(pos.dtype).permute(0, 2, 3, 1).flatten(1, 2)
            state["pos_embed"] = torch.cat([pos[:, :1], grid], 1)
        config["img_size"] = list(img_size)
    return state, config


def there(path):
    """Whether there may be a checkpoint: a file, a folder, or a model's name on the hub."""
    return os.path.exists(path) or bool(HUB_NAME.fullmatch(path))


def start(args):
    """(source, state, config) of the encoder that a training stage begins with: that of --init, for
    --img-size and --in-chans, or with --init none the architecture alone, with source None."""
    if args.init == "none":
        (patch, dim, depth, heads), _ = ARCHS[args.arch]
        return None, None, dict(img_size=args.img_size, patch_size=args.patch_size or patch,
                                in_chans=args.in_chans or 3, dim=dim, depth=depth,
                                heads=args.heads or heads)
    weights = getattr(args, "weights", "base")
    source = read_encoder(args.init, weights, args.heads, args.init_size)
    return source, *fit(source, args.img_size, args.in_chans)


def decoder_config(source, norm_pix_loss=None):
    """MaskedAutoencoder's arguments for the MAE decoder in a file of `read_encoder`.

    As our files and transformers' say, else from shapes; norm_pix_loss is nowhere in the other
    layouts: False unless given.
    """
    rest, known = source["rest"], source["meta"].get("decoder") or {}
    dim, depth = rest["decoder_embed.weight"].shape[0], depth_of(rest, "decoder_blocks.")
    # heads leave no trace in the shapes; MAE's have a width of 32
    heads = known.get("decoder_heads", max(dim // 32, 1)) if isinstance(known, dict) else 0
    if "decoder_heads" not in known:
        source["notes"].append(f"decoder: {heads} heads assumed")
    if (type(heads) is not int or not 0 < heads <= LARGEST["heads"] or dim % heads
            or depth > LARGEST["depth"]):
        raise CheckpointError(f"{source['path']}: refused, it claims a decoder of {depth} blocks, "
                              f"width {dim} and {heads!r:.20} heads")
    if norm_pix_loss is None:
        norm_pix_loss = known.get("norm_pix_loss", source["layout"] == "ours")
    return dict(decoder_dim=dim, decoder_depth=depth, decoder_heads=heads,
                norm_pix_loss=norm_pix_loss)


def report(source, taken=()):
    """Lines that say what a file gave: layout, tensors taken and left out, what was assumed."""
    c = source["config"]
    left = [k for k in source["rest"] if k not in taken]
    more = f", {len(taken)} more" if taken else ""
    lines = [f"{source['path']}: {source['layout']} layout, ViT of width {c['dim']}, {c['depth']} "
             f"blocks, {c['heads']} heads, patch {c['patch_size']}, images of "
             f"{c['img_size'][0]}x{c['img_size'][1]}; {len(source['state'])} encoder tensors "
             f"loaded{more}"]
    lines += [f"  {note}" for note in source["notes"]]
    if left:
        kinds = sorted({k.split(".")[0] for k in left})
        lines.append(f"  left out: {len(left)} tensors that are not of the encoder "
                     f"({', '.join(kinds[:6])})")
    return lines


def encoder_file(model, meta):
    """What encoder.pt holds: the encoder's weights under the official names and what rebuilds it.

    A MoCo v3 projector is kept beside them (head.*): fine-tuning can start from its first layer.
    """
    encoder = getattr(model, "base_encoder", model)
    state = {k: v.detach().cpu() for k, v in encoder.state_dict().items()
             if is_encoder(k) or k.startswith("head.")}
    return {"model": state, "config": encoder.config, "meta": meta}


def load_classifier(path):
    """(Classifier in evaluation mode, what classifier.pt holds besides) of finetune.py.

    Images (N, C, H, W) normalised with its "mean" and "std" -> logits (N, classes), as "classes".
    """
    path = in_folder(path, "classifier.pt")
    content = read(path)
    lacking = "not a classifier that finetune.py wrote"
    with naming(path, lacking):
        state, config, head, classes = (content[k] for k in ("model", "config", "head", "classes"))
        if (head["kind"] not in ("linear", "projector") or None in (content["mean"], content["std"])
                or not all(isinstance(name, str) for name in classes)):
            raise CheckpointError(lacking)
        check_config(config, state)
        check_meta(content, config)
        check_weights(state)
        with torch.device("meta"):                      # a file may claim any width
            net = Classifier(config, head, len(classes))
        net.load_state_dict(state, assign=True)
    return net.float().eval(), content


# ------------------------------------------------------------------------------ use and export
class Encoder(VisionTransformer):
    """A frozen VisionTransformer that knows the statistics of its images.

    mean, std: (C, 1, 1); config["img_size"]: the size it takes, (H, W) in pixels.
    """

    def __init__(self, mean, std, **config):
        super().__init__(**config)
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(values)[:, None, None], persistent=False)
        self.eval().requires_grad_(False)

    def normalise(self, images):
        """Floats in [0, 1], (N, C, H, W) or (C, H, W) -> what the network takes, float32."""
        if not images.is_floating_point():
            raise ValueError(f"images are floats in [0, 1], not {images.dtype}: divide by 255")
        return (images.float() - self.mean) / self.std


def statistics(source):
    """(mean, std) of the images of `read_encoder`; ImageNet's where the file says nothing."""
    n = source["config"]["in_chans"]
    usual = [list(v) if n == 3 else [sum(v) / 3] * n for v in IMAGENET]
    return [source["meta"].get(name) or v for name, v in zip(("mean", "std"), usual)]


def range_of(source):
    """(low, high) of the images of `read_encoder`, or None, as of 8 bits whatever was asked."""
    meta = source["meta"]
    return None if meta.get("bits") == 8 else meta.get("range")


def load(path, weights="base", heads=None, size=None):
    """A ready, frozen `Encoder` in evaluation mode, on the CPU: see the top of this file."""
    source = read_encoder(path, weights, heads, size)
    encoder = Encoder(*map(list, statistics(source)), **source["config"])
    encoder.load_state_dict(source["state"])
    return encoder


def export(source, kind, path):
    """Write the encoder of `read_encoder` for other libraries; says how to load it.

    timm: a state dict (safetensors if `path` ends so) for load_state_dict, strict. hf: a folder
    for transformers' AutoModel and AutoImageProcessor. onnx: how to, with torch's own exporter.
    """
    state, config = source["state"], source["config"]
    state = {k: v.contiguous().clone() for k, v in state.items()}
    if kind == "timm":
        safe = path.endswith(".safetensors")
        save(state, path, write_safetensors if safe else torch.save)
        how = f"safetensors.torch.load_file({path!r})" if safe else f"torch.load({path!r})"
        names = dict(embed_dim="dim", num_heads="heads") | {k: k for k in (
            "img_size", "patch_size", "in_chans", "depth", "mlp_ratio")}
        mean, std = ([round(v, 4) for v in values] for values in statistics(source))
        ends = range_of(source)
        of_range = f"; the values {ends[0]:g} and {ends[1]:g} are 0 and 1" if ends else ""
        given = ", ".join(f"{theirs}={config[ours]}" for theirs, ours in names.items())
        return (f"wrote {path}; load it with\n  model = timm.models.VisionTransformer({given}, "
                f"num_classes=0)\n  model.load_state_dict({how}, strict=True)\n"
                f"  # for images in [0, 1], less {mean}, by {std}{of_range}")
    if kind == "onnx":
        raise CheckpointError(
            "onnx: torch's exporter needs another package (pip install onnxscript); with it: "
            "torch.onnx.export(checkpoint.load(FILE), (images,), 'encoder.onnx', dynamo=True, "
            "dynamic_shapes=({0: 'n'},))")
    for name, content in zip(("config.json", "preprocessor_config.json"), hf_settings(source)):
        text = json.dumps(content, indent=1).encode()
        save(text, os.path.join(path, name), lambda content, f: f.write(content))
    save(hf_state(state), os.path.join(path, "model.safetensors"), write_safetensors)
    return (f"wrote {path}/; load it with\n  model = transformers.AutoModel.from_pretrained("
            f"{path!r}, add_pooling_layer=False)\n"
            f"  processor = transformers.AutoImageProcessor.from_pretrained({path!r})\n"
            "  # it resizes the whole image; evaluate.py crops the centre of images of other sizes")


# official name -> that of the files on the hub, in turn
TO_HF = ((r"^cls_token", "embeddings.cls_token"), (r"^pos_embed", "embeddings.position_embeddings"),
         (r"^patch_embed\.proj", "embeddings.patch_embeddings.projection"),
         (r"^norm\.", "layernorm."), (r"^blocks\.", "encoder.layer."),
         (r"\.norm1\.", ".layernorm_before."), (r"\.norm2\.", ".layernorm_after."),
         (r"\.attn\.proj\.", ".attention.output.dense."), (r"\.mlp\.fc1\.", ".intermediate.dense."),
         (r"\.mlp\.fc2\.", ".output.dense."))


def hf_state(state):
    """The encoder under the names of the files on the hub."""
    names = {}
    for key, value in state.items():
        for pattern, new in TO_HF:
            key = re.sub(pattern, new, key)
        if ".attn.qkv." in key:
            for part, third in zip(("query", "key", "value"), value.chunk(3)):
                names[key.replace(".attn.qkv.", f".attention.attention.{part}.")] = third
        else:
            names[key] = value
    return names


def hf_settings(source):
    """(config.json, preprocessor_config.json) of the encoder."""
    config = source["config"]
    height, width = config["img_size"]
    mean, std = statistics(source)
    low, high = range_of(source) or (0, 255)
    vit = dict(model_type="vit", architectures=["ViTModel"], hidden_size=config["dim"],
               num_hidden_layers=config["depth"], num_attention_heads=config["heads"],
               intermediate_size=int(config["dim"] * config["mlp_ratio"]), layer_norm_eps=1e-6,
               image_size=height if height == width else [height, width],
               patch_size=config["patch_size"], num_channels=config["in_chans"])
    # (x - low) / (high - low), then mean and std: the processor knows a factor alone
    images = dict(image_processor_type="ViTImageProcessor", size=dict(height=height, width=width),
                  resample=3, rescale_factor=1 / (high - low),
                  image_mean=[m + low / (high - low) for m in mean], image_std=list(std))
    if range_of(source):
        images["value_range"] = [low, high]             # for `foreign_meta`; transformers keeps it
    return vit, images
