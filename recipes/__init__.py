"""How the weights in this repository were made. Nothing here is needed to use them."""
