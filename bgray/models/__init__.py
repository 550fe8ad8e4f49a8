"""The table of models: each maps (B, C, T) audio to (B, S, C, T) estimates."""

from bgray.models.wav_unet import WavUNet

MODELS = {"wav_unet": WavUNet}
