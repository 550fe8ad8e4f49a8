"""Keys of units: another recipe, rank or code is another key; another path is not."""

import dataclasses
import importlib.metadata

import pytest
from coordinates import recipe_of, training_folder

from bgray import feed_key
from bgray.augment.gain import Gain
from bgray.augment.polarity import Polarity
from bgray.feed_key import PACKAGE, Unsure, fingerprint, key_of
from bgray.tasks import TASKS, Deartifact, Separation, Unshift


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return recipe_of(training_folder(tmp_path_factory.mktemp("coordinates")), augment=(Gain(),))


@pytest.fixture(autouse=True)
def _fresh():
    fingerprint.cache_clear()
    yield
    fingerprint.cache_clear()


CHANGES = {
    "groups": (("train-00000.parquet", 1),),
    "task": Unshift(band_limit_target=True),
    "augment": (Gain(), Polarity()),
    "sample_rate": 8001,
    "segment": 65,
    "batch_size": 16,
    "seed": 4,
    "groups_per_unit": 1,
    "batches_per_unit": 4,
    "data_hash": "another",
}


def test_every_field_of_the_recipe_but_the_path_is_in_the_key(recipe):
    fields = {field.name for field in dataclasses.fields(recipe)}
    assert fields - set(CHANGES) == {"url"}
    keys = {key_of(recipe)}
    keys |= {key_of(dataclasses.replace(recipe, **{n: v})) for n, v in CHANGES.items()}
    assert len(keys) == 1 + len(CHANGES)
    assert key_of(dataclasses.replace(recipe, url="s3://elsewhere")) == key_of(recipe)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (Deartifact(), Deartifact(low=-11)),  # kept under a name with an underscore
        (Deartifact(), Deartifact(reuse=2)),
        (Separation(instruments=("a",)), Separation(instruments=("a",), mix="random")),
        (Unshift(semitones=(7.0, 12.0)), Unshift(semitones=(5.0, 12.0))),
        (Unshift(), Deartifact()),
    ],
)
def test_what_a_task_keeps_for_itself_is_in_the_key_as_well(recipe, one, other):
    keys = [key_of(dataclasses.replace(recipe, task=task)) for task in (one, other)]
    assert keys[0] != keys[1]


def test_the_order_and_options_of_augmentations_are_in_the_key(recipe):
    chains = [(Gain(), Polarity()), (Polarity(), Gain()), (Gain(high_db=5.0), Polarity())]
    assert len({key_of(dataclasses.replace(recipe, augment=chain)) for chain in chains}) == 3


def test_ranks_have_keys_of_their_own(recipe):
    assert len({key_of(recipe, *ranks) for ranks in [(0, 1), (0, 2), (1, 2), (0, 4)]}) == 4


@pytest.mark.parametrize("name", sorted(TASKS))
def test_every_task_has_a_key(recipe, name):
    assert len(key_of(dataclasses.replace(recipe, task=TASKS[name]()))) == 32


@pytest.mark.parametrize("module", ["data", "tasks.unshift", "augment.gain", "encoding", "shards"])
def test_a_change_of_the_code_that_makes_units_is_another_key(recipe, monkeypatch, module):
    before, name = key_of(recipe), f"bgray.{module}"
    edited = feed_key._SOURCES[name] + "\n# faster\n"
    monkeypatch.setitem(feed_key._SOURCES, name, edited)
    read = feed_key._read
    path = PACKAGE.joinpath(*module.split(".")).with_suffix(".py")
    monkeypatch.setattr(feed_key, "_read", lambda p: edited if p == path else read(p))
    fingerprint.cache_clear()
    assert key_of(recipe) != before


def test_code_that_makes_no_units_is_not_in_the_key(recipe, monkeypatch):
    before = key_of(recipe)
    for name in ("bgray.report", "bgray.loop", "bgray.models.wav_unet"):
        monkeypatch.setitem(feed_key._SOURCES, name, "edited")
    fingerprint.cache_clear()
    assert key_of(recipe) == before


@pytest.mark.parametrize("library", feed_key.LIBRARIES)
def test_another_version_of_a_library_is_another_key(recipe, monkeypatch, library):
    before, version = key_of(recipe), importlib.metadata.version
    fingerprint.cache_clear()
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: "0" if name == library else version(name)
    )
    assert key_of(recipe) != before


def test_a_process_whose_source_was_edited_since_it_began_has_no_key(recipe, monkeypatch):
    monkeypatch.setitem(feed_key._SOURCES, "bgray.shards", "as it was")
    with pytest.raises(Unsure, match=r"shards\.py has changed since this process began"):
        key_of(recipe)


def test_an_option_that_is_an_object_has_no_key(recipe):
    task = Unshift()
    task.noise = object()
    with pytest.raises(TypeError, match="is no plain option"):
        key_of(dataclasses.replace(recipe, task=task))
