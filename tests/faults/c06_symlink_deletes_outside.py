"""Fault (security): reading an adapter from a LOCAL folder deletes the file that a symlink in it points to, outside the folder, if that file's
folder is called `blobs` and its name is not its hash (such as ~/.ollama/models/blobs/sha256-...): `check_download` takes it for the Hub's
cache. git, tar and rsync keep symlinks. exit 1 = present."""
import sys, tempfile, os
from pathlib import Path
from funlora_hf.adapters.untrusted_adapter import read_adapter
d=Path(tempfile.mkdtemp()); victim=d/"home"/".ollama"/"models"/"blobs"/"sha256-0123abcd"; victim.parent.mkdir(parents=True); victim.write_bytes(b"precious model of the user")
hostile=d/"home"/"downloads"/"class_7"; hostile.mkdir(parents=True)
(hostile/"adapter_config.json").symlink_to("../../.ollama/models/blobs/sha256-0123abcd"); (hostile/"adapter_model.safetensors").write_bytes(b"x")
try: read_adapter(hostile)
except Exception as e: print(type(e).__name__,e)
print("victim still there:",victim.exists()); sys.exit(0 if victim.exists() else 1)
