"""The shape of the code: who imports whom, what stands alone when it is copied, how long lines are."""
import ast
import os
import shutil
import subprocess
import sys

import pytest

from conftest import QUIET, ROOT

STAGES = {"mae_pretrain", "graft_train", "finetune", "evaluate", "segment", "analyze", "reproduce"}
LIBRARY = {"model", "data", "augment", "checkpoint", "run"}
OPTIONAL = {"matplotlib", "sklearn", "safetensors", "tensorboard", "timm", "transformers", "onnx",
            "onnxruntime"}
# of our own modules, and of others beside Python's own
MAY = {"model": (set(), {"torch"}), "augment": (set(), {"torch"}),
       "data": ({"augment"}, {"torch", "torchvision", "numpy", "PIL"}),
       "checkpoint": ({"model"}, {"torch"}),
       "run": (LIBRARY, {"torch"})}


def sources(folder=ROOT):
    """{module: syntax tree} of the files of a folder that belong to the product."""
    found = {}
    for name in os.listdir(folder):
        if name.endswith(".py") and not name.startswith("test_"):
            with open(os.path.join(folder, name)) as f:
                found[name.removesuffix(".py")] = ast.parse(f.read(), name)
    return found


def imports(tree):
    """(top-level names imported at the top of a module, those imported inside a function)."""
    def names(node):
        if isinstance(node, ast.Import):
            return {alias.name.split(".")[0] for alias in node.names}
        return {node.module.split(".")[0]} if isinstance(node, ast.ImportFrom) else set()

    inner = set()
    for function in ast.walk(tree):
        if isinstance(function, (ast.FunctionDef, ast.Lambda)):
            inner |= set().union(*(names(node) for node in ast.walk(function)))
    outer, todo = set(), list(tree.body)
    while todo:
        node = todo.pop()
        if not isinstance(node, ast.FunctionDef):
            outer |= names(node)
            todo += ast.iter_child_nodes(node)
    return outer, inner


@pytest.fixture(scope="module")
def tree():
    return {module: imports(source) for module, source in sources().items()}


def test_the_top_level_holds_stages_and_library_alone(tree):
    assert set(tree) <= STAGES | LIBRARY and LIBRARY <= set(tree)


@pytest.mark.parametrize("module", MAY)
def test_library_files_import_what_they_may(tree, module):
    ours, others = MAY[module]
    allowed = ours | others | set(sys.stdlib_module_names)
    assert tree[module][0] <= allowed, tree[module][0] - allowed


def test_stages_import_the_library_and_no_other_stage(tree):
    allowed = LIBRARY | {"torch", "torchvision", "numpy", "PIL"} | set(sys.stdlib_module_names)
    for module in STAGES & set(tree):
        more = {"analyze": {"figures"}, "reproduce": STAGES}.get(module, set())
        assert tree[module][0] <= allowed | more, (module, tree[module][0] - allowed)


def test_imports_inside_functions_are_of_optional_packages(tree):
    for module, (_, inner) in tree.items():
        assert inner <= OPTIONAL | {"torch", "torchvision"}, (module, inner)
        for node in ast.walk(sources()[module]):        # of torch only what needs a further package
            if isinstance(node, ast.ImportFrom) and node.col_offset and "torch" in node.module:
                assert "tensorboard" in node.module or "models" in node.module, (module, node.module)


def test_there_is_no_circle(tree):
    left = {module: outer & set(tree) for module, (outer, _) in tree.items()}
    while left:
        ready = {module for module, needed in left.items() if not needed & set(left)}
        assert ready, f"a circle among {sorted(left)}"
        left = {module: needed for module, needed in left.items() if module not in ready}


def test_no_line_is_longer_than_100_columns():
    long = []
    for folder, _, names in os.walk(ROOT):
        if os.path.relpath(folder, ROOT).split(os.sep)[0] in (".", "tests", "bench", "figures"):
            for name in sorted(name for name in names if name.endswith(".py")):
                with open(os.path.join(folder, name)) as f:
                    long += [f"{name}:{i}" for i, line in enumerate(f, 1) if len(line) > 101]
    assert not long, long


def test_the_diff_of_the_two_steps_is_the_method():
    files = [os.path.join(ROOT, name) for name in ("mae_pretrain.py", "graft_train.py")]
    diff = subprocess.run(["diff", *files], capture_output=True, text=True).stdout
    assert 0 < sum(line.startswith(("<", ">")) for line in diff.splitlines()) <= 110


COPIES = {
    "model": "net = model.MaskedAutoencoder(16, 1, 2, img_size=16, patch_size=8, dim=24, depth=2, "
             "heads=3); net(torch.zeros(2, 3, 16, 16), 0.5)[0].backward()",
    "augment": "x = augment.augment(torch.rand(2, 3, 16, 16), torch.arange(2), "
               "augment.MOCO_VIEWS[0], 0); assert x.shape == (2, 3, 16, 16)"}


@pytest.mark.parametrize("module", COPIES)
def test_a_copied_file_works_alone(tmp_path, module):
    shutil.copy(os.path.join(ROOT, f"{module}.py"), tmp_path)
    run_in(tmp_path, "-c", f"import torch, {module}; {COPIES[module]}")


def test_grafting_runs_when_copied_with_five_files(tmp_path):
    for name in ("graft_train", *LIBRARY):
        shutil.copy(os.path.join(ROOT, f"{name}.py"), tmp_path)
    run_in(tmp_path, "graft_train.py", "--init", "none", "--arch", "vit_mini", "--img-size", "32",
           "--patch-size", "16", "--hidden-dim", "16", "--epochs", "1", "--batch-size", "2048", *QUIET)
    assert (tmp_path / "out/graft/encoder.pt").exists()


def run_in(folder, *command):
    """Python in an empty folder that knows of nothing else of ours."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "DATA")}
    ended = subprocess.run([sys.executable, *command], cwd=folder, env=environment, text=True,
                           capture_output=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
