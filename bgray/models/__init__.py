"""The table of models: each maps (B, C, T) audio to (B, S, C, T) estimates."""

from bgray.models.conv_separator import ConvSeparator
from bgray.models.gru_separator import GruSeparator
from bgray.models.open_unmix import OpenUnmix
from bgray.models.roll_autoencoder import RollAutoencoder
from bgray.models.roll_rnn import RollRnn
from bgray.models.spec_unet import SpecUNet
from bgray.models.wav_unet import WavUNet
from bgray.models.wave_unet import WaveUNet
from bgray.models.wavenet import WaveNet

MODELS = {
    "conv_separator": ConvSeparator,
    "gru_separator": GruSeparator,
    "open_unmix": OpenUnmix,
    "roll_autoencoder": RollAutoencoder,
    "roll_rnn": RollRnn,
    "spec_unet": SpecUNet,
    "wav_unet": WavUNet,
    "wave_unet": WaveUNet,
    "wavenet": WaveNet,
}
