"""
GCPO in a training loop of one's own: plain PyTorch, a tiny model, and a reward for even tokens.

    python examples/custom_loop.py

Prompts and completions have fixed lengths here, so that nothing is padded; with padding, pass the mask that is 1 below.
"""

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from gcpo_kernels import causal_weights, group_advantages, linear_gcpo_loss, linear_logprob

P, N, L, T, VOCAB = 4, 6, 3, 8, 32  # prompts, candidates, colliders, tokens of an answer, vocabulary
FUSE, CONTEXT = 1, 2  # tokens that ask for an integrated answer, and for one more candidate


def generate(model: LlamaForCausalLM, prompt: Tensor) -> Tensor:
    options = {"do_sample": True, "top_k": 0, "max_new_tokens": T, "min_new_tokens": T, "pad_token_id": 0}
    return model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)[:, prompt.shape[1] :]


def read(model: LlamaForCausalLM, prompt: Tensor, answer: Tensor) -> tuple[Tensor, Tensor]:
    """What lm_head reads to predict each token of an answer, (B, T, H), and the state of its last token, (B, H)."""
    states = model.model(torch.cat([prompt, answer], dim=1)).last_hidden_state
    return states[:, -T - 1 : -1], states[:, -1]


def ask(prompt: Tensor, shown: Tensor, kind: int) -> Tensor:
    return torch.cat([prompt, shown.flatten(1), prompt.new_full((len(prompt), 1), kind)], dim=1)


def train_step(model: LlamaForCausalLM, optimizer: torch.optim.Optimizer, prompt: Tensor) -> tuple[float, dict]:
    head = model.lm_head.weight
    with torch.no_grad():
        queries = prompt.repeat_interleave(N, 0)
        y = generate(model, queries)  # (P * N, T), a prompt's candidates one after the other
        rewards = (y % 2 == 0).float().mean(1)
        groups = y.view(P, N, T)
        colliders = generate(model, ask(prompt, groups, FUSE).repeat_interleave(L, 0)).view(P, L, T)
        # The contexts x_{i,l}: the other candidates and one collider; what each says of y_i.
        others = torch.stack([torch.cat([groups[:, :i], groups[:, i + 1 :]], 1) for i in range(N)], 1).flatten(2)
        shown = torch.cat([others[:, :, None].expand(-1, -1, L, -1), colliders[:, None].expand(-1, N, -1, -1)], -1)
        contexts = ask(prompt.repeat_interleave(N * L, 0), shown.reshape(P * N * L, -1), CONTEXT)
        answers = y.repeat_interleave(L, 0)
        hidden, context_z = read(model, contexts, answers)
        context_logp = linear_logprob(hidden, head, answers).view(P * N, L, T).transpose(1, 2)
        hidden, z = read(model, queries, y)
        old_logp = linear_logprob(hidden, head, y)
        upsilon = causal_weights(z.view(P, N, -1), context_z.view(P, N, L, 1, -1))
        advantages = group_advantages(rewards, N) * upsilon.flatten()
    hidden, _ = read(model, queries, y)
    loss, metrics = linear_gcpo_loss(
        hidden, head, y, advantages, torch.ones_like(y), old_logp=old_logp, context_logp=context_logp, kappa=0.06
    )
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return rewards.mean().item(), metrics


def main(steps: int = 60, seed: int = 0) -> list[float]:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, bos_token_id=None, eos_token_id=None, **sizes))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    rewards = []
    for step in range(steps):
        reward, metrics = train_step(model, optimizer, torch.randint(3, VOCAB, (P, 4)))
        rewards.append(reward)
        if step % 10 == 0 or step == steps - 1:
            print(f"step {step}: reward {reward:.3f}, second KL {metrics['kl_causal'].item():.4f}")
    return rewards


if __name__ == "__main__":
    main()
