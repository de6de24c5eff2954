"The explorers in a real browser, in JupyterLab and as apps of `partal explore`: mouse, keyboard, and bad run folders"
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import matplotlib
import nbformat
import numpy as np
import pandas as pd
import psutil
import pytest
from colorspacious import cspace_convert
from PIL import Image

from partal_nb.core import distinct_colors
from partal_nb.tasks import semseg_task, standard_task
from partal_nb.config import preset
from partal_nb.data.dataset import write_dataset
from partal_nb.data.prepare import open_data
from partal_nb.data.arrays import Rows
from partal_nb.explore.pool import PAGE, PoolExplorer
from partal_nb.explore.entropy import EntropyExplorer, entropy_view, task_cells
from partal_nb.explore.injection import change_text, injection_view
from partal_nb.explore.purchases import reasons
from partal_nb.explore.subsets import error_changes
from partal_nb.explore.run import TINY, RunView, open_run_view, tiny_run
from partal_nb.explore.plot import number, weight
from partal_nb.explore.chooser import VIEWS, RunChooser, open_project_view
from partal_nb.annotate.ask import ask, read_batch
from partal_nb.annotate.images import remove
from partal_nb.annotate.project import init
from partal_nb.annotate.tell import tell
from partal_nb.commands.common import template
from partal_nb.commands.runs import voila_command
from partal_nb.runs.folder import RunFolder
from partal_nb.runs.loop import run

ROOT, BIN = Path(__file__).parents[1], Path(sys.executable).parent
CHROME = shutil.which('chromium') or shutil.which('google-chrome')
FLAGS = ['--no-sandbox', '--disable-gpu', '--enable-unsafe-swiftshader', '--no-first-run',
         '--disable-background-networking', '--disable-component-update', '--disable-sync']
HERE = ('http://127.0.0.1', 'ws://127.0.0.1', 'data:', 'blob:')
# Its page wants an icon font of a CDN, which our policy forbids; one that is left would end its kernel, and is refused
# (voila#1458): `partal explore` has such kernels culled. Its widgets still report their size to the kernel it let go.
VOILAS_OWN = re.compile('fortawesome|/voila/api/shutdown/|widget sync message Error: Cannot send')
APPS = ('entropy', 'selection', 'injection')
PATIENCE = 180_000 # ms, until an app is there; a busy machine takes its time to import PyTorch

# A run, a browser, two servers

@pytest.fixture(scope='module')
def opened(tmp_path_factory):
    "A run in miniature, opened in this process, too: what is drawn is compared with what it computes"
    return tiny_run(tmp_path_factory.mktemp('runs')/'tiny')

@pytest.fixture(scope='module')
def chrome():
    if not CHROME:
        why = "no chromium here: apt-get install chromium"
        pytest.fail(why) if os.environ.get('CI') == 'true' else pytest.skip(why)
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p: yield p.chromium.launch(executable_path=CHROME, args=FLAGS)

@pytest.fixture
def page(chrome, request, tmp_path_factory):
    "A page that may ask this machine only; errors on its console fail the test, and its last sight is kept"
    page = chrome.new_context(viewport=dict(width=1800, height=1100)).new_page()
    page.refused, page.errors = [], []
    def route(r):
        if r.request.url.startswith(HERE): return r.continue_()
        page.refused.append(r.request.url)
        r.abort()
    page.route('**/*', route)
    def on_console(m):
        if m.type == 'error': page.errors.append(f'{m.text} {m.location.get("url", "")}')
    page.on('console', on_console)
    page.on('pageerror', lambda e: page.errors.append(str(e)))
    folder = Path(os.environ.get('PARTAL_ARTIFACTS') or tmp_path_factory.getbasetemp()/'screenshots')
    folder.mkdir(parents=True, exist_ok=True)
    def leave(): # before its server ends, of which the page would complain
        name = re.sub('[^a-z0-9]+', '-', request.node.name).strip('-')
        if not page.is_closed(): page.screenshot(path=folder/f'{name}.png')
        page.close()
    page.leave = leave
    yield page
    leave()
    page.context.close()
    assert not page.refused # nobody else is asked
    assert not [e for e in page.errors if not VOILAS_OWN.search(e)]

def free_port()->int:
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]

def answers(url:str)->int:
    try: return urllib.request.urlopen(url, timeout=5).status
    except urllib.error.HTTPError as e: return e.code
    except OSError: return 0

@contextmanager
def served(command, url, folder, **env):
    "A server while it is needed; its output is shown if it does not come up, or anything fails while it is there"
    log = folder/'server.log'
    own = {f'JUPYTER_{k}_DIR': str(folder/f'jupyter_{k.lower()}') for k in ('CONFIG', 'DATA', 'RUNTIME')}
    env = dict(os.environ, OMP_NUM_THREADS='1', IPYTHONDIR=str(folder/'ipythondir'), **own, **env)
    command = list(map(str, command))
    with open(log, 'w') as out, subprocess.Popen(command, cwd=folder, env=env, stdout=out, stderr=out) as server:
        try:
            until = time.monotonic() + PATIENCE/1000
            while not answers(url() if callable(url) else url):
                assert server.poll() is None and time.monotonic() < until, log.read_text()
                time.sleep(.2)
            yield log
        except BaseException:
            print(log.read_text())
            raise
        finally: server.terminate()

