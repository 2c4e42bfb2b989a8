"""vLLM servers: the wire, one server, a process that runs one, all of them together; and what they load as a plugin.

The engine made of these is `engines/vllm.py`. Read `wire.py` first.
"""
