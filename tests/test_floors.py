"""The three floors: imports only go down, and `llama` needs neither Ray nor pydantic."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FORBIDDEN = {
    "llama": {"cluster", "pipelines", "ray", "pydantic", "pyarrow", "typer", "rich"},
    "cluster": {"pipelines"},
    "pipelines": set(),
}


def imported_packages(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("floor", FORBIDDEN)
def test_imports_only_go_down(floor: str) -> None:
    files = sorted((ROOT / floor).rglob("*.py"))
    assert len(files) > 3, f"{floor} has vanished"
    offences = {str(f.relative_to(ROOT)): bad for f in files if (bad := imported_packages(f) & FORBIDDEN[floor])}
    assert not offences


def test_llama_runs_where_ray_and_pydantic_are_absent() -> None:
    program = (
        "import sys\n"
        "for name in ('ray', 'pydantic', 'pyarrow', 'transformers'): sys.modules[name] = None\n"
        "import llama, llama.hf, llama.tokenizer, llama.engine, llama.training.trainer, llama.training.checkpoint\n"
        "print('imported')"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout == "imported\n", result.stderr
