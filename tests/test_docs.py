"""The site: builds, no broken link, no page without a title or a description, no picture without a text, no entry
without a description, nothing asked of another host, and a search that finds"""
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections import Counter
from functools import partial
from hashlib import sha256
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib import import_module
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from nbdev.config import get_config

from partal_nb import __version__
from partal_nb._modidx import d
from partal_nb.dev.site import generated

ROOT = Path(__file__).parents[1]
NBS = ROOT/'nbs'
CHROME = shutil.which('chromium') or shutil.which('google-chrome')

class Page(HTMLParser):
    "What one page links to, loads, and can be linked at"
    def __init__(self, text):
        super().__init__()
        self.links, self.loads, self.ids = [], [], set()
        self.title, self.text, self._in = '', '', ''
        self.description, self.mute = '', [] # what it is about; figures without a text for who can't see them
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        a, self._in = dict(attrs), tag
        if 'id' in a: self.ids.add(a['id'])
        if tag == 'a' and a.get('href'): self.links.append(a['href'])
        if tag in ('script', 'img', 'iframe') and a.get('src'): self.loads.append(a['src'])
        if tag == 'meta' and a.get('name') == 'description': self.description = a['content']
        if tag == 'img' and not a.get('alt'): self.mute.append(str(a)[:80])
        if 'plotly-figure' in a.get('class', '') and not a.get('aria-label'): self.mute.append(str(a)[:80])
        if tag == 'link' and a.get('rel') in ('stylesheet', 'icon'): self.loads.append(a['href'])

    def handle_data(self, data):
        self.text += data
        if self._in == 'title': self.title += data.strip()

    def handle_endtag(self, tag): self._in = ''

def read(site):
    return {p.relative_to(site).as_posix(): Page(p.read_text('utf-8')) for p in sorted(site.rglob('*.html'))}

def untitled(pages): return [name for name, p in pages.items() if not p.title]

def undescribed(pages): return [name for name, p in pages.items() if not p.description]

def mute(pages): return [(name, what) for name, p in pages.items() for what in p.mute]

def foreign(pages):
    elsewhere = lambda u: urlsplit(u).scheme in ('http', 'https') or u.startswith('//')
    return [(name, u) for name, p in pages.items() for u in p.loads if elsewhere(u)]

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
    code = 'from partal_nb.dev.site import build; print(build())'
    r = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, timeout=1800)
    assert r.returncode == 0, r.stderr[-3000:]
    return Path(r.stdout.splitlines()[-1])

@pytest.fixture(scope='module')
def pages(site): return read(site)

MADE = generated(get_config(path=ROOT))

@pytest.mark.parametrize('name', MADE)
def test_what_is_made_from_others_is_up_to_date(name):
    assert (NBS/name).read_text('utf-8') == MADE[name], f'`make docs` and commit nbs/{name}'

def test_results_are_of_the_committed_journals():
    "The notebook's last line is a number of all the files that it was drawn from"
    cells = json.loads((NBS/'results.ipynb').read_text('utf-8'))['cells']
    results = NBS/'runs/results'
    files = sorted(p for p in results.rglob('*') if p.suffix in ('.json', '.jsonl'))
    now = sha256(b''.join(p.relative_to(results).as_posix().encode() + p.read_bytes() for p in files)).hexdigest()[:12]
    assert ''.join(cells[-1]['outputs'][0]['text']).strip() == now, (
        'journals have come or changed: jupyter nbconvert --to notebook --execute --inplace nbs/results.ipynb '
        '&& nbdev_clean --fname nbs/results.ipynb')

def test_every_committed_run_is_among_the_results(pages):
    for p in sorted((NBS/'runs/results').rglob('journal.jsonl')):
        assert p.relative_to(NBS).as_posix() in pages['results.html'].links, p

