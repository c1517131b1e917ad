"""MiniGPT's helpers: everything that the model file and the training loop lean on."""
