"Everything is in settings.ini; edit there, not here"
from configparser import ConfigParser
from glob import glob
from pathlib import Path

from setuptools import find_packages, setup

c = ConfigParser(delimiters=['='])
c.read('settings.ini', encoding='utf-8')
c = c['DEFAULT']
words = lambda k: c.get(k, '').split()

setup(
    name=c['lib_name'], version=c['version'], description=c['description'], keywords=c['keywords'],
    author=c['author'], author_email=c['author_email'], license='Apache-2.0', url=c['git_url'],
    python_requires='>=' + c['min_python'], install_requires=words('requirements'),
    extras_require={k: words(f'{k}_requirements') for k in ('dev', 'annotate', 'encoders', 'video')},
    packages=find_packages(include=[c['lib_path'] + '*']), package_data={c['lib_path']: ['py.typed']},
    options=dict(editable_wheel=dict(mode='compat')), # a plain path, which type checkers and editors can follow
    data_files=[(f'share/partal_nb/{kind}', sorted(glob(f'nbs/{kind}/*.ipynb'))) for kind in ('runs', 'explore')],  # papermill templates, voila apps
    long_description=Path('README.md').read_text(encoding='utf-8'), long_description_content_type='text/markdown',
    entry_points=dict(console_scripts=words('console_scripts'), nbdev=[f"{c['lib_path']}={c['lib_path']}._modidx:d"]),
)
