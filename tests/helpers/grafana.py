"""The Grafana dashboard as tests read it: its panels, and the metrics that they ask Prometheus for."""

from __future__ import annotations

import json
import re

from tests.helpers.models import ROOT

DASHBOARD = ROOT / "dashboards" / "kvprofile-grafana.json"


def dashboard():
    return json.loads(DASHBOARD.read_text())


def expressions():
    """{title of a panel: its queries}."""
    panels = dashboard()["panels"]
    return {panel["title"]: [target["expr"] for target in panel["targets"]] for panel in panels if "targets" in panel}


def metrics():
    """Names of the series that the panels query: what stands before a selector, as every series here has one."""
    found = {
        name for queries in expressions().values() for query in queries for name in re.findall(r"([\w:]+)\{", query)
    }
    variables = [each["definition"] for each in dashboard()["templating"]["list"] if "definition" in each]
    return found | {name for text in variables for name in re.findall(r"label_values\(([\w:]+),", text)}


def names_in(text):
    """Names of the series in Prometheus's text format."""
    return {re.match(r"[\w:]+", line)[0] for line in text.splitlines() if line and not line.startswith("#")}