@pytest.fixture(scope='module')
def lab(opened, tmp_path_factory):
    "JupyterLab with copies of the three notebooks"
    folder, port = tmp_path_factory.mktemp('lab'), free_port()
    for name in APPS: shutil.copy(ROOT/f'nbs/explore/{name}.ipynb', folder)
    quiet = folder/'jupyter_config/lab/user-settings/@jupyterlab/apputils-extension/notification.jupyterlab-settings'
    quiet.parent.mkdir(parents=True)
    quiet.write_text('{"fetchNews": "false", "checkForUpdates": false}')
    command = [BIN/'jupyter', 'lab', '--no-browser', '--allow-root', '--ip=127.0.0.1',
               f'--port={port}', '--port-retries=0', '--LabApp.news_url=',
               '--LabApp.extension_manager=readonly', f'--ServerApp.root_dir={folder}']
    url = f'http://127.0.0.1:{port}'
    with served(command, f'{url}/lab', folder, PARTAL_RUN=str(opened.folder.path), JUPYTER_TOKEN='lab-token'):
        yield f'{url}/lab/workspaces/{{0}}/tree/{{0}}.ipynb?token=lab-token'

@contextmanager
def explored(name, folder, tmp):
    "`partal explore`, and the address that it prints"
    port = free_port()
    command = [BIN/'partal', 'explore', folder, '--app', name, '--port', port]
    with served(command, f'http://127.0.0.1:{port}', tmp) as log:
        yield re.search(rf'http://127.0.0.1:{port}/\?token=[\w-]{{20,}}', log.read_text())[0]
    assert not answers(f'http://127.0.0.1:{port}'), 'what ends `partal explore` ends its server'

@contextmanager
def app(name, folder, page, tmp):
    "An app of its own"
    with explored(name, folder, tmp) as url:
        try: yield url
        finally: page.leave()

@pytest.fixture(scope='module')
def entropy_app(opened, tmp_path_factory):
    "The run in miniature in one view; each test that opens it has a kernel of its own"
    with explored('entropy', opened.folder.path, tmp_path_factory.mktemp('entropy')) as url: yield url

@pytest.fixture(scope='module')
def whole_app(opened, tmp_path_factory):
    "The run in miniature in four views"
    with explored('all', opened.folder.path, tmp_path_factory.mktemp('all')) as url: yield url

# What can be seen and done

def figure(page):
    plot = page.locator('.js-plotly-plot').first
    plot.locator('.annotation-text').first.wait_for(timeout=PATIENCE)
    return plot

def titles(plot): return [' '.join(t.split()) for t in plot.locator('.annotation-text').all_text_contents()]
def plain(title): return re.sub('<[^>]+>', '', title) # as a browser's text of it, where a line break leaves nothing
def pictures(plot):
    images = plot.locator('image').all()
    return [i.get_attribute('href') or i.get_attribute('xlink:href') for i in images]

def until(page, f, seconds=90):
    "What `f` returns, once that is something"
    for _ in range(seconds*10):
        if found := f(): return found
        page.wait_for_timeout(100)
    raise AssertionError(f'not within {seconds} s')

def point(page, plot, axis, x:float, y:float, text:str):
    "With the mouse at (x, y) of its n-th picture the plot shows this text"
    plot.scroll_into_view_if_needed()
    place = """(gd, [n, x, y]) => {
        const layout = gd._fullLayout, a = layout['xaxis' + n], b = layout['yaxis' + n]
        const box = gd.getBoundingClientRect()
        return [box.left + a._offset + a.d2p(x), box.top + b._offset + b.d2p(y)]
    }"""
    def shown(): # the figure is drawn again once its place is measured: the mouse follows
        at = plot.evaluate(place, [axis, x, y])
        page.mouse.move(at[0] + 3, at[1] + 3)
        page.mouse.move(*at)
        page.wait_for_timeout(100)
        return plot.locator('.hoverlayer .hovertext').all_text_contents() == [text]
    until(page, shown)

def row(page, description:str):
    return page.locator('.widget-inline-hbox', has=page.get_by_text(description, exact=True))

def slide(page, description:str):
    "One step to the right, with the keyboard"
    row(page, description).locator('.noUi-handle').first.press('ArrowRight')

def choice(page, description:str):
    return page.locator('.widget-dropdown', has=page.get_by_text(description, exact=True)).locator('select')

def tab_to(page, target):
    "Press Tab until `target` has the focus"
    for _ in range(30):
        page.keyboard.press('Tab')
        if target.evaluate('e => e === document.activeElement'): return
    raise AssertionError('the keyboard does not reach it')

def tick(page, description:str): page.locator('.widget-checkbox', has_text=description).locator('input').click()

# The three explorers, in JupyterLab and as apps

