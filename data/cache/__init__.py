"""The latent cache: sharded tar files, the Parquet index of their rows, and the versions that name them."""
