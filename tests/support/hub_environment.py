"""Points `huggingface_hub` at a server of this test process. Must be imported before anything imports that library.

The client reads its endpoint, folders and token from the environment once, when it is imported, and many modules copy
them from there; a server that is up by then needs no patching afterwards. It runs for as long as the process.
"""

from __future__ import annotations

import atexit
import os
import shutil
import sys
import tempfile
from pathlib import Path

from hub_server import TOKEN, HubServer


if "huggingface_hub" in sys.modules:
    raise RuntimeError("`hub_environment` must be imported before `huggingface_hub`, which has read its environment.")

SERVER = HubServer()
SERVER.start()
HOME = Path(tempfile.mkdtemp(prefix="hf_home_"))
atexit.register(shutil.rmtree, HOME, ignore_errors=True)
SERVER.environment = {
    "HF_ENDPOINT": SERVER.url,
    "HF_HOME": str(HOME),
    "HF_TOKEN": TOKEN,
    "HF_HUB_DISABLE_XET": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_OFFLINE": "0",
    "NO_PROXY": "127.0.0.1",
    "no_proxy": "127.0.0.1",
}
# What would lead elsewhere, from the shell that started the tests.
for name in ("TRANSFORMERS_OFFLINE", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_TOKEN_PATH"):
    os.environ.pop(name, None)
os.environ.update(SERVER.environment)
