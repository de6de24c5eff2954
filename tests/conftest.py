"What several tests share"
import os
import signal
from pathlib import Path

# before torch: tests fork, and a child would wait for the threads that stayed behind
os.environ.setdefault('OMP_NUM_THREADS', '1')

import pytest

def pytest_configure(config):
    config.addinivalue_line('markers', 'slow: needs a program that takes long to install or to start')
    config.addinivalue_line('markers', 'gpu: needs a GPU; skipped where PyTorch sees none')
    what = 'repeats for minutes what a shorter test shows, or waits; PARTAL_LONG=1 runs it'
    config.addinivalue_line('markers', f'long: {what}')

# What takes minutes, the longest first: a file is one worker's, and the last one should not keep the others waiting
FIRST = ['explore', 'docs', 'executors', 'sweep', 'run', 'runs', 'cli', 'ask', 'first_week', 'types', 'strategies']

def pytest_collection_modifyitems(items):
    rank = {f'test_{name}': i for i, name in enumerate(FIRST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(FIRST)))
    if os.environ.get('PARTAL_LONG'): return
    skip = pytest.mark.skip(reason='takes minutes; PARTAL_LONG=1 runs it, and the weekly workflow does')
    for item in items:
        if item.get_closest_marker('long'): item.add_marker(skip)

@pytest.fixture(scope='session')
def shared()->Path:
    "Real sample data; it can not be redistributed, so it lies beside the repository or where `PARTAL_SHARED` says"
    folder = Path(os.environ.get('PARTAL_SHARED') or Path(__file__).parents[2]/'shared'/'data')
    if folder.is_dir(): return folder
    why = f"no sample data at {folder}; set PARTAL_SHARED to the folder that has it"
    public = 'GITHUB_ACTIONS' in os.environ
    if os.environ.get('CI') == 'true' and not public: pytest.fail(why)
    pytest.skip(why)

@pytest.fixture(scope='session')
def tools()->Path:
    "The annotation tools themselves: 1.1 GB, at odds with our pandas and Pillow, so in an environment of their own"
    home = Path(os.environ.get('PARTAL_TOOLS') or Path(__file__).parents[1]/'.venv'/'tools')
    if (home/'bin'/'label-studio').is_file(): return home/'bin'
    pytest.skip(f"no annotation tools in {home}, or where PARTAL_TOOLS says: `make tools` installs them")

@pytest.fixture(scope='session')
def fiftyone()->Path:
    "The Python that has FiftyOne, which wants other versions, too"
    home = Path(os.environ.get('PARTAL_FIFTYONE') or Path(__file__).parents[1]/'.venv'/'fiftyone')
    if (home/'bin'/'fiftyone').is_file(): return home/'bin'/'python'
    pytest.skip(f"no FiftyOne in {home}, or where PARTAL_FIFTYONE says: `make tools` installs it")

@pytest.fixture(scope='session')
def studio(tools, tmp_path_factory):
    "A running Label Studio"
    from studio import running_studio
    with running_studio(tools, tmp_path_factory.mktemp('studio')) as s: yield s

@pytest.fixture
def ctrl_c_arrives():
    "Where the tests run in the background SIGINT may be ignored, and a child inherits that"
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
