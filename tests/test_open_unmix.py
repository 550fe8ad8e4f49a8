import numpy as np
import pytest
import torch

from bgray.models.open_unmix import OpenUnmix, Resample, bins_below

pytestmark = pytest.mark.usefixtures("one_thread")

MR1 = {"order": "act_bn", "out_bn": False, "output_mean_init": 0.0}
MR2 = {**MR1, "rnn": "gru"}
SMALL = {"n_fft": 64, "hop": 16, "bandwidth_hz": 3000.0, "hidden": 8, "layers": 1}


def noise(*shape, seed=1):
    return 0.1 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def build(num_sources=1, channels=2, sample_rate=8000, **options):
    torch.manual_seed(0)
    return OpenUnmix(
        sample_rate=sample_rate, num_sources=num_sources, channels_in=channels, **options
    )


def counts(**options):
    """(parameters, parameters and buffers) of one target of the original's stereo net."""
    with torch.device("meta"):
        model = build(sample_rate=44100, **options)
    parameters = sum(p.numel() for p in model.parameters())
    return parameters, sum(value.numel() for value in model.state_dict().values())


def closed_form(bins, max_bin, hidden=512, gates=4, out_bn=True, scales=()):
    """Parameters and, with batch norm's buffers, all values of a stereo net of 3 RNN layers."""
    c = 2
    dense = c * max_bin * hidden + 2 * hidden * hidden + hidden * c * bins
    half = hidden // 2
    rnn = 3 * 2 * gates * half * (hidden + half + 2)
    vectors = 2 * max_bin + 2 * bins
    norms = [hidden, hidden] + [c * bins] * out_bn
    merge = 0
    for s in scales:  # longer and shorter windows, each two convolutions of s + 1 taps
        merge += 2 * 2 * (c * c * (s + 1) + c)
    if scales:
        merge += (1 + 2 * len(scales)) * c * c + c
        norms.append(c)
    parameters = dense + rnn + vectors + merge + 2 * sum(norms)
    return parameters, parameters + 2 * sum(norms) + len(norms)


@pytest.mark.parametrize(
    ("expected", "options"),
    [
        ((8_893_348, 8_903_595), {}),
        ((9_469_960, None), {"bandwidth_hz": None}),
        ((8_885_152, 8_887_202), MR1),
        ((10_255_870, None), {"n_fft": 5632}),
        ((11_391_134, None), {"n_fft": 6912}),
        ((12_527_424, None), {"n_fft": 8192}),
        ((12_640_540, None), {"n_fft": 8320}),
        ((28_257_188, None), {"hidden": 1024}),
        (closed_form(2049, 1487), {}),
        (closed_form(2049, 1487, gates=3, out_bn=False), MR2),
        (closed_form(5825, 4227), {"n_fft": 11648}),
        (closed_form(7617, 5527), {"n_fft": 15232}),
        (
            closed_form(2049, 1487, gates=3, out_bn=False, scales=(2, 4)),
            {**MR2, "extra_resolutions": (2, 4)},
        ),
        (
            closed_form(2049, 2049, gates=3, out_bn=False, scales=(4,)),
            {**MR2, "extra_resolutions": (4,), "bandwidth_hz": None},
        ),
    ],
)
def test_parameter_counts_of_the_original(expected, options):
    parameters, values = counts(**options)
    assert parameters == expected[0]
    assert expected[1] in (None, values)


def test_each_target_has_a_net_of_its_own():
    with torch.device("meta"):
        model = build(4, sample_rate=44100)
    assert sum(p.numel() for p in model.parameters()) == 4 * 8_893_348


