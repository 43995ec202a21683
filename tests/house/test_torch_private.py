"""Private names of torch stand in one file of the package."""

import ast

from tests.house.test_layers import ROOT, nodes, sources

PRIVATE = ROOT / "lottery_sparse" / "ops" / "common" / "torch_private.py"


def private_names(path):
    """Dotted names that begin with torch and have a private part, read or imported."""
    for node in nodes(path):
        names = []
        if isinstance(node, ast.Attribute):
            names = [ast.unparse(node)]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            first, *parts = name.split(".")
            private = [p for p in parts if p.startswith("_") and not p.startswith("__")]
            if first == "torch" and private:
                yield name


def test_private_names_of_torch_are_in_one_file(tmp_path):
    found = {path: set(private_names(path)) for path in sources("lottery_sparse")}
    assert not {p.name: names for p, names in found.items() if names and p != PRIVATE}
    file = tmp_path / "a.py"
    file.write_text("import torch\nfrom torch.optim import _a\ntorch.cpu._b(torch.__version__)\n")
    assert set(private_names(file)) == {"torch.optim._a", "torch.cpu._b"}