@pytest.mark.parametrize('path', sorted(NBS.glob('tutorials/*.ipynb')), ids=lambda p: p.stem)
def test_a_tutorial_ends_with_its_checks(path):
    *_, before, last = json.loads(path.read_text('utf-8'))['cells']
    assert last['cell_type'] == 'code' and 'assert ' in ''.join(last['source'])
    assert '## Checks' in ''.join(before['source'])

def without_picture(path): # live figures that a viewer without scripts can't show
    cells = json.loads(path.read_text('utf-8'))['cells']
    data = [o.get('data', {}) for c in cells for o in c.get('outputs', [])]
    return sum('application/vnd.plotly.v1+json' in d and 'image/png' not in d for d in data)

def test_a_picture_is_stored_beside_each_live_figure(tmp_path):
    "`show_static()` does it; the notebooks of recorded runs stay as they were made"
    pages = [p for p in sorted(NBS.rglob('*.ipynb')) if 'results' not in p.relative_to(NBS).parts[:-1]]
    assert [p.relative_to(NBS).as_posix() for p in pages if without_picture(p)] == []
    live = dict(outputs=[dict(data={'application/vnd.plotly.v1+json': {}})])
    (tmp_path/'x.ipynb').write_text(json.dumps(dict(cells=[live])))
    assert without_picture(tmp_path/'x.ipynb') == 1

def test_cite_names_the_version(): assert f'version = {{{__version__}}}' in (NBS/'cite.qmd').read_text('utf-8')

def page_of(module): return f"{'front' if module == 'partal_nb.__init__' else module.removeprefix('partal_nb.')}.html"

def test_a_page_for_each_module(pages): assert not set(map(page_of, d['syms'])) - set(pages)

def test_every_page_has_a_title(pages): assert not untitled(pages)

def test_every_page_has_a_description(pages): assert not undescribed(pages)

def test_every_figure_has_a_text(pages):
    assert not mute(pages)
    assert sum(len(p.loads) for p in pages.values()) > 100 # there are figures

def test_no_link_is_a_guess(pages):
    "`partal` is a strategy and a command"
    guesses = 'cli.html#partal', 'strategy.html#partal'
    others = {name: p for name, p in pages.items() if not name.startswith('glossary')}
    assert not [(name, u) for name, p in others.items() for u in p.links if u.endswith(guesses)]

def test_no_broken_link(pages, site): assert not list(broken(pages, site))

def test_nothing_of_another_host_in_the_source(pages): assert not foreign(pages)

NAMES = [(m, s.removeprefix(f'{m}.')) for m, syms in d['syms'].items() for s in syms]
ENTRIES = [(m, name) for m, name in NAMES if '.' not in name and not name.startswith('_')]

def test_every_entry_is_described_and_linkable(pages):
    "Without a docstring `entry` raises; here: its first line is on the page"
    plain = lambda text: ' '.join(re.findall(r'[A-Za-z]+', text))
    text = {name: plain(p.text) for name, p in pages.items()}
    for m, n in ENTRIES:
        page = page_of(m)
        assert n.lower() in pages[page].ids, (m, n)
        assert plain(inspect.getdoc(getattr(import_module(m), n)).split('\n')[0]) in text[page], (m, n)

def test_planted_faults_are_found(tmp_path):
    (tmp_path/'a.html').write_text(
        '<title></title><h2 id="x">x</h2><a href="b.html">b</a><a href="#y">y</a><a href="#x">x</a>'
        '<script src="https://cdn.example/x.js"></script><img src="data:"><div class="plotly-figure">')
    bad = read(tmp_path)
    assert untitled(bad) == undescribed(bad) == ['a.html'] and len(mute(bad)) == 2
    assert list(broken(bad, tmp_path)) == [('a.html', 'b.html'), ('a.html', '#y')]
    assert foreign(bad) == [('a.html', 'https://cdn.example/x.js')]

def twice(page): return [i for i, n in Counter(re.findall(r'\sid="([^"]+)"', page)).items() if n > 1]

