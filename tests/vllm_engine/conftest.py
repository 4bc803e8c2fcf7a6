"""
Tests on a real vLLM engine: `make test-vllm` builds an environment for them, elsewhere they are skipped. The folder is
not called vllm, which TRL would then take for the package.
"""

import os

import pytest

# Read when the engine is built: gigabytes for its cache, and no second process.
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")


@pytest.fixture(scope="session")
def plain_linear() -> None:
    """
    On a CPU, vLLM repacks the weights of linear layers when it has loaded them, and TRL's sync, which loads into an
    engine that runs, finds them gone. With torch's own product in place of the packed one they stay where they are.
    """
    from vllm import _custom_ops

    _custom_ops._supports_onednn = False


@pytest.fixture(scope="session")
def policy(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random Llama of 0.5M parameters, with heads of 32: vLLM's CPU attention knows none smaller."""
    from gcpo.demo.tiny import save_tiny, tiny_model, tiny_tokenizer

    folder = tmp_path_factory.mktemp("policy")
    tokenizer = tiny_tokenizer(["a"])
    save_tiny(tiny_model(tokenizer, num_layers=2), tokenizer, folder)
    return str(folder)
