"""Pallas kernels for TPUs; `support` is the way in, and imports none of them."""
