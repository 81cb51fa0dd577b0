"""The documentation site, from the notebooks: `make docs` writes `_docs/html`

Each notebook is a page, as it was run, without what only nbdev reads; each module has a page that lists its API. Sphinx
builds both, and a warning, such as a link to a page that is not there, fails the build."""
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCE, SITE = ROOT / '_docs/source', ROOT / '_docs/html'
FIRST = ('index', 'guide_deploy', 'guide_research')
CONF = """
project, copyright, author = 'wan_avatar', '2026 onwards, wan_avatar contributors', 'wan_avatar contributors'
extensions = ['myst_nb', 'sphinx.ext.autodoc', 'sphinx.ext.viewcode']
html_theme, html_title = 'furo', 'wan_avatar'
nb_execution_mode = 'off'
myst_heading_anchors = 3
suppress_warnings = ['mystnb.unknown_mime_type', 'myst.header', 'misc.highlighting_failure']
autodoc_member_order, autodoc_typehints_format = 'bysource', 'short'
autodoc_mock_imports = ['torch', 'comfy', 'folder_paths', 'node_helpers', 'execution', 'server']
"""


def page(notebook: Path) -> dict:
    "A notebook as readers see it"
    found = json.loads(notebook.read_text().replace('](../runs/', '](runs/')) # `runs` lies beside the pages here
    cells = []
    for cell in found['cells']:
        text = ''.join(cell['source'])
        if re.match(r'#\|\s*(default_exp|hide)', text): continue
        text = re.sub(r'^#\|.*\n?', '', text, flags=re.M)
        silent = '#| echo: false' in ''.join(cell['source'])
        cell['metadata'] = {'tags': ['remove-input']} if silent else {}
        cells.append(cell | {'source': text})
    found['cells'] = cells
    return found


def lists(names: list[str], caption: str) -> str:
    return '\n'.join(['```{toctree}', f':caption: {caption}', ':maxdepth: 1', '', *names, '```', ''])


def lay_out() -> None:
    "Pages, pictures and the configuration"
    shutil.rmtree(SOURCE, ignore_errors=True)
    (SOURCE / 'api').mkdir(parents=True)
    notebooks = sorted((ROOT / 'nbs').glob('*.ipynb'))
    for notebook in notebooks: (SOURCE / notebook.name).write_text(json.dumps(page(notebook)))
    shutil.copytree(ROOT / 'nbs/images', SOURCE / 'images')
    unread = shutil.ignore_patterns('samples', 'local', 'demo', '*.jsonl', '*.log', '*.mp4', '*.ipynb')
    shutil.copytree(ROOT / 'runs', SOURCE / 'runs', ignore=unread)
    modules = [p.stem for p in sorted((ROOT / 'wan_avatar').glob('*.py')) if p.stem[0] != '_']
    for name in modules:
        api = f'```{{eval-rst}}\n.. automodule:: wan_avatar.{name}\n   :members:\n```'
        (SOURCE / f'api/{name}.md').write_text(f'# {name}\n\n{api}\n')
    measured = [str(p.relative_to(SOURCE).with_suffix('')) for p in sorted(SOURCE.glob('runs/gpu/*/table.md'))]
    pages = [n.stem for n in notebooks if n.stem not in FIRST]
    (SOURCE / 'contents.md').write_text('\n'.join([
        '# wan_avatar\n', lists(list(FIRST), 'Start'), lists(pages, 'Notebooks'), lists(measured, 'Measured'),
        lists([f'api/{m}' for m in modules], 'API')]))
    (SOURCE / 'conf.py').write_text(CONF + "root_doc = 'contents'\n")


def main() -> int:
    lay_out()
    command = [sys.executable, '-m', 'sphinx', '-b', 'html', '-W', '--keep-going', '-q', '-j', '2', SOURCE, SITE]
    done = subprocess.run(command, cwd=ROOT, check=False).returncode
    if not done: print(f'{SITE}/contents.html')
    return done


if __name__ == '__main__': sys.exit(main())
