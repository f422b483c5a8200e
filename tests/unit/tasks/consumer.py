"""A consumer of ``models:/NAME@champion``: asks MLflow for the champion in a loop, in a process of its own.

Prints one JSON line for each load: the version, the digest of its adapter's files, and one answer. Ends at end of file
on standard input.
"""

import json
import select
import sys
from pathlib import Path

from fedmentor_core.hashing import canonical_sha256
from tasks.registered_files import adapter_digests, load_registered


def main(tracking_uri: str, model_uri: str) -> None:
    """Load until told to stop; an error of any kind ends the process with a traceback."""
    from mlflow import MlflowClient, artifacts

    name = model_uri.removeprefix("models:/").split("@")[0]
    client = MlflowClient(tracking_uri=tracking_uri, registry_uri=tracking_uri)
    row = {"post": "I have not slept for days.", "question": "Is the poster stressed?"}
    told_to_stop = False
    while True:
        loaded = load_registered(tracking_uri, model_uri, device="cpu")
        uri = f"{client.get_model_version_download_uri(name, loaded.version)}/artifacts/adapter"
        digest = canonical_sha256(adapter_digests(Path(artifacts.download_artifacts(uri, tracking_uri=tracking_uri))))
        line = {"version": loaded.version, "adapter": digest, "answer": loaded.answers([row], max_new_tokens=4)[0]}
        print(json.dumps(line), flush=True)
        if told_to_stop:  # the last load began after all changes
            return
        told_to_stop = bool(select.select([sys.stdin], [], [], 0)[0])


if __name__ == "__main__":
    main(*sys.argv[1:])
