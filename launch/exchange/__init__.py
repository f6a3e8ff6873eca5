"""Weights for other programs, and from them: a folder as Hugging Face lays it out.

folder/   config.json   scheduler_config.json   model.safetensors.index.json   model-00001-of-00003.safetensors ...
          movie_gen.py    the transformer and its sampler in plain torch, which needs nothing of this package
"""
