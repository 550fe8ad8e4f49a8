from bgray import details


class Trial:
    """What `_facts` asks of one."""

    url, run = "results/tiny/0123456789ab", None

    def __init__(self, **info):
        self.info = info


def facts(**info):
    return dict(details._facts(None, Trial(**info)))


def test_how_it_was_computed_is_said_in_one_line():
    choices = {"precision": "bf16", "compile": True, "cuda_graphs": False, "recompute": True}
    assert facts(choices=choices)["computed"] == "bf16, compile, recompute"
    assert "computed" not in facts()  # of runs that are older than that


def test_the_share_of_units_from_the_feed_cache_is_there_where_there_was_one():
    assert facts(feed_cache={"hit_rate": 0.786})["units from the feed cache"] == "79%"
    assert "units from the feed cache" not in facts(feed_cache={"hit_rate": None})
    assert "units from the feed cache" not in facts(feed_cache=None)