def test_every_id_is_there_once(site):
    assert [(p.name, i) for p in sorted(site.rglob('*.html')) for i in twice(p.read_text('utf-8'))] == []

def test_pages_are_light(site):
    "Without live figures, and with all styles and scripts that a page loads, below 1 MB"
    shared = sum(p.stat().st_size for p in (site/'site_libs').rglob('*') if p.suffix in ('.css', '.js', '.woff2'))
    heavy = {p.name: p.stat().st_size + shared for p in site.rglob('*.html')}
    assert {name: size for name, size in heavy.items() if size > 1_000_000} == {}

class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args): pass

@pytest.fixture(scope='module')
def browser(site):
    "Chromium, the site's address, and what was asked of others"
    api = pytest.importorskip('playwright.sync_api')
    if not CHROME:
        why = 'no chromium here: apt-get install chromium'
        pytest.fail(why) if os.environ.get('CI') == 'true' else pytest.skip(why)
    server = ThreadingHTTPServer(('127.0.0.1', 0), partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with api.sync_playwright() as p:
        chromium = p.chromium.launch(executable_path=CHROME, args=['--no-sandbox', '--disable-gpu'])
        yield chromium, f'http://127.0.0.1:{server.server_port}/'
        chromium.close()
    server.shutdown()

def opened(browser, width, scheme='light'):
    "A page that gets nothing from other hosts, and keeps what it asked them for and what went wrong"
    chromium, top = browser
    page = chromium.new_page(viewport=dict(width=width, height=800), color_scheme=scheme)
    page.set_default_timeout(180_000) # ms; a busy machine takes its time
    page.asked, page.faults = [], []
    def route(r):
        if r.request.url.startswith((top, 'data:', 'blob:')): return r.continue_()
        page.asked.append(r.request.url)
        r.abort()
    page.route('**/*', route)
    page.on('pageerror', lambda e: page.faults.append((page.url, str(e)[:200])))
    return page

CUT = '''[...document.querySelectorAll("main *:not(svg *)")].filter(e => {
    if (e.getBoundingClientRect().right <= innerWidth + 1 || !e.getClientRects().length) return false
    const scrolls = p => ["auto", "scroll"].includes(getComputedStyle(p).overflowX)
    for (let p = e; p.tagName != "MAIN"; p = p.parentElement) if (scrolls(p)) return false
    return true}).slice(0, 3).map(e => e.outerHTML.slice(0, 120))''' # beyond the screen, and nothing around it scrolls

MISSING = {
    '[...document.querySelectorAll(".plotly-figure")].some(f => !f.querySelector("svg.main-svg"))':
        'a figure is not drawn',
    '(ids => new Set(ids).size < ids.length)([...document.querySelectorAll("[id]")].map(e => e.id))':
        'an id is there twice',
    '[...document.images].some(i => !i.naturalWidth)': 'a picture is not there'}

def looked_at(names): # pages written by hand, and of the reference, which looks alike throughout, every fourth
    reference = [n for n in names if '.' in Path(n).stem]
    return list(names) if os.environ.get('PARTAL_LONG') else sorted(set(names) - set(reference)) + reference[::4]

@pytest.mark.parametrize('width,scheme', [(390, 'light'), (1280, 'dark')])
def test_pages_in_a_browser(pages, browser, width, scheme):
    "No other host is asked, no error raised, figures and pictures are there, none is too wide, dark is dark"
    page = opened(browser, width, scheme)
    faults = page.faults
    for name in looked_at(pages):
        page.goto(browser[1] + name, wait_until='load')
        page.evaluate('window.drawFigures && drawFigures()') # those beyond the screen, too
        wide = page.evaluate('document.documentElement.scrollWidth')
        if wide > width + 1: faults.append((name, f'{wide} px wide on a screen of {width}'))
        if cut := page.evaluate(CUT): faults.append((name, 'cut at the edge', cut))
        for script, fault in MISSING.items():
            if page.evaluate(script): faults.append((name, fault))
        for part in ('body', '.navbar'):
            color = page.evaluate(f'getComputedStyle(document.querySelector("{part}")).backgroundColor')
            light = sum(map(float, re.findall(r'[\d.]+', color.replace('srgb', ''))[:3]))
            is_light = light > (1.5 if 'srgb' in color else 383)
            if is_light != (scheme == 'light'): faults.append((name, f'{part} is {color} where all is {scheme}'))
    page.close()
    assert not page.asked
    assert not faults

def test_a_request_to_another_host_is_found(browser):
    page = opened(browser, 390)
    page.goto(browser[1] + 'cite.html', wait_until='load')
    page.evaluate("fetch('https://other.example/font').catch(() => 0)")
    assert page.asked == ['https://other.example/font']
    page.close()

FOUND = [
    ('boundary_counts', 'boundaries.html#boundary_counts'), # a function
    ('Masksembles', 'model.dropout.html'), ('injection', 'model.padnet.html'), # terms of the papers
    ('how to cite', 'cite.html'), ('partal prepare', 'commands.html#partal-prepare'),
    ('export to CVAT', 'annotate.cvat.html'),
    # messages, also with one's own mistake in them
    ("device 'cuda' asked for, but PyTorch sees no GPU; use --set", 'errors.html#names-that-do-not-exist'),
    ("partal: unknown preset 'nyu3'; there are ['demo', 'rooms'", 'errors.html#names-that-do-not-exist'),
    ('expected field=value', 'commands.common.html')]

FIRST = [ # questions, whose answer is the first place
    ('install', 'index.html#install'), ('does the method help', 'index.html#does-it-help'),
    ('three seeds in parallel', 'tutorials/gpu_papermill.html'), ('convert depth png', 'tutorials/own_images.html'),
    ('custom strategy', 'tutorials/own_strategy.html'),
    ('resume interrupted', 'tutorials/gpu_papermill.html#an-interruption'),
    ('v7.3 mat', 'tutorials/own_images.html#from-a-matlab-file'), ('what ± means', 'glossary.html#term-±'),
    ('wandb', 'glossary.html#term-tracker'), ('docker', 'index.html#what-you-need')]

def searched(browser, query):
    page = opened(browser, 1280)
    page.goto(browser[1] + 'index.html', wait_until='load')
    page.fill('.smalldocs-search input', query)
    page.wait_for_selector('.search-result, .search-none')
    found = [a.get_attribute('href').removeprefix('./') for a in page.query_selector_all('.search-result')]
    page.close()
    return found

@pytest.mark.parametrize('query,place', FOUND)
def test_search_finds(browser, query, place):
    found = searched(browser, query)
    assert any(f.startswith(place) for f in found), found

@pytest.mark.parametrize('query,place', FIRST)
def test_search_finds_first(browser, query, place):
    assert searched(browser, query)[0].startswith(place)

AXE = """axe.run(document, {resultTypes: ['violations']}).then(r => r.violations
    .filter(v => ['serious', 'critical'].includes(v.impact))
    .map(v => [v.id, v.nodes.length, v.nodes[0].html.slice(0, 120)]))"""
LOOKED_AT = ('index', 'results', 'glossary', 'commands', 'tasks', 'tutorials/first_run', 'explain/replication_results',
             'commands.runs', 'commands.project', 'cli', 'tutorials/reading_a_report')

@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_nothing_serious_for_who_uses_a_keyboard_or_a_reader(browser, scheme):
    axe = pytest.importorskip('axe_playwright_python')
    script = next(Path(axe.__file__).parent.rglob('axe.min.js')).read_text('utf-8')
    page = opened(browser, 1280, scheme)
    found = {}
    for name in LOOKED_AT:
        page.goto(f'{browser[1]}{name}.html', wait_until='load')
        page.evaluate(script)
        if faults := page.evaluate(AXE): found[name] = faults
    page.close()
    assert not found
