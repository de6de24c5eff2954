"The site: builds, no broken link, no page without a title, no entry without a description, and nothing asked of another host"
import inspect
import re
import subprocess
import sys
import threading
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib import import_module
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import yaml

from partal_nb._modidx import d
from partal_nb.docs import home, sidebar

ROOT = Path(__file__).parents[1]
NBS = ROOT/'nbs'
if sys.version_info < (3, 11): pytest.skip('smalldocs needs Python 3.11', allow_module_level=True)

class Page(HTMLParser):
    "What one page links to, loads, and can be linked at"
    def __init__(self, text):
        super().__init__()
        self.links, self.loads, self.ids, self.title, self.text, self._in = [], [], set(), '', '', ''
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        a, self._in = dict(attrs), tag
        if 'id' in a: self.ids.add(a['id'])
        if tag == 'a' and a.get('href'): self.links.append(a['href'])
        if tag in ('script', 'img', 'iframe') and a.get('src'): self.loads.append(a['src'])
        if tag == 'link' and a.get('rel') in ('stylesheet', 'icon'): self.loads.append(a['href'])

    def handle_data(self, data):
        self.text += data
        if self._in == 'title': self.title += data.strip()

    def handle_endtag(self, tag): self._in = ''

def read(site): return {p.relative_to(site).as_posix(): Page(p.read_text('utf-8')) for p in sorted(site.rglob('*.html'))}

def untitled(pages): return [name for name, p in pages.items() if not p.title]

def foreign(pages): return [(name, u) for name, p in pages.items() for u in p.loads if urlsplit(u).scheme in ('http', 'https') or u.startswith('//')]

def broken(pages, site):
    for name, p in pages.items():
        for u in p.links + p.loads:
            parts = urlsplit(u)
            if parts.scheme or u.startswith('//'): continue
            target = (site/name).parent/unquote(parts.path) if parts.path else site/name
            target = target/'index.html' if target.is_dir() else target
            if not target.is_file(): yield name, u
            elif parts.fragment and target.suffix == '.html':
                ids = pages[target.resolve().relative_to(site.resolve()).as_posix()].ids
                if unquote(parts.fragment) not in ids and parts.fragment != 'top': yield name, u

@pytest.fixture(scope='module')
def site():
    r = subprocess.run([sys.executable, '-c', 'from partal_nb.docs import build; print(build())'], cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert r.returncode == 0, r.stderr[-3000:]
    return Path(r.stdout.splitlines()[-1])

@pytest.fixture(scope='module')
def pages(site): return read(site)

def test_home_is_the_readme():
    git = f"{d['settings']['git_url']}/blob/{d['settings']['branch']}"
    assert (NBS/'index.qmd').read_text('utf-8') == home((ROOT/'README.md').read_text('utf-8'), git), '`make docs` and commit nbs/index.qmd'

def test_sidebar_has_every_notebook():
    assert yaml.safe_load((NBS/'sidebar.yml').read_text('utf-8')) == sidebar(NBS), '`make docs` and commit nbs/sidebar.yml'

def test_a_page_for_each_module(pages):
    assert not {f"{m.removeprefix('partal_nb.')}.html" for m in d['syms']} - set(pages)

def test_every_page_has_a_title(pages): assert not untitled(pages)

def test_no_broken_link(pages, site): assert not list(broken(pages, site))

def test_nothing_of_another_host_in_the_source(pages): assert not foreign(pages)

ENTRIES = [(m, name) for m, syms in d['syms'].items() for s in syms if '.' not in (name := s.removeprefix(m + '.')) and not name.startswith('_')]

def test_every_entry_is_described_and_linkable(pages):
    "Where nothing is said, `entry` raises; here: what it said is on the page"
    plain = lambda text: ' '.join(re.findall(r'[A-Za-z]+', text))
    text = {name: plain(p.text) for name, p in pages.items()}
    for m, n in ENTRIES:
        page = f"{m.removeprefix('partal_nb.')}.html"
        assert n.lower() in pages[page].ids, (m, n)
        assert plain(inspect.getdoc(getattr(import_module(m), n)).split('\n')[0]) in text[page], (m, n)

def test_planted_faults_are_found(tmp_path):
    (tmp_path/'a.html').write_text('<title></title><h2 id="x">x</h2><a href="b.html">b</a><a href="#y">y</a><a href="#x">x</a>'
                                   '<script src="https://cdn.example/x.js"></script>')
    bad = read(tmp_path)
    assert untitled(bad) == ['a.html']
    assert list(broken(bad, tmp_path)) == [('a.html', 'b.html'), ('a.html', '#y')]
    assert foreign(bad) == [('a.html', 'https://cdn.example/x.js')]

class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args): pass

def test_every_page_in_a_browser(pages, site):
    "Nothing is asked of another host, no error is raised, figures are drawn, and a phone shows no page wider than itself"
    api = pytest.importorskip('playwright.sync_api')
    if not Path('/usr/bin/chromium').exists(): pytest.skip('no /usr/bin/chromium')
    server = ThreadingHTTPServer(('127.0.0.1', 0), partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    top, asked, faults = f'http://127.0.0.1:{server.server_port}/', [], []
    with api.sync_playwright() as p:
        browser = p.chromium.launch(executable_path='/usr/bin/chromium', args=['--no-sandbox', '--disable-gpu'])
        page = browser.new_page(viewport=dict(width=390, height=800))
        page.route('**/*', lambda r: r.continue_() if r.request.url.startswith((top, 'data:', 'blob:')) else (asked.append(r.request.url), r.abort()))
        page.on('pageerror', lambda e: faults.append((page.url, str(e)[:200])))
        for name, parsed in pages.items():
            page.goto(top + name, wait_until='load')
            wide = page.evaluate('document.documentElement.scrollWidth')
            if wide > 391: faults.append((name, f'{wide} px wide on a phone of 390'))
            if page.evaluate('[...document.querySelectorAll(".plotly-figure")].some(f => !f.querySelector("svg.main-svg"))'): faults.append((name, 'a figure is not drawn'))
        browser.close()
    server.shutdown()
    assert not asked
    assert not faults
