"""What a waveform net's logits become: four heads of log 000, and what each of them cannot say."""

from typing import Literal

import torch

Head = Literal["softmax", "none", "complementary", "tanh"]


def softmax(logits: torch.Tensor, mixture: torch.Tensor) -> torch.Tensor:
    """(B, S, T), (B, 1, T) -> (B, S, T): shares of the mixture, so that the sources sum to it.

    Each source is at most as large as the mixture and has its sign, at every sample: stems that
    cancel in the mixture are out of reach.
    """
    return logits.softmax(1) * mixture


def none(logits: torch.Tensor, mixture: torch.Tensor) -> torch.Tensor:
    """(B, S, T), (B, 1, T) -> (B, S, T): the logits, which nothing binds to the mixture."""
    return logits


def complementary(logits: torch.Tensor, mixture: torch.Tensor) -> torch.Tensor:
    """(B, S-1, T), (B, 1, T) -> (B, S, T): the last source is what the others leave of the mixture.

    Sums to the mixture and bounds nothing, but what the net gets wrong lands in the last source.
    """
    return torch.cat([logits, mixture - logits.sum(1, keepdim=True)], dim=1)


def tanh(logits: torch.Tensor, mixture: torch.Tensor) -> torch.Tensor:
    """(B, S, T), (B, 1, T) -> (B, S, T) in (-1, 1); saturated, it hardly learns any more."""
    return logits.tanh()


HEADS = {"softmax": softmax, "none": none, "complementary": complementary, "tanh": tanh}


def output_range(head: Head) -> tuple[float, float]:
    """What the sources can be at all; those of softmax are bounded by the mixture alone."""
    return (-1.0, 1.0) if head == "tanh" else (-float("inf"), float("inf"))


def num_logits(head: Head, num_sources: int) -> int:
    """Channels that the net has to give. ValueError where the sources would not depend on them."""
    if head in ("softmax", "complementary") and num_sources == 1:
        raise ValueError(
            f"head: {head} makes a single source equal to the input, whatever the net says; "
            "use none or tanh, or a task with more sources"
        )
    return num_sources - 1 if head == "complementary" else num_sources


def separate(head: Head, logits: torch.Tensor, audio: torch.Tensor) -> torch.Tensor:
    """(B*C, num_logits, T) logits of the channels of (B, C, T) audio -> (B, S, C, T) float32."""
    b, c, t = audio.shape
    sources = HEADS[head](logits.float(), audio.reshape(b * c, 1, t))  # (B*C, S, T)
    return sources.reshape(b, c, -1, t).transpose(1, 2)  # (B, S, C, T)
