"Cells marked `#| gpu`, on a card: their notebooks are executed as they are, from the first cell to the last"
from pathlib import Path

import nbformat
import pytest
import torch
from nbclient import NotebookClient
from nbdev.config import get_config
from nbdev.process import NBProcessor

NBS = Path(__file__).parents[1]/'nbs'
FLAGS = {*get_config(path=NBS.parent).tst_flags.split()} # cells with one of them are skipped without `--flags`

def flagged(path):
    "The directives of each cell that has some, as nbdev reads them"
    cells = NBProcessor(path, process=True).nb.cells
    return [set(cell.directives_) for cell in cells if getattr(cell, 'directives_', None)]

EVERY = sorted(NBS.glob('*.ipynb')) + sorted(NBS.glob('[!.]*/*.ipynb'))
NOTEBOOKS = [p for p in EVERY if '"#| gpu' in p.read_text('utf-8')]

@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU that PyTorch sees')
@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_cells_for_a_gpu(path):
    where = dict(metadata=dict(path=str(path.parent)))
    NotebookClient(nbformat.read(path, 4), timeout=900, kernel_name='python3', resources=where).execute()

@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_they_are_what_nbdev_runs_with_flags_gpu(path):
    "Which are skipped without it; no other cell of theirs is left out by `nbdev_test`, so both run the same"
    found = flagged(path)
    assert 'gpu' in FLAGS and any('gpu' in names for names in found)
    assert not any(names & (FLAGS - {'gpu'} | {'eval:'}) for names in found)