def try_entropy(page, opened):
    plot = figure(page)
    view = entropy_view(opened, 0, 0)
    assert titles(plot)[0] == plain(view.title) and titles(plot)[4].startswith('semseg, entropy: ')
    point(page, plot, 5, 2, 2, f'{number(view.maps["semseg"][0, 0])} nats')
    read = page.get_by_text(f'semseg, entropy: {number(view.maps["semseg"][0, 0])} nats').inner_text()
    assert 'depth, predicted: ' in read and 'normals, predicted: ' in read, 'one pointer reads all maps'
    point(page, plot, 4, 30, 20, opened.tasks[0].classes[int(view.labels['semseg'][20, 30, 0])])
    before = pictures(plot)
    slide(page, 'place')
    until(page, lambda: titles(plot)[0] == plain(entropy_view(opened, 1, 0).title))
    assert pictures(plot)[0] != before[0]
    choice(page, 'round').select_option('1')
    tick(page, 'change since the round before')
    changed = until(page, lambda: next((t for t in titles(figure(page)) if 'semseg, since the round before' in t), ''))
    view = entropy_view(opened, 1, 1, change=True, truth=True)
    assert changed.endswith(f'{number((view.maps["semseg"] - view.earlier["semseg"]).mean(), sign=True)} nats')
    tick(page, 'truth and error')
    known = [c.title for c in task_cells(view, opened.tasks[1])][-2:]
    assert known[0] == 'depth, true'
    until(page, lambda: set(known) <= set(titles(figure(page))))
    choice(page, 'curtain').select_option('depth, error')
    earlier = task_cells(entropy_view(opened, 1, 0, truth=True), opened.tasks[1])[-1].title
    above = page.get_by_alt_text(f'round 0: {earlier}')
    above.wait_for(timeout=PATIENCE)
    half = above.evaluate('e => e.style.clipPath')
    page.get_by_role('slider', name='curtain').press('ArrowRight')
    until(page, lambda: above.evaluate('e => e.style.clipPath') != half) # the keyboard moves the curtain

def try_selection(page, opened):
    plot = figure(page)
    bought = reasons(opened, 0)
    assert titles(plot)[0].startswith('15 of 30 pairs are labeled, for 15 labels')
    # its own money and prices, in spite of how a browser rounds a slider
    page.get_by_text('6 of them were bought by the run').wait_for()
    first = bought[0]
    picks = page.locator('.js-plotly-plot').nth(2)
    assert f'1. {opened.names[first.task]} of {opened.pool.images[first.image]}' in titles(picks)
    image, task = (int(i[0]) for i in (opened.since() == 0).nonzero())
    point(page, plot, '', image, task, f'{opened.names[task]} of image {opened.pool.images[image]}: start, for 1 label')
    marks = lambda: plot.locator('.scatterlayer .point').count()
    assert marks() == 6
    slide(page, 'budget')
    until(page, lambda: marks() == 7)
    choice(page, 'budget in').select_option('labels')
    tick(page, 'rank by score per price')
    before = pictures(picks)
    slide(page, 'purchases from')
    until(page, lambda: any(t.startswith('5. ') for t in titles(picks)))
    assert pictures(picks) != before
    choice(page, 'shares').select_option('equal')
    page.get_by_text('use one of both').wait_for(timeout=PATIENCE) # shares, and a ranking by price
    tick(page, 'rank by score per price')
    page.get_by_text('partal, shares equal').first.wait_for(timeout=PATIENCE)
    page.get_by_role('button', name='save as a query batch').click()
    batch = until(page, lambda: list((opened.folder.path/'explore').glob('selection-*-batch')))[0]
    asked = pd.read_csv(batch/'queries.csv')
    assert asked.groupby('task').size().max() - asked.groupby('task').size().min() <= 1
    shutil.rmtree(batch) # for the next one who tries

def try_injection(page, opened):
    plot = figure(page)
    view = injection_view(opened, 0, 1)
    assert titles(plot)[0] == plain(view.title)
    before = pictures(plot)
    tick(page, 'true depth')
    until(page, lambda: plain('predicted<br>given depth') in titles(plot))
    assert pictures(plot) != before and pictures(plot)[0] == before[0]
    injected = injection_view(opened, 0, 1, ('depth',))
    assert f'{injected.after["normals"].metric:.2f} °' in page.locator('table', has_text='entropy before').inner_text()
    point(page, plot, 8, 2, 2, f'{number(injected.after["semseg"].map[0, 0])} nats')
    changes = error_changes(opened, 1, ('depth',))[:, 2]
    order = choice(page, 'order')
    order.select_option('normals, most harmed first')
    until(page, lambda: titles(plot)[0] == plain(injection_view(opened, int(changes.argmax()), 1).title))
    page.get_by_text(f'1 of 3; normals: {change_text(float(changes.max()))}').wait_for(timeout=PATIENCE)
    order.select_option('as in the test set')
    slide(page, 'place')
    until(page, lambda: titles(plot)[0] == plain(injection_view(opened, 1, 1).title))
    page.get_by_role('button', name='measure all sets').click()
    until(page, lambda: any('over 3 test images, round 1' in t for t in titles(page.locator('.js-plotly-plot').nth(1))))

TRY = dict(entropy=try_entropy, selection=try_selection, injection=try_injection)

@pytest.mark.parametrize('name', APPS)
def test_notebook(name, page, lab, opened):
    page.goto(lab.format(name))
    page.get_by_text('| Idle').wait_for(timeout=60_000)
    page.get_by_role('menuitem', name='Run', exact=True).click()
    page.get_by_role('menuitem', name='Run All Cells', exact=True).click()
    TRY[name](page, opened)

def test_app(page, opened, entropy_app):
    assert 'login' in urllib.request.urlopen(entropy_app.split('?')[0]).url, 'the app is not shown without the token'
    page.goto(entropy_app, timeout=PATIENCE)
    try_entropy(page, opened)

