"How large the network is beside the survey's: parameters, and multiply-adds of its convolutions, counted by shapes"
import pytest
import torch
from torch import nn

from partal_nb.config import preset
from partal_nb.data.folders import NYU_LAYOUTS
from partal_nb.model.padnet import make_model

def size(model, height, width): # parameters, multiply-adds of convolutions
    counts = []
    def count(conv, _, out): counts.append(out.numel()*conv.weight[0].numel())
    for m in model.modules():
        if isinstance(m, nn.Conv2d): m.register_forward_hook(count)
    with torch.no_grad(): model(torch.empty(1, 3, height, width))
    return sum(p.numel() for p in model.parameters()), sum(counts)

def test_the_network_of_the_protocol_beside_the_surveys():
    "README says so; the survey's PAD-Net has 12.1 M parameters and 167.6 GMAC for the same three tasks"
    config = preset('nyuv2', data='somewhere', pretrained=False)
    tasks = tuple(p.task for p in NYU_LAYOUTS['nyuv2_folder'].places)
    with torch.device('meta'): # shapes without numbers
        model = make_model(config, tasks).eval()
        parameters, macs = size(model, config.height, config.width)
        encoder = sum(p.numel() for p in model.encoder.parameters())
    assert (config.height, config.width, config.features) == (480, 640, 256)
    assert parameters/1e6 == pytest.approx(8.6, abs=.05)
    assert macs/1e9 == pytest.approx(100.6, abs=.05)
    assert encoder/1e6 == pytest.approx(3.9, abs=.15), 'as the survey has it: all the difference is in distillation'
    print(f'{parameters/1e6:.2f} M, {macs/1e9:.1f} GMAC, {encoder/1e6:.2f} M in the encoder')
