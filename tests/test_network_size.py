"How large the network is beside the survey's, counted by shapes; and encoders that take images of one size only"
import pytest
import torch
from torch import nn

from partal_nb.config import preset
from partal_nb.data.folders import NYU_LAYOUTS
from partal_nb.model.encoder import Encoder
from partal_nb.model.padnet import make_model
from partal_nb.runs.loop import run

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

@pytest.mark.parametrize('encoder', ['maxvit_pico_rw_256', 'coatnet_nano_rw_224', 'halonet26t'])
def test_an_encoder_for_images_of_one_size_is_refused_before_anything_is_trained(encoder, tmp_path):
    with pytest.raises(ValueError, match='expected one for any size; take e.g. lite0'):
        run(preset('demo', encoder=encoder, pretrained=False, device='cpu'), tmp_path/'run', progress=False)
    assert not (tmp_path/'run').exists()

@pytest.mark.parametrize('encoder', ['swin_tiny_patch4_window7_224', 'swinv2_tiny_window8_256', 'mambaout_femto'])
def test_an_encoder_with_channels_last_works_at_any_size(encoder):
    net = Encoder(encoder, pretrained=False).eval()
    with torch.no_grad(): assert net(torch.zeros(1, 3, 72, 100)).shape == (1, net.channels, 18, 25)
