"""What every test and every process of one runs with, set before a library reads it: no network, and nobody is told."""

import os
from pathlib import Path

from tests.no_network import sitecustomize

_PATH = [str(Path(sitecustomize.__file__).parent), str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, _PATH))
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
os.environ |= {"VLLM_NO_USAGE_STATS": "1", "VLLM_HOST_IP": "127.0.0.1"}  # the address that it would ask a route for
