"""The application of a checkpoint behind uvicorn alone: ``python -m benchmarks.serve_bare CHECKPOINT PORT``."""

from __future__ import annotations

import sys

import torch
import uvicorn

from serve.api import Limits, build_api
from serve.app import ServeArgs
from serve.gate import Gate
from serve.served import Served


def main() -> None:
    """Serves until it is ended."""
    torch.set_num_threads(1)
    served, args = Served(), ServeArgs(checkpoint_uri=sys.argv[1])
    served.change({"checkpoint_uri": sys.argv[1]})
    app = Gate(build_api(served, Limits()), None, args.max_body_bytes, args.max_in_flight, lambda record: None)
    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[2]), log_level="warning", access_log=False)


if __name__ == "__main__":
    main()
