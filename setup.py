"Everything is in settings.ini; edit there, not here"
import re
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

c = ConfigParser(delimiters=['='])
c.read('settings.ini', encoding='utf-8')
c = c['DEFAULT']
words = lambda k: c.get(k, '').split()

lib, git = c['lib_name'], c['git_url']
site = c['doc_host'] + c['doc_baseurl'] + '/'
# notebooks that the command needs: papermill templates and explorers, beside the modules
notebooks = {f'{lib}.notebooks.{kind}': f'nbs/{kind}' for kind in ('runs', 'explore')}

def absolute(readme:str)->str: # a package index has none of the files beside README.md
    raw = git.replace('github.com', 'raw.githubusercontent.com')
    readme = re.sub(r'!\[(.*?)\]\((?!https?:)', rf'![\1]({raw}/{c["branch"]}/', readme)
    return re.sub(r'(?<!!)\[([^\]]*)\]\((?!https?:|#)', rf'[\1]({git}/blob/{c["branch"]}/', readme)

setup(
    name=lib, version=c['version'], description=c['description'], keywords=c['keywords'],
    author=c['author'], author_email=c['author_email'], license='Apache-2.0', url=site,
    project_urls=dict(Documentation=site, Source=git, Issues=f'{git}/issues',
                      Changelog=f'{git}/blob/{c["branch"]}/CHANGELOG.md'),
    classifiers=[
        'Development Status :: 3 - Alpha', f'Intended Audience :: {c["audience"]}', 'Operating System :: POSIX :: Linux',
        'Topic :: Scientific/Engineering :: Artificial Intelligence',
        'Topic :: Scientific/Engineering :: Image Recognition', 'Typing :: Typed',
        *(f'Programming Language :: Python :: {v}' for v in words('pythons'))],
    python_requires='>=' + c['min_python'], install_requires=words('requirements'),
    extras_require={k: words(f'{k}_requirements') for k in words('extras')},
    packages=[*find_packages(include=[lib + '*']), *notebooks], package_dir=notebooks,
    package_data={lib: ['py.typed'], **{name: ['*.ipynb'] for name in notebooks}},
    options=dict(editable_wheel=dict(mode='compat')), # a plain path, which type checkers and editors can follow
    long_description=absolute(Path('README.md').read_text(encoding='utf-8')),
    long_description_content_type='text/markdown',
    entry_points=dict(console_scripts=words('console_scripts'), nbdev=[f"{lib}={lib}._modidx:d"]),
)
