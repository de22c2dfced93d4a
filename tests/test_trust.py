"""Nothing reads a model without saying whether code that comes with it may run."""

import ast
from pathlib import Path

import mikv

READERS = {"AutoConfig", "AutoTokenizer", "AutoModelForCausalLM"}


def test_every_reading_of_a_model_says_whether_its_code_is_trusted() -> None:
    silent = []
    for path in Path(mikv.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                owner = node.func.value
                is_reader = isinstance(owner, ast.Name) and owner.id in READERS and node.func.attr.startswith("from_")
                said = {keyword.arg for keyword in node.keywords}
                if is_reader and not said & {"trust_remote_code", None}:
                    silent.append(f"{path.name}:{node.lineno}")
    assert not silent
