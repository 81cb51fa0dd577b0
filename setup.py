"Build metadata; every value comes from settings.ini"
from configparser import ConfigParser
from pathlib import Path

from setuptools import setup

cfg = ConfigParser(delimiters=['='])
cfg.read('settings.ini', encoding='utf-8')
s = cfg['DEFAULT']
package = s['lib_path']
extras = ('worker', 'local', 'dev', 'docs', 'comfy', 'quality')
# the image's wheel is built from a part of the package (nbs/tools/install.py) and offers what that part has
offered = {
    'nbdev': {'_modidx': f'{s["lib_name"]}={package}._modidx:d'},
    'console_scripts': {'cli': f'wan-avatar={package}.cli:app'},
}
entry_points = {
    kind: [entry for module, entry in entries.items() if Path(package, f'{module}.py').exists()]
    for kind, entries in offered.items()
}
setup(name=s['lib_name'], version=s['version'], description=s['description'], url=s['git_url'],
      author=s['author'], author_email=s['author_email'], python_requires=f">={s['min_python']}",
      packages=[package], package_data={package: ['workflows/*.json', 'page_files/*', 'models.lock.json', 'py.typed']},
      install_requires=s['requirements'].split(),
      extras_require={e: s[f'{e}_requirements'].split() for e in extras},
      entry_points={kind: entries for kind, entries in entry_points.items() if entries})
