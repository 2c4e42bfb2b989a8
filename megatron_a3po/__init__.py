"""Asynchronous RL post-training of language models on Megatron-Core with an approximated proximal policy (A-3PO).

`algorithm/` is what to read first; `config/` has every knob; `trainer/` is the loop.
"""