@pytest.mark.parametrize(
    ("bandwidth_hz", "sample_rate", "n_fft", "bins"),
    [
        (16000.0, 44100, 4096, 1487),  # the original's max_bin
        (16000.0, 48000, 48, 17),  # bins of 1 kHz: 0 to 16
        (15999.0, 48000, 48, 16),
        (1e6, 8000, 64, 33),
        (None, 8000, 64, 33),
    ],
)
def test_bandwidth_counts_the_bins_at_or_below_it(bandwidth_hz, sample_rate, n_fft, bins):
    assert bins_below(bandwidth_hz, sample_rate, n_fft) == bins


def with_gain(gain, **options):
    """A net whose last layer is silent, so that every gain is what `output_mean` says."""
    model = build(**{**SMALL, **options}).eval()
    with torch.no_grad():
        for net in model.core.nets:
            net.fc3.weight.zero_()
            net.output_mean.fill_(gain)
    return model


@pytest.mark.parametrize("samples", [1, 20, 33, 511, 512, 1000])
@pytest.mark.parametrize("scales", [(), (2, 4)])
def test_gain_one_returns_the_mixture_at_any_length(samples, scales):
    audio = noise(2, 2, samples)
    estimate, _ = with_gain(1.0, extra_resolutions=scales)(audio)
    torch.testing.assert_close(estimate, audio[:, None], rtol=0, atol=1e-6)


def test_audio_is_not_rounded_to_bfloat16_under_autocast():
    audio = noise(2, 2, 500)
    with torch.autocast("cpu", torch.bfloat16):
        estimate, extras = with_gain(1.0)(audio)
    assert extras["magnitude"].dtype == torch.float32
    torch.testing.assert_close(estimate, audio[:, None], rtol=0, atol=1e-6)


def test_gains_are_never_negative():
    estimate, extras = with_gain(-1.0)(noise(2, 2, 500))
    assert not estimate.any()
    assert not extras["magnitude"].any()


def test_fresh_gains_start_around_output_mean():
    audio = noise(2, 2, 500)
    for start in (1.0, 0.5):
        magnitude = with_gain(start, output_mean_init=start)(audio)[1]["magnitude"]
        fresh = build(**SMALL, output_mean_init=start).core.nets[0].output_mean
        assert (fresh == start).all()
        torch.testing.assert_close(magnitude, start * with_gain(1.0)(audio)[1]["magnitude"])


