"""Proofs of a plan: parity with autograd, and lint for capture."""
