"""What diverged.json says of a batch is enough to cut it from the shards again, by hand."""

import json

import numpy as np
import pytest

from bgray import shards
from bgray.augment.gain import Gain
from bgray.data import make_unit, training_recipe
from bgray.lineage import identify
from bgray.tasks import Unshift


@pytest.fixture
def recipe(shards_url):
    return training_recipe(
        shards.read_manifest(shards_url),
        shards_url,
        Unshift(),
        augment=(),
        segment=512,
        batch_size=4,
        seed=7,
        groups_per_unit=1,
        batches_per_unit=3,
    )


def cut(recipe, crop):
    rows = shards.read_row_group(recipe.url, crop["shard"], crop["row_group"])
    row = rows[crop["row_in_group"]]
    assert f"{row.key} @{row.start}" == crop["chunk"]
    whole = shards.decode_voice(row, crop["voice"])
    return whole[:, crop["start"] : crop["start"] + crop["frames"]]


@pytest.mark.parametrize("step", [0, 2, 5])
def test_each_row_is_the_crop_that_it_is_said_to_be(recipe, step):
    rows = json.loads(json.dumps(identify(recipe, step, world=2)))
    inputs, targets = make_unit(recipe, step // 3)
    assert [row["rank"] for row in rows] == [0, 0, 1, 1]
    for row, x, y in zip(rows, inputs[step % 3], targets[step % 3], strict=True):
        crops = {crop["voice"]: crop for crop in row["crops"]}
        np.testing.assert_array_equal(cut(recipe, crops["shift_12"]), x)
        np.testing.assert_array_equal(cut(recipe, crops["audio"]), y[0])


def test_the_generator_of_a_row_gives_its_crop_and_then_its_augmentation(recipe):
    import dataclasses

    loud = dataclasses.replace(recipe, augment=(Gain(),))
    row = identify(loud, 4)[2]
    rng = np.random.default_rng(row["rng"])
    crop = row["crops"][0]
    frames = shards.read_row_group(recipe.url, crop["shard"], crop["row_group"])[
        crop["row_in_group"]
    ].frames
    assert int(rng.integers(0, frames - 512 + 1)) == crop["start"]
    gain = Gain().draw(rng)
    x = make_unit(loud, 1)[0][1][2] / 32768
    plain = make_unit(recipe, 1)[0][1][2].astype(np.float32) / 32768
    expected = Gain().apply(plain, gain, 8000)
    scale = np.abs(x).max() / np.abs(expected).max()  # turned down where it would clip
    assert 0.3 < scale < 1.001
    np.testing.assert_allclose(x, expected * scale, atol=2e-4)
