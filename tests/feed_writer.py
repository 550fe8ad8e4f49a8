"""A process that reads and fills a feed cache, for tests that need several: without torch, its
units made up.

python feed_writer.py FOLDER BYTES SEED FIRST LAST SECONDS: asks for the units, each of which takes
SECONDS to make, and prints what its cache has counted; exit code 3 where a byte is wrong.
"""

import json
import sys
import time

import numpy as np

from bgray import data, feed_cache
from bgray.config import FeedCache
from bgray.feed_cache import UnitCache
from bgray.feed_room import GIB

SHAPE = (2, 4, 1, 8192)


class Plain:
    voices = ("audio",)


def recipe(seed):
    return data.Recipe(
        url="", groups=(("a", 0),), task=Plain(), augment=(), sample_rate=8000, segment=8192,
        batch_size=4, seed=seed, groups_per_unit=1, batches_per_unit=2, data_hash="made up",
    )  # fmt: skip


def made_up(recipe, number, rank=0, world=1):
    """262 KB a unit."""
    x = np.random.default_rng([recipe.seed, number]).integers(-9999, 9999, SHAPE).astype(np.int16)
    return x, -x[:, :, None]


SIZE = 2 * int(np.prod(SHAPE)) * 2


def main():
    folder, size, seed, first, last, seconds = sys.argv[1:]
    seed, first, last = int(seed), int(first), int(last)
    quick = made_up

    def slow(*args):
        print("making", flush=True)
        time.sleep(float(seconds))
        return quick(*args)

    data.make_unit = slow
    feed_cache.TRIED = 10**6
    cache = UnitCache(FeedCache(folder, int(size) / GIB), recipe(seed))
    for number in range(first, last + 1):
        cache.tell(number)
        found = cache.unit(number, last)
        for a, b in zip(found, quick(recipe(seed), number), strict=True):
            if not np.array_equal(a, b):
                sys.exit(3)
    print(json.dumps({**cache.record({}), "notes": cache.notes}))


if __name__ == "__main__":
    from feed_writer import main  # so that its classes have the name that others know them by

    main()
