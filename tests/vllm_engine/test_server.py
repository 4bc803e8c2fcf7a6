"""Training against a vLLM server, as far as a machine without a GPU goes: all but the transfer of weights, by NCCL."""

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_policy import SHORT_TEMPLATES, count_low, options, prompts
from transformers import AutoModelForCausalLM

pytest.importorskip("vllm", reason="vLLM is not installed: `make test-vllm` builds an environment that has it")


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def server_options(tmp_path: Path, port: int, **overrides: Any) -> dict[str, Any]:
    settings = {
        "use_vllm": True,
        "vllm_mode": "server",
        "vllm_server_base_url": f"http://127.0.0.1:{port}",
        "num_colliders": 3,
        "collider_max_completion_length": 6,
        **SHORT_TEMPLATES,
    }
    return options(tmp_path, **settings, **overrides)


@pytest.fixture(scope="module")
def server(policy: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The port of a server of the policy."""
    port, log = free_port(), tmp_path_factory.mktemp("server") / "log"
    # What `vllm serve` runs; that command itself asks for a distribution called vllm, and the CPU's has another name.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", policy, "--port", str(port)]
    command += ["--host", "127.0.0.1", "--max-model-len", "512", "--enforce-eager", "--gpu-memory-utilization", "0.05"]
    command += ["--logprobs-mode", "processed_logprobs", "--max-logprobs", "-1"]
    environment = {**os.environ, "VLLM_SERVER_DEV_MODE": "1"}
    del environment["VLLM_ENABLE_V1_MULTIPROCESSING"]
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
    try:
        for _ in range(300):
            if process.poll() is not None:
                pytest.fail(f"the server stopped:\n{log.read_text()[-3000:]}")
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1)
                break
            except OSError:
                time.sleep(1)
        else:
            pytest.fail(f"the server did not start:\n{log.read_text()[-3000:]}")
        yield port
    finally:
        process.terminate()
        process.wait(timeout=60)


@pytest.mark.parametrize("adapter", [False, True], ids=["whole", "adapter"])
def test_two_steps_with_rollouts_from_a_server(
    adapter: bool, policy: str, server: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft import LoraConfig
    from trl.generation.vllm_client import VLLMClient

    from gcpo import GCPOConfig, GCPOTrainer

    asked, sent = [], []
    generate = VLLMClient.generate

    def watched(self: Any, prompts: Any, **kwargs: Any) -> Any:
        asked.append((len(prompts), kwargs["n"], kwargs["max_tokens"]))
        return generate(self, prompts=prompts, **kwargs)

    # The two calls that need NCCL; what would have been sent before each rollout is kept.
    def keep(self: Any, metadata: Any, weights: Any) -> None:
        sent.append({name: weight.clone() for name, weight in weights})
        assert [name for name, _, _ in metadata] == list(sent[-1])

    monkeypatch.setattr(VLLMClient, "init_communicator", lambda self, device=None: None)
    monkeypatch.setattr(VLLMClient, "update_named_params", keep)
    monkeypatch.setattr(VLLMClient, "generate", watched)
    trainer = GCPOTrainer(
        model=policy,
        reward_funcs=count_low,
        args=GCPOConfig(**server_options(tmp_path, server, kappa=0.5, learning_rate=0.3 if adapter else 1e-2)),
        train_dataset=prompts(),
        peft_config=LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM") if adapter else None,
    )
    names = set(AutoModelForCausalLM.from_pretrained(policy).state_dict()) - {"lm_head.weight"}  # which is tied
    trainer.train()
    # 2 prompts, 4 candidates each; then 6 fusion prompts, one collider each.
    assert asked == [(2, 4, 10), (6, 1, 6)] * 2
    # The whole model under the names of the whole model, an adapter merged into it; and not the same twice.
    assert [set(weights) for weights in sent] == [names, names]
    changed = {name for name in names if not torch.equal(sent[0][name], sent[1][name])}
    assert changed == ({name for name in names if "q_proj" in name} if adapter else names)
    first, second = trainer.state.log_history[:2]
    for entry in (first, second):
        assert entry["gcpo/kl_causal"] > 0 and entry["gcpo/upsilon/fallback"] == 0
    # The server samples from the first policy all along. The correction sees it as soon as the policy has moved.
    assert first["sampling/sampling_logp_difference/max"] < 0.05
    assert second["sampling/sampling_logp_difference/max"] > 4 * first["sampling/sampling_logp_difference/max"]
    assert second["sampling/importance_sampling_ratio/min"] < first["sampling/importance_sampling_ratio/min"]


def test_without_a_gpu_the_transfer_of_weights_says_what_it_needs(policy: str, server: int, tmp_path: Path) -> None:
    from gcpo import GCPOConfig, GCPOTrainer

    arguments = GCPOConfig(**server_options(tmp_path, server))
    with pytest.raises((RuntimeError, NotImplementedError), match="weight-transfer"):
        GCPOTrainer(model=policy, reward_funcs=count_low, args=arguments, train_dataset=prompts())


def test_no_server_is_named_with_the_command_that_starts_one(policy: str, tmp_path: Path) -> None:
    from gcpo import GCPOConfig, GCPOTrainer

    port = free_port()
    arguments = GCPOConfig(**server_options(tmp_path, port, vllm_server_timeout=0.0))
    with pytest.raises(ConnectionError) as raised:
        GCPOTrainer(model=policy, reward_funcs=count_low, args=arguments, train_dataset=prompts())
    message = str(raised.value)
    assert f"http://127.0.0.1:{port}" in message and "`vllm_server_timeout`" in message
    for part in ("VLLM_SERVER_DEV_MODE=1 vllm serve", policy, f"--port {port}", "--weight-transfer-config"):
        assert part in message
