"Build metadata; every value comes from settings.ini"
from configparser import ConfigParser
from setuptools import setup

cfg = ConfigParser(delimiters=['=']); cfg.read('settings.ini', encoding='utf-8')
s = cfg['DEFAULT']
extras = ('worker', 'local', 'dev', 'docs', 'comfy')
setup(name=s['lib_name'], version=s['version'], description=s['description'], url=s['git_url'],
      author=s['author'], author_email=s['author_email'], python_requires=f">={s['min_python']}",
      packages=[s['lib_path']], package_data={s['lib_path']: ['workflows/*.json', 'models.lock.json', 'py.typed']},
      install_requires=s['requirements'].split(),
      extras_require={e: s[f'{e}_requirements'].split() for e in extras},
      entry_points=dict(nbdev=[f"{s['lib_path']}={s['lib_path']}._modidx:d"],
                        console_scripts=[f"wan-avatar={s['lib_path']}.cli:app"]))