def test_estimate_is_the_returned_magnitude_with_the_mixture_s_phase():
    model, audio = build(2, **SMALL).eval(), noise(3, 2, 500)
    estimate, extras = model(audio)
    window = torch.hann_window(64)
    mixture = torch.stft(audio.flatten(0, 1), 64, 16, window=window, return_complex=True)
    mixture = mixture.unflatten(0, (3, 1, 2))
    assert extras["magnitude"].shape == (3, 2, 2, 33, 500 // 16 + 1)  # (B, S, C, F, N)
    spectrum = torch.polar(extras["magnitude"], mixture.angle().expand(3, 2, 2, 33, 32))
    expected = torch.istft(spectrum.flatten(0, 2), 64, 16, window=window, length=500)
    torch.testing.assert_close(estimate.flatten(0, 2), expected, rtol=0, atol=1e-6)


def test_inner_frames_are_those_of_the_original_s_uncentred_training():
    audio = noise(1, 2, 512)
    magnitude = with_gain(1.0)(audio)[1]["magnitude"][0, 0]
    window = torch.hann_window(64)
    uncentred = torch.stft(audio[0], 64, 16, window=window, center=False, return_complex=True)
    torch.testing.assert_close(magnitude[..., 2:-2], uncentred.abs())


def test_the_net_looks_below_the_bandwidth_and_writes_above_it():
    model = build(**SMALL).eval()
    magnitude = noise(1, 2, 33, 20).abs()
    above = magnitude.clone()
    above[:, :, bins_below(3000.0, 8000, 64) :] += 1
    assert torch.equal(model.core(magnitude, []), model.core(above, []))
    assert model.core(magnitude, [])[..., -1, :].any()


def test_targets_do_not_share_anything():
    model, audio = build(2, **SMALL).eval(), noise(2, 2, 500)
    before, _ = model(audio)
    with torch.no_grad():
        model.core.nets[1].fc1.weight.mul_(2)
    after, _ = model(audio)
    assert torch.equal(before[:, 0], after[:, 0])
    assert not torch.equal(before[:, 1], after[:, 1])


@pytest.mark.parametrize("order", ["bn_act", "act_bn"])
def test_order_says_whether_the_rnn_sees_bounded_or_normalised_features(order):
    model, seen = build(**{**SMALL, "order": order}).train(), []
    model.core.nets[0].rnn.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(noise(4, 2, 500))
    rows = seen[0].flatten(0, 1)  # (N*B, hidden)
    normalised = torch.allclose(rows.std(0, correction=0), torch.ones(8), atol=0.01)
    assert normalised == (order == "act_bn")
    assert (rows.abs().max() < 1) == (order == "bn_act")


@pytest.mark.parametrize("options", [{}, {"extra_resolutions": (2, 4)}])
def test_frames_and_items_are_not_mixed_up(options):
    """What the original's snapshot did: there an item's output changed with the others'."""
    model = build(**{**SMALL, **options}).eval()
    batch = noise(3, 2, 500)
    order = [2, 0, 1]
    torch.testing.assert_close(model(batch[order])[0], model(batch)[0][order], rtol=0, atol=1e-6)
    # A net without a memory, on a mixture that repeats after whole windows, repeats too.
    with torch.no_grad():
        for p in model.core.nets[0].rnn.parameters():
            p.zero_()
    if not options:
        magnitude = noise(1, 2, 33, 1).abs()
        gains = model.core(torch.cat([magnitude, 2 * magnitude, magnitude], dim=-1), [])
        torch.testing.assert_close(gains[..., 0], gains[..., 2])
        assert not torch.allclose(gains[..., 0], gains[..., 1])


@pytest.mark.parametrize("scale", [2, 4, 6])
@pytest.mark.parametrize("finer", [True, False])
def test_resampled_grids_have_exactly_the_base_s_size(scale, finer):
    f, n = 12 * scale + 1, 3 * scale + 1
    # scale times as many steps between the first and the last, or as few.
    more_bins, more_frames = (f - 1) * scale + 1, (n - 1) * scale + 1
    fewer_bins, fewer_frames = (f - 1) // scale + 1, (n - 1) // scale + 1
    grid = (more_bins, fewer_frames) if finer else (fewer_bins, more_frames)
    assert Resample(2, scale, finer=finer)(noise(1, 2, *grid)).shape == (1, 2, f, n)


def test_extra_resolutions_come_longer_windows_first_and_cover_the_base():
    model, calls = build(**SMALL, extra_resolutions=(2, 4)).eval(), []
    model.core.register_forward_pre_hook(lambda _, args: calls.append(args))
    model(noise(1, 2, 500))
    ((base, others),) = calls
    assert base.shape == (1, 2, 33, 32)
    # 512 samples, the next whole hop of the longest window, 64.
    assert [tuple(x.shape[2:]) for x in others] == [(65, 17), (17, 65), (129, 9), (9, 129)]


def test_every_resolution_reaches_the_gains():
    model = build(**SMALL, extra_resolutions=(2, 4)).eval()
    model(noise(1, 2, 500))[0].square().sum().backward()
    for resample in model.core.nets[0].merge.resample:
        assert all(p.grad.any() for p in resample.parameters())


def shards():
    rng = np.random.default_rng(0)
    sizes = [(1, 400), (3, 400), (2, 640), (1, 160)]
    return [torch.from_numpy(0.1 * rng.standard_normal((b, 2, t))).float() for b, t in sizes]


def test_input_statistics_in_one_pass_are_those_of_all_frames_at_once():
    model = build(2, **SMALL)
    model.observe(iter(shards()))
    window = torch.hann_window(64)
    frames = []
    for audio in shards():
        for stereo in audio:
            spectrum = torch.stft(stereo, 64, 16, window=window, return_complex=True)
            frames.append(spectrum.abs().mean(0).double().numpy())  # (F, N)
    frames = np.concatenate(frames, axis=1)
    scale = frames.std(axis=1)
    scale = np.maximum(scale, 1e-4 * scale.max())
    for net in model.core.nets:
        np.testing.assert_allclose(net.input_mean.detach(), -frames.mean(1)[:25], rtol=1e-6)
        np.testing.assert_allclose(net.input_scale.detach(), 1 / scale[:25], rtol=1e-6)


def test_after_observing_the_input_has_mean_0_and_deviation_1_in_every_bin():
    model, audio = build(channels=1, **SMALL), noise(8, 1, 640)
    model.observe([audio])
    net = model.core.nets[0]
    x = model.stft(audio).abs()[:, 0, :25]  # (B, F, N)
    x = ((x + net.input_mean[:, None]) * net.input_scale[:, None]).detach()
    torch.testing.assert_close(x.mean((0, 2)), torch.zeros(25), rtol=0, atol=1e-5)
    torch.testing.assert_close(x.std((0, 2), correction=0), torch.ones(25))


def test_a_quiet_bin_s_scale_stays_within_1e4_of_the_loudest():
    model = build(channels=1, **SMALL)
    # 1 kHz is bin 8 of 125 Hz; a cosine of whole half periods goes on when it is reflected.
    tone = 0.5 * torch.cos(2 * torch.pi * 1000 * torch.arange(641) / 8000)
    model.observe([torch.stack([tone, torch.zeros(641)])[:, None]])
    scale = model.core.nets[0].input_scale.detach()
    assert scale.argmin() == 8
    assert scale.max() / scale.min() == pytest.approx(1e4, rel=1e-5)


def test_silence_has_scale_1():
    model = build(channels=1, **SMALL)
    model.observe([torch.zeros(2, 1, 500)])
    assert not model.core.nets[0].input_mean.any()
    assert (model.core.nets[0].input_scale == 1).all()


def test_statistics_of_nothing_are_refused():
    with pytest.raises(ValueError, match="input statistics need at least one mixture, got none"):
        build(**SMALL).observe([])


def test_shapes_can_be_asked_for_without_memory():
    with torch.device("meta"):
        model = build(4, sample_rate=44100, extra_resolutions=(2, 4)).eval()
        estimate, extras = model(torch.zeros(3, 2, 50000))
    assert estimate.shape == (3, 4, 2, 50000)
    assert extras["magnitude"].shape == (3, 4, 2, 2049, 49)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_fft": 63}, "n_fft: 63 is odd; use 62 or 64"),
        ({"hop": 17}, "hop: 17 is more than a quarter of n_fft = 64, .* use at most 16"),
        ({"bandwidth_hz": 0.0}, "bandwidth_hz: 0 leaves no bin; use null for all of them"),
        ({"hidden": 7}, "hidden: 7 is odd, and each direction gets half; use 8"),
        ({"dropout": 1.0}, "dropout: 1 must be at least 0 and below 1"),
        ({"layers": 0}, "layers: 0 must be at least 1"),
        ({"rnn": "rnn"}, "rnn: 'rnn' is not one of lstm, gru"),
        ({"order": "act"}, "order: 'act' is not one of bn_act, act_bn"),
        ({"extra_resolutions": (2, 2)}, r"extra_resolutions: \(2, 2\) says one twice"),
        ({"extra_resolutions": (3,)}, "extra_resolutions: 3 must be even, and at least 2"),
        (
            {"extra_resolutions": (6,)},
            "extra_resolutions: 6 must divide n_fft/2 = 32 and hop = 16",
        ),
    ],
)
def test_options_that_do_not_fit_are_named_with_the_way_out(options, message):
    with pytest.raises(ValueError, match=message):
        build(**{**SMALL, **options})
