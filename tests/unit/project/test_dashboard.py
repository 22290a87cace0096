"""The Grafana dashboard by itself. That its metrics exist is seen on a live server, in tests/vllm."""

from __future__ import annotations

import re

from tests.helpers import grafana

FUNCTIONS = {"sum", "by", "rate", "histogram_quantile", "le", "instance"}


def test_panels_lie_side_by_side_and_say_what_they_show():
    panels = grafana.dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {(place["x"] + dx, place["y"] + dy) for dx in range(place["w"]) for dy in range(place["h"])}
        assert place["x"] + place["w"] <= 24
        assert not cells & taken, panel["title"]
        taken |= cells
        if panel["type"] != "row":
            assert len(panel["description"]) > 20
            assert panel["fieldConfig"]["defaults"]["unit"]


def test_every_query_is_for_the_chosen_servers_and_source():
    panels = [panel for panel in grafana.dashboard()["panels"] if panel["type"] != "row"]
    for panel in panels:
        for target in panel["targets"]:
            assert target["datasource"] == panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
            assert target["expr"].count("{") == target["expr"].count('{instance=~"$instance"}') > 0
            bare = re.sub(r"\{[^}]*\}|\[[^]]*\]", "", target["expr"])
            names = set(re.findall(r"[a-zA-Z_:][\w:]*", bare)) - FUNCTIONS
            assert names <= grafana.metrics(), names - grafana.metrics()
            assert bare.count("(") == bare.count(")")


def test_it_shows_what_the_runtime_and_vllm_count():
    names = grafana.metrics()
    assert {name for name in names if name.startswith("kvprofile_")} >= {
        "kvprofile_enabled", "kvprofile_retention_ratio", "kvprofile_full_heads", "kvprofile_kv_bytes_in_use",
        "kvprofile_kv_blocks_reclaimed_total", "kvprofile_kv_bytes_reclaimed_total",
    }  # fmt: skip
    assert all(name.startswith(("kvprofile_", "vllm:")) for name in names)
