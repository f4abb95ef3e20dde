"""The server's side of the Flower app: the package's."""

from fslora_hf.federation.server_app import app

__all__ = ["app"]
