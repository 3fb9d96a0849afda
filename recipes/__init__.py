"""The training of the weights in this repository. Nothing here is needed to use them."""
