METADATA = "sr_jax"  # the key of our own JSON in a file of weights
