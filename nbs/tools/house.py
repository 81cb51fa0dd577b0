"""How readable the house is, in numbers: `make house`, a row for each notebook and the totals

Columns: lines over 120 columns of the exported module; base classes that exist only to be cut in two (exactly one
subclass, in the same module, used nowhere else); padding lessons (a cell that only looks at a name: `callable`,
`__doc__`, `isinstance`, `issubclass`); lessons for each export cell; findings of `mypy --strict`.
Standard library only."""
import ast
import json
import re
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WIDTH = 120
LOOKS = ('callable', 'isinstance', 'issubclass')


@dataclass
class Row:
    "One notebook and its module"
    name: str
    lines: int
    wide: int
    scissors: list[str]
    padding: int
    exports: int
    lessons: int
    findings: int

    @property
    def share(self) -> float: # lessons for each export cell
        return self.lessons / self.exports if self.exports else 0.0


def source(cell: dict) -> str: return ''.join(cell['source'])


def is_export(cell: dict) -> bool:
    return cell['cell_type'] == 'code' and re.search(r'^#\|\s*exports?\b', source(cell), re.M) is not None


def is_lesson(cell: dict) -> bool:
    "Code that shows something; imports and the cell that exports show nothing"
    if cell['cell_type'] != 'code' or is_export(cell): return False
    if re.match(r'#\|\s*(default_exp|hide)', source(cell)): return False
    return any(not isinstance(node, ast.Import | ast.ImportFrom) for node in ast.parse(source(cell)).body)


def is_padding(cell: dict) -> bool:
    "Does every statement only look at a name?"
    def looks(node: ast.stmt) -> bool:
        text = ast.unparse(node)
        called = {n.func.id for n in ast.walk(node) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
        return '__doc__' in text or bool(called) and called <= {*LOOKS, 'all', 'print'} and bool(called & set(LOOKS))
    body = [n for n in ast.parse(source(cell)).body if not isinstance(n, ast.Import | ast.ImportFrom)]
    return bool(body) and all(map(looks, body))


def scissors(tree: ast.Module, elsewhere: str) -> list[str]:
    "Base classes with one subclass in this module and no other use"
    classes = {n.name: n for n in tree.body if isinstance(n, ast.ClassDef)}
    used = [n.id for n in ast.walk(tree) if isinstance(n, ast.Name)]
    def subclasses(name: str) -> int:
        return sum(isinstance(b, ast.Name) and b.id == name for c in classes.values() for b in c.bases)
    return [n for n in classes if subclasses(n) == 1 and used.count(n) == 1 and not re.search(rf'\b{n}\b', elsewhere)]


def findings() -> dict[str, int]: # by module
    "What mypy finds under its strict rules, over the whole package"
    # without the list of pyproject.toml, which asks less of some modules
    command = [sys.executable, '-m', 'mypy', 'wan_avatar', '--config-file', 'nbs/tools/mypy_all.ini']
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return Counter(re.findall(r'^wan_avatar/(\w+)\.py:\d+: error', run.stdout, re.M))


def wide(text: str) -> list[str]:
    "Lines over the width; `__all__` is written by nbdev"
    written = re.sub(r'^__all__ = \[.*?\]$', '', text, flags=re.M | re.S)
    return [line for line in written.splitlines() if len(line) > WIDTH]


def row(notebook: Path, found: dict[str, int], texts: dict[str, str]) -> Row:
    "Measure one"
    cells = json.loads(notebook.read_text())['cells']
    named = next((m[1] for c in cells if (m := re.match(r'#\|\s*default_exp (\w+)', source(c)))), '')
    text = texts.get(named, '')
    elsewhere = '\n'.join(t for name, t in texts.items() if name != named)
    lessons = [c for c in cells if is_lesson(c)]

    return Row(notebook.stem, text.count('\n'), len(wide(text)), scissors(ast.parse(text), elsewhere),
               sum(map(is_padding, lessons)), sum(map(is_export, cells)), len(lessons), found.get(named, 0))


def house() -> list[Row]:
    "Every notebook that has a module"
    texts = {p.stem: p.read_text() for p in sorted((ROOT / 'wan_avatar').glob('*.py')) if p.stem[0] != '_'}
    found = findings()
    rows = [row(notebook, found, texts) for notebook in sorted((ROOT / 'nbs').glob('*.ipynb'))]
    return [r for r in rows if r.lines]


def table(rows: list[Row]) -> str:
    "As text, with the totals and the widths of tests and tools"
    names = ('lines', '> 120', 'cut', 'padding', 'exports', 'lessons', 'share', 'mypy')
    head = f'{"notebook":18}' + ''.join(f'{name:>9}' for name in names)
    def line(r: Row) -> str:
        return (f'{r.name:18}{r.lines:9}{r.wide:9}{len(r.scissors):9}{r.padding:9}{r.exports:9}{r.lessons:9}'
                f'{r.share:9.2f}{r.findings:9}')
    def total(name: str): return sum(getattr(r, name) for r in rows)
    whole = Row('package', total('lines'), total('wide'), [n for r in rows for n in r.scissors], total('padding'),
                total('exports'), total('lessons'), total('findings'))
    def lines(folder: str) -> int: return sum(len(wide(p.read_text())) for p in (ROOT / folder).glob('*.py'))
    said = [f'{folder}: {lines(folder)} lines over {WIDTH} columns' for folder in ('tests', 'nbs/tools')]
    clean = sum(r.findings == 0 for r in rows)
    said += [f'{clean} of {len(rows)} modules without a finding of mypy --strict']
    return '\n'.join([head, *map(line, rows), line(whole), *said])


if __name__ == '__main__': print(table(house()))
