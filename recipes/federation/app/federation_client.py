"""A node's side of the Flower app: the package's."""

from fslora_hf.federation.client_app import app

__all__ = ["app"]