@pytest.mark.parametrize('name', APPS[1:])
def test_view(name, page, opened, whole_app):
    page.goto(f'{whole_app}#view={name}', timeout=PATIENCE)
    TRY[name](page, opened)

def test_the_keyboard_is_enough(page, opened, entropy_app):
    "From control to control with Tab: the image, the order, the round, the change, and both ways to save"
    page.goto(entropy_app, timeout=PATIENCE)
    plot = figure(page)
    tab_to(page, row(page, 'place').locator('.noUi-handle').first)
    for i in (1, 2):
        page.keyboard.press('ArrowRight')
        until(page, lambda: titles(plot)[0] == plain(entropy_view(opened, i, 0).title))
    tab_to(page, choice(page, 'order'))
    page.keyboard.press('ArrowDown')
    third = int(np.argsort(-opened.scores(0).norm[:, 0], kind='stable')[2])
    until(page, lambda: titles(plot)[0] == plain(entropy_view(opened, third, 0).title))
    tab_to(page, choice(page, 'round'))
    page.keyboard.press('ArrowDown')
    change = page.locator('.widget-checkbox', has_text='change since the round before').locator('input')
    until(page, change.is_enabled) # round 0 has no round before it
    tab_to(page, change)
    page.keyboard.press('Space')
    until(page, lambda: any('semseg, since the round before' in t for t in titles(plot)))
    tab_to(page, page.get_by_role('button', name='save as HTML'))
    page.keyboard.press('Enter')
    kept = until(page, lambda: list((opened.folder.path/'explore').glob('entropy-*-round1-*.html')))[0]
    tab_to(page, page.get_by_role('button', name='save as PNG'))
    with page.expect_download() as saved: page.keyboard.press('Enter')
    picture = Image.open(saved.value.path())
    assert picture.format == 'PNG' and saved.value.suggested_filename.startswith('entropy-tiny-round1-T3-')
    assert picture.width >= plot.evaluate('gd => gd._fullLayout.width')
    assert len(picture.convert('RGB').getcolors(10**6)) > 1000
    alone, shown = page.context.new_page(), titles(plot)
    alone.on('request', lambda r: page.refused.append(r.url) if r.url.startswith('http') else None)
    alone.goto(kept.as_uri())
    assert titles(figure(alone)) == shown, 'a page that needs nothing else'
    assert pictures(figure(alone))[0] == pictures(plot)[0]
    for p in page, alone:
        assert not p.locator('.modebar-btn[data-title^=Share]').count(), 'no button sends a picture away'
    alone.close()

def older(folder):
    config = folder/'config.json'
    config.write_text(config.read_text().replace('"passes"', '"mc_passes"'))

BAD = dict(
    unfinished=lambda p: (p/'journal.jsonl').unlink(),
    foreign=lambda p: (p/'config.json').write_text('{"model": "resnet"}'),
    older=older,
    torn=lambda p: (p/'round-0.safetensors').write_bytes(b'torn'))
REASONS = dict(
    unfinished='no finished round yet',
    foreign='not the config.json of',
    older='another version of partal_nb',
    torn='incomplete or of another version')

@pytest.mark.parametrize('kind', BAD)
def test_a_bad_folder_gets_a_sentence(kind, opened, tmp_path):
    "In the app itself, without a browser: nothing is raised, and what is missing is named"
    folder = shutil.copytree(opened.folder.path, tmp_path/kind)
    BAD[kind](folder)
    chooser = RunChooser(EntropyExplorer, folder)
    shown = chooser.message.value + ''.join(e.controls.status.value for e in chooser.body.children)
    assert REASONS[kind] in shown and 'Traceback' not in shown

@pytest.fixture(scope='module')
def thousand(tmp_path_factory):
    "A run on a pool of 1,000 made-up images"
    folder, tasks = tmp_path_factory.mktemp('thousand'), (semseg_task(['left', 'right']), standard_task('depth'))
    def sample(i):
        rng = np.random.default_rng(int(i))
        halves = np.tile(np.arange(64) >= 32, (32, 1))[..., None].astype(np.uint8)
        rgb = rng.integers(0, 256, (32, 64, 3), np.uint8)
        return dict(rgb=rgb, semseg=halves, depth=rng.uniform(1, 9, (32, 64, 1)).astype(np.float32))
    names = [f'{i:04}' for i in range(1010)]
    write_dataset(folder/'data', 'made up', tasks, dict(train=names[:1000], test=names[1000:]), sample, progress=False)
    own = dict(height=32, width=64, pool_images=0, test_images=0, train_for=2, passes=2)
    config = preset('demo', **TINY | own, data=str(folder/'data'), tasks=('semseg', 'depth'))
    return open_run_view(run(config, folder/'run', progress=False), progress=False)

