"""The reference: a page a room, with what each module exports, as its docstrings say. Nothing is imported."""
import ast
import re

from notebooks import ROOT

SOURCE = re.compile(r"File to edit: (?:\.\./)*(nbs/\S+\.ipynb)")


def rooms() -> dict:
    "{room: its modules, in the order of their notebooks}"
    made = {}
    for path in sorted((ROOT / "attnnas").rglob("*.py")):
        source = SOURCE.search(path.read_text(encoding="utf-8"))
        if source: made.setdefault(path.relative_to(ROOT / "attnnas").parts[0], []).append((source[1], path))
    return {room: [path for _, path in sorted(modules)] for room, modules in made.items()}


def page(room: str, modules: list) -> str:
    "The page of a room in Markdown."
    return "\n\n".join([f"# {room}", *(module(path) for path in modules)]) + "\n"


def module(path) -> str:
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    lesson = "../" + SOURCE.search(text)[1].removeprefix("nbs/").replace(".ipynb", ".md")
    entries = [entry(node) for node in tree.body if getattr(node, "name", "_") in exported(tree)]
    return "\n\n".join([f"## {name}", f"{ast.get_docstring(tree)}. [Its lesson]({lesson}).", *entries])


def exported(tree) -> list:
    "What the module's `__all__` names."
    lists = [node.value for node in tree.body if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__"]
    return ast.literal_eval(lists[0]) if lists else []


def entry(node) -> str:
    "A function, or a class with its public methods."
    lines = [f"### {node.name}", f"```python\n{signature(node)}\n```", docstring(node)]
    for method in node.body if isinstance(node, ast.ClassDef) else ():
        if isinstance(method, ast.FunctionDef) and not method.name.startswith("_") and ast.get_docstring(method):
            lines += [f"```python\n{signature(method)}\n```", docstring(method)]
    return "\n\n".join(lines)


def signature(node) -> str:
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(map(ast.unparse, node.bases))
        return f"class {node.name}({bases})" if bases else f"class {node.name}"
    result = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"{node.name}({ast.unparse(node.args)}){result}"


def docstring(node) -> str:
    "As it stands in the code: its lines of parameters are laid out by hand."
    return f"```text\n{ast.get_docstring(node) or ''}\n```"
