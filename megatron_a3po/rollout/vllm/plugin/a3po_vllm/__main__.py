"""`python -m a3po_vllm ARGUMENTS`: vLLM's API server, which ends with the process that launched it."""

import runpy

from a3po_vllm.lifetime import end_with_launcher

end_with_launcher()
if __name__ == "__main__":
    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__", alter_sys=True)