def test_a_thousand_images(page, thousand, tmp_path):
    "The browser gets the one that is looked at, in whatever order, and not the pool"
    frames = []
    page.on('websocket', lambda s: s.on('framereceived', lambda data: frames.append(len(data))))
    with app('entropy', thousand.folder.path, page, tmp_path) as url:
        page.goto(url, timeout=PATIENCE)
        plot = figure(page)
        choice(page, 'order').select_option('depth, most uncertain first')
        order = np.argsort(-thousand.scores(0).norm[:, 1], kind='stable')
        until(page, lambda: titles(plot)[0] == plain(entropy_view(thousand, int(order[0]), 0).title))
        page.wait_for_timeout(500) # until all has come
        frames.clear()
        for i in range(1, 6):
            slide(page, 'place')
            until(page, lambda: titles(plot)[0] == plain(entropy_view(thousand, int(order[i]), 0).title))
        page.get_by_text('6 of 1000').wait_for()
    one = weight(EntropyExplorer(thousand).panel.plots[0].figure)
    assert 0 < sum(frames) < 5*2*one < thousand.pool.rgb.nbytes/5

class Many(RunView):
    "Where its images lie is made up"
    def features(self, r): return np.random.default_rng(r).normal(size=(len(self.pool), 8))

def many(run, folder, n)->Many:
    "A run whose images come again and again, under other names and with other scores"
    names, rows = tuple(f'{i:05}' for i in range(n)), np.arange(n) % len(run.pool)
    labels = {name: Rows(y, rows) for name, y in run.pool.labels.items()}
    available = run.pool.available[rows]
    pool = replace(run.pool, images=names, rgb=Rows(run.pool.rgb, rows), labels=labels, available=available)
    files, K = RunFolder(shutil.copytree(run.folder.path, folder)), len(run.tasks)
    scores = np.random.default_rng(0).permutation(n*K)/(n*K)
    pairs = dict(image=np.repeat(names, K), task=list(run.names)*n, raw=scores, norm=scores)
    pd.DataFrame(pairs).to_parquet(files.scores_file(0))
    events = run.events.assign(image=run.events.image.map(dict(zip(run.pool.images, names))))
    return Many(files, run.config, run.rounds, pool, run.test, events, False)

def test_ten_thousand_images_are_sorted_and_mapped_without_being_sent(opened, tmp_path):
    "In the pool view what is sent are a page of thumbnails, and a point and a name of each image"
    few, lot = (PoolExplorer(many(opened, tmp_path/str(n), n)) for n in (100, 10_000))
    def sent(e): return weight([list(map(dict, e.grid.tiles))])
    for e in few, lot:
        e.controls.round.value = 0
        e.controls.order.label = 'depth, most uncertain first'
        best = np.argsort(-e.run.scores(0).raw[:, 1], kind='stable')
        for e.controls.page.value in (1, 2): assert len(e.grid.tiles) == PAGE
        assert [t['row'] for t in e.grid.tiles] == best[PAGE:2*PAGE].tolist()
        e.controls.map.value = True
    assert sent(lot) < 1.2*sent(few), 'it does not depend on how many there are'
    assert lot.map.figure['data'][0]['type'] == 'scattergl'
    assert weight(lot.map.figure) < 40*10_000
    lot.controls.name.value = '09'
    assert f'{sum("09" in name for name in lot.run.pool.images)} of 10000 images' in lot.status.value

CLOUD = """
import os
import partal_nb.explore.map as pool_map
from partal_nb.explore.chooser import open_view
from partal_nb.explore.pool import PoolExplorer
pool_map.MANY = 5
e = PoolExplorer(open_view(os.environ['PARTAL_RUN']))
e.controls.map.value = True
e"""

def test_the_map_of_many_images_is_a_cloud_of_points(page, opened, tmp_path):
    "jupyter-scatter draws it under the explorers' rules for pages, and its lasso chooses the thumbnails"
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(CLOUD)])
    notebook.metadata.kernelspec = dict(name='python3', display_name='Python', language='python')
    nbformat.write(notebook, tmp_path/'cloud.ipynb')
    port, own = free_port(), str(template('entropy', 'explore'))
    command = [tmp_path/'cloud.ipynb' if word == own else word for word in voila_command('entropy', port)]
    url = f'http://127.0.0.1:{port}'
    with served(command, url, tmp_path, PARTAL_RUN=str(opened.folder.path), JUPYTER_TOKEN='its-token'):
        page.goto(f'{url}/?token=its-token', timeout=PATIENCE)
        canvas = page.locator('canvas').first
        canvas.wait_for(timeout=PATIENCE)
        tiles = page.locator('button img')
        until(page, lambda: tiles.count() == len(opened.pool))
        box = canvas.bounding_box()
        for i, (x, y) in enumerate([(.02, .02), (.5, .02), (.5, .98), (.02, .98), (.02, .2)]):
            page.mouse.move(box['x'] + x*box['width'], box['y'] + y*box['height'], steps=20)
            if i == 0: page.mouse.down()
        page.mouse.up()
        until(page, lambda: 0 < tiles.count() < len(opened.pool))
        page.get_by_role('button', name='clear the lasso').click()
        until(page, lambda: tiles.count() == len(opened.pool))
        page.leave()

def test_a_run_that_is_not_there_is_refused_before_a_server_starts(tmp_path):
    port = free_port()
    command = [BIN/'partal', 'explore', tmp_path/'nowhere', '--port', port]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and 'config.json is missing' in done.stderr and not done.stdout
    assert not answers(f'http://127.0.0.1:{port}') and not list(tmp_path.iterdir())

def test_a_recording_for_rerun(opened, tmp_path):
    command = [BIN/'partal', 'explore', opened.folder.path, '--rerun', 'run.rrd']
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, '10 images, to be opened with `rerun run.rrd`\n'), done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ['run.rrd'] and (tmp_path/'run.rrd').stat().st_size > 10_000

