"""MiniGPT's package: everything that the model files and the training loop call. `docs/how_it_works.md` is its map."""

__version__ = "0.1.0"
