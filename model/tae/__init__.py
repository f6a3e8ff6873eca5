"""The temporal autoencoder: clips to latents and back, learned. Ordinary modules and autograd, outside the program."""
