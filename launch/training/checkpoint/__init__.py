"""Checkpoints: what their files hold (layout, manifest, digests), writing, reading, and choosing among them.

    directory/step-00000100/   cinemesh.json   00000.safetensors   00001.safetensors ...

Every writer has one safetensors file: a part of its flat shard of every state. The manifest, written last, says where
each parameter lies in them. A reader goes by it alone, so any plan reads what any plan wrote.
"""