@pytest.fixture(scope='module')
def samples(opened, tmp_path_factory): # a folder for FiftyOne
    place = tmp_path_factory.mktemp('samples')
    command = [BIN/'partal', 'explore', opened.folder.path, '--fiftyone', 'out']
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=place)
    said = '10 images; where FiftyOne is installed, `python out/load.py` makes a dataset of them\n'
    assert (done.returncode, done.stdout) == (0, said), done.stderr
    assert [p.name for p in place.iterdir()] == ['out']
    return place/'out'

READ = '''
import json, sys, fiftyone as fo
d = fo.load_dataset(sys.argv[1])
def seen(s): return dict(
    tags=s.tags, score=s.score_depth, mask=s.true_semseg and s.true_semseg.get_mask().tolist(),
    heat=s.entropy_depth.get_map().tolist(), file=s.filepath)
print(json.dumps(dict(rows={s.image_id: seen(s) for s in d}, targets=d.mask_targets, info=d.info)))'''

def test_fiftyone_reads_what_was_written(samples, opened, fiftyone, tmp_path):
    "In an environment that has nothing of ours: tags, scores, masks and heat maps of every image"
    own = dict(FIFTYONE_DATABASE_DIR=tmp_path/'db', FIFTYONE_CONFIG_PATH=tmp_path/'config.json',
               FIFTYONE_DO_NOT_TRACK='true', FIFTYONE_DATABASE_VALIDATION='false')
    env = {k: v for k, v in os.environ.items() if k != 'PYTHONPATH'} | {k: str(v) for k, v in own.items()}
    def ask(*words): return subprocess.run(
        [str(fiftyone), *map(str, words)], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    made = ask(samples/'load.py', 'mine')
    assert made.returncode == 0 and made.stdout.endswith('10 images; fiftyone app launch mine\n'), made.stderr[-2000:]
    again = ask(samples/'load.py', 'mine')
    assert again.returncode and "FiftyOne has a dataset 'mine'; give another name" in again.stderr
    found = json.loads(ask('-c', READ, 'mine').stdout.splitlines()[-1])
    assert list(found['rows']) == list(opened.pool.images) and found['info']['round'] == opened.last
    scores, since, semseg = opened.scores(0).norm[:, 1], opened.since()[:, 1], opened.tasks[0]
    classes = dict(enumerate(semseg.form.names(semseg), 1))
    assert found['targets']['true_semseg'] == {str(k): name for k, name in classes.items()}
    for n, row in enumerate(found['rows'].values()):
        assert row['score'] == (pytest.approx(scores[n]) if np.isfinite(scores[n]) else None)
        assert f"depth: {['unlabeled', 'start', 'after round 0'][since[n] + 1]}" in row['tags']
        assert np.array_equal(row['mask'], np.asarray(opened.pool.labels['semseg'][n])[..., 0].astype(int) + 1)
        heat = np.asarray(Image.open(samples/'entropy_depth'/f'{opened.pool.images[n]}.png'))
        assert np.array_equal(row['heat'], heat) and Path(row['file']).is_file()

def test_the_demo_run_is_never_made_among_photographs(tmp_path):
    photos = [tmp_path/f'{i}.jpg' for i in range(3)]
    for p in photos: Image.new('RGB', (8, 8)).save(p)
    chooser = RunChooser(EntropyExplorer, tmp_path)
    assert chooser.make.layout.display == 'none'
    chooser.make.click()
    assert 'holds other files' in chooser.message.value and sorted(tmp_path.iterdir()) == photos

def test_a_project_opens_while_a_task_waits_for_its_first_labels(tmp_path):
    "Nothing is scored for a task without a network, and images and purchases of the others are shown all the same"
    truth = open_data('', 10, 3, 48, 64, progress=False).path
    images = shutil.copytree(truth, tmp_path/'images')
    for f in [*(images/'normals').iterdir(), *sorted((images/'depth').iterdir())[5:]]: f.unlink()
    only_runs = 'pool_images', 'test_images', 'start_images', 'step_pairs', 'rounds'
    project = init(images, tmp_path/'project', **{k: v for k, v in TINY.items() if k not in only_runs})
    ask(project.folder, budget=3, progress=False)
    for q in read_batch(project, 1).queries:
        (tmp_path/'answers'/q['task']).mkdir(parents=True, exist_ok=True)
        for f in (truth/q['task']).glob(f"{q['image']}.*"): shutil.copy(f, tmp_path/'answers'/q['task'])
    tell(project.folder, 1, tmp_path/'answers')
    ask(project.folder, budget=1, progress=False)
    run = open_project_view(project.folder)
    assert not run.labeled(0)[:, run.names.index('normals')].any() and (run.since() > 0).sum() == 3
    shown = {name: view(run) for name, view in VIEWS.items()}
    assert shown['image'].controls.status.value == f'1 of {len(run.pool)}'
    assert not shown['selection'].status.value and len(shown['selection'].panel.shown) == 3
    remove(project.folder, [run.events.image.iloc[-1]]) # a label was bought for it
    left = VIEWS['selection'](open_project_view(project.folder))
    assert not left.status.value and len(left.panel.shown) == 3

def test_data_by_a_relative_path_that_then_moves(page, tmp_path, monkeypatch):
    "The app works in another folder than the run was made in; where the data set moved, it asks for the new place"
    tasks, names = (standard_task('depth'),), [f'{i}' for i in range(13)]
    def sample(i): return dict(rgb=np.full((48, 64, 3), 20*int(i), np.uint8), depth=np.ones((48, 64, 1), np.float32))
    monkeypatch.chdir(tmp_path)
    write_dataset('photos', 'made up', tasks, dict(train=names[:10], test=names[10:]), sample, progress=False)
    own = dict(TINY, pool_images=0, test_images=0, rounds=0, train_for=2)
    made = run(preset('demo', **own, data='photos', tasks=('depth',)), 'made/run', progress=False)
    elsewhere = tmp_path/'elsewhere'
    elsewhere.mkdir()
    with app('entropy', Path(made).resolve(), page, elsewhere) as url:
        page.goto(url, timeout=PATIENCE)
        assert titles(figure(page))[0].startswith('image 0')
        (tmp_path/'photos').rename(tmp_path/'moved')
        page.get_by_role('button', name='open', exact=True).click()
        page.get_by_text('the data set photos of').wait_for(timeout=PATIENCE)
        field = page.get_by_placeholder('where the data set is now')
        field.fill(str(tmp_path/'moved'))
        field.press('Tab')
        page.get_by_role('button', name='open', exact=True).click()
        assert titles(figure(page))[0].startswith('image 0')

def test_a_reload_a_link_and_back_show_the_same_view(page, opened, entropy_app):
    page.goto(f'{entropy_app}#place=3&round=1', timeout=PATIENCE)
    third = plain(entropy_view(opened, 2, 1).title)
    until(page, lambda: titles(figure(page))[0] == third, 120)
    slide(page, 'place')
    until(page, lambda: 'place=4' in page.url and 'round=1' in page.url)
    page.reload()
    until(page, lambda: titles(figure(page))[0] == plain(entropy_view(opened, 3, 1).title), 120)
    slide(page, 'place')
    until(page, lambda: 'place=5' in page.url)
    page.go_back()
    until(page, lambda: titles(figure(page))[0] == plain(entropy_view(opened, 3, 1).title))

def test_four_views_of_one_run(page, opened, whole_app):
    "Sorted and filtered thumbnails, a lasso on the map, an image opened from them, keys, and all of it in the address"
    page.goto(whole_app, timeout=PATIENCE)
    names = lambda: page.locator('button img').evaluate_all("es => es.map(e => e.alt.split(' ')[1])")
    until(page, lambda: names() == list(opened.pool.images), 120)
    choice(page, 'order').select_option('depth, most uncertain first')
    order = np.argsort(-opened.scores(0).raw[:, 1], kind='stable')
    expected = [opened.pool.images[n] for n in order]
    until(page, lambda: names() == expected)
    choice(page, 'pairs').select_option('unlabeled')
    some = set(np.flatnonzero(~opened.labeled(0).all(1)))
    until(page, lambda: names() == [opened.pool.images[n] for n in order if n in some])
    tick(page, 'map of what looks alike')
    plot = page.locator('.js-plotly-plot').first
    plot.locator('.scatterlayer .point').first.wait_for(timeout=PATIENCE)
    box = plot.locator('.nsewdrag').first.bounding_box()
    corners = [(.01, .01), (.5, .01), (.5, .99), (.01, .99), (.01, .01)]
    at = [(box['x'] + x*box['width'], box['y'] + y*box['height']) for x, y in corners]
    page.mouse.move(*at[0])
    page.mouse.down()
    for x, y in at[1:]: page.mouse.move(x, y, steps=8)
    page.mouse.up()
    until(page, lambda: 0 < len(names()) < len(some)) # the lasso chose the left half
    first, second, *_ = left = names()
    page.locator('button', has=page.locator('img')).first.press('Enter')
    until(page, lambda: titles(figure(page))[0].startswith(f'image {first}'), 60)
    assert all(part in page.url for part in ('view=image', 'pool+pairs=unlabeled', 'pool+lasso=')), page.url
    page.get_by_text(f'1 of {len(left)}', exact=True).wait_for()
    slide(page, 'place') # goes through what the pool view shows
    until(page, lambda: titles(figure(page))[0].startswith(f'image {second}'), 60)
    page.keyboard.press('?')
    assert page.get_by_text('Arrow keys: move a slider').is_visible()
    page.keyboard.press('3')
    page.get_by_text('of them were bought by the run').first.wait_for(timeout=PATIENCE)
    page.go_back()
    until(page, lambda: page.get_by_text('enlarge').is_visible())

WIDTHS = 390, 1280, 2560

def test_every_width_and_both_themes(page, opened, whole_app, tmp_path):
    "In every view figures fill the page and never more than it; the theme is the system's"
    page.goto(whole_app, timeout=PATIENCE)
    folder = Path(os.environ.get('PARTAL_ARTIFACTS') or tmp_path)
    for view in VIEWS:
        page.get_by_role('button', name=view, exact=True).click(timeout=PATIENCE)
        if view == 'pool': tick(page, 'map of what looks alike')
        plot = page.locator('.js-plotly-plot:visible').first
        plot.wait_for(timeout=PATIENCE)
        for wide in WIDTHS:
            page.set_viewport_size(dict(width=wide, height=1600))
            drawn = lambda: plot.evaluate('gd => gd._fullLayout?.width ?? 0') # 0: it is not drawn yet
            least = .3 if view == 'pool' and wide > 1200 else .6 # there the map is beside the thumbnails
            until(page, lambda: least*wide < drawn() <= wide)
            until(page, lambda: page.evaluate('document.scrollingElement.scrollWidth') <= wide)
            if view == 'image' and wide < 600: # where most controls are folded away
                last = page.get_by_text('enlarge', exact=True)
                assert last.is_hidden()
                tick(page, 'all controls')
                until(page, last.is_visible)
                page.screenshot(path=folder/'image-390-all.png')
                tick(page, 'all controls')
            paper = lambda: plot.evaluate('gd => gd._fullLayout.paper_bgcolor')
            for theme, color in dict(dark='#111', light='#fff').items():
                page.emulate_media(color_scheme=theme)
                until(page, lambda: paper() == color)
                page.wait_for_timeout(300) # for the screenshot: the other figures
                page.screenshot(path=folder/f'{view}-{wide}-{theme}.png')

RECORD = """() => {
  const log = window.redraw = {}, now = () => performance.now()
  addEventListener('keydown', () => Object.assign(log, {pressed: now(), progress: null, drawn: null}), true)
  const busy = () => { if (document.querySelector('.partal-busy')) log.progress ??= now() - log.pressed }
  new MutationObserver(busy).observe(document.body, {subtree: true, childList: true})
  document.querySelector('.js-plotly-plot').on('plotly_afterplot', () => { log.drawn ??= now() - log.pressed })
}"""

@pytest.mark.long
def test_how_long_a_redraw_takes_is_written_down(page, opened, entropy_app, tmp_path):
    "From the key to the progress bar and to the new figure, control by control; how long that may be is not asserted"
    page.goto(entropy_app, timeout=PATIENCE)
    figure(page)
    page.wait_for_timeout(1000) # until its place is measured
    page.evaluate(RECORD)
    slider = lambda name: (row(page, name).locator('.noUi-handle').first, 'ArrowRight')
    chosen = lambda name: (choice(page, name), 'ArrowDown')
    box = lambda name: (page.locator('.widget-checkbox', has_text=name).locator('input'), 'Space')
    keys = dict(place=slider('place'), order=chosen('order'), round=chosen('round'), passes=slider('T, passes'),
                truth=box('truth and error'), single=slider('single pass'), opacity=slider('above percentile'))
    rows = []
    for name, (control, key) in keys.items():
        control.press(key)
        until(page, lambda: page.evaluate('window.redraw.drawn'))
        rows.append(dict(control=name, **page.evaluate('({progress, drawn} = window.redraw, {progress, drawn})')))
    folder = Path(os.environ.get('PARTAL_ARTIFACTS') or tmp_path)
    table = pd.DataFrame(rows).round()
    table.to_csv(folder/'redraws.csv', index=False)
    print(table.to_string())
    assert table.progress.notna().all() and table.drawn.gt(0).all(), 'each redraw shows its progress'

def server_at(port:str): # the process that `app` started
    return next(p for p in psutil.process_iter(['cmdline']) if f'--port={port}' in (p.info['cmdline'] or []))

def is_kernel(process):
    try: return 'ipykernel_launcher' in ' '.join(process.cmdline())
    except psutil.NoSuchProcess: return False # it ended just now, also as a zombie

@pytest.mark.long
def test_the_kernels_of_closed_tabs_end(page, opened, tmp_path):
    "Those of open tabs, and the one that waits for the next tab, stay"
    with app('entropy', opened.folder.path, page, tmp_path) as url:
        server = server_at(re.search(r':(\d+)/', url)[1])
        count = lambda: sum(is_kernel(c) for c in server.children(recursive=True))
        for _ in range(2):
            page.goto(url, timeout=PATIENCE)
            figure(page)
        until(page, lambda: count() == 3, 120) # two visits, and the one that waits
        until(page, lambda: count() == 2, 180)
        slide(page, 'place')
        until(page, lambda: titles(figure(page))[0] == plain(entropy_view(opened, 1, 0).title))

def apart(colors, lacking:str)->float: # smallest CAM02-UCS distance, as eyes see them that lack a kind of cones
    if lacking: colors = cspace_convert(colors, dict(name='sRGB1+CVD', cvd_type=lacking, severity=100), 'sRGB1')
    seen = cspace_convert(np.clip(colors, 0, 1), 'sRGB1', 'CAM02-UCS')
    distances = np.linalg.norm(seen[:, None] - seen[None], axis=2)
    return distances[~np.eye(len(colors), dtype=bool)].min()

EYES = '', 'protanomaly', 'deuteranomaly', 'tritanomaly'

@pytest.mark.parametrize('lacking', EYES)
def test_forty_classes_have_colors_that_differ_for_all_eyes(lacking):
    "At least twice what is just noticed, and more than the twenty of Matplotlib's tab20 for who lacks a kind of cones"
    forty = apart(distinct_colors(40), lacking)
    assert forty > 4.6
    tab20 = apart(np.array(matplotlib.colormaps['tab20'].colors), lacking)
    if lacking: assert apart(distinct_colors(20), lacking) > 2*tab20
