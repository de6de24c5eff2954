"The masks and passes of 20_model.dropout against the package of Masksembles' authors"
import numpy as np
import pytest
import torch
from masksembles.common import generation_wrapper
from masksembles.torch import Masksembles2D

from partal_nb.model.dropout import Masks, make_masks

@pytest.mark.parametrize('channels,n,scale', [(32, 4, 2.), (64, 4, 2.), (256, 8, 1.5), (48, 3, 4.)])
def test_masks_are_of_the_same_kind(channels, n, scale):
    "As many channels kept by each mask, as many shared by two, up to the spread among sets of masks"
    np.random.seed(0)
    shared = lambda m: np.mean([(a*b).sum() for i, a in enumerate(m) for b in m[:i]])
    ours = [make_masks(channels, n, scale, seed).numpy() for seed in range(20)]
    theirs = [generation_wrapper(channels, n, scale) for _ in range(20)]
    for m in ours + theirs: assert m.shape == (n, channels) and m.any(0).all() and len(set(m.sum(1))) == 1
    kept = [np.mean([m.sum(1)[0] for m in sets]) for sets in (ours, theirs)]
    assert abs(kept[0] - kept[1]) <= max(2, .04*channels)
    a, b = ([shared(m)/m.sum(1)[0] for m in sets] for sets in (ours, theirs))
    assert abs(np.mean(a) - np.mean(b)) < .05

def test_passes_are_the_same():
    "Their layer splits a batch among the masks; ours has one mask a pass"
    theirs, ours = Masksembles2D(32, 4, 2.), Masks(32, 4).eval()
    ours.masks.copy_(theirs.masks)
    x = torch.randn(1, 32, 5, 6)
    split = theirs(x.expand(4, -1, -1, -1))
    for i in range(4):
        ours.which = i
        assert torch.equal(ours(x)[0], split[i])
