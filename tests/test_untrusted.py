"""Prompts, completions, data sets and checkpoints are data: none of them can become structure, or code."""

import ast
import copy
import json
import os
import pickle
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_trainer_causal import make_trainer
from tiny_policy import SHORT_TEMPLATES, TEMPLATE, make_tokenizer, options, save_policy

from gcpo import GCPOConfig
from gcpo.causal.contexts import PromptBuilder
from gcpo.commands.train import parse
from gcpo.evaluation.rewards import load_reward, load_rewards
from gcpo.evaluation.sources import load_named
from gcpo.run import processes, records
from gcpo.run.redaction import redacted

ROOT = Path(__file__).resolve().parents[1]
TOKENIZER = make_tokenizer()
SPECIAL = set(TOKENIZER.all_special_ids) - {TOKENIZER.unk_token_id}
MARKERS = ["<eos>", "<|user|>", "<|assistant|>", "<pad>", "{question}", "{candidates}", "{collider}", "{0}", "\ue000"]
MARKERS += ["\ue000candidates\ue001", "{% for m in messages %}", "{{ 7 * 7 }}", "\n\n2:", "|?"]
texts = st.lists(st.sampled_from(MARKERS) | st.text("ab{}<|>", max_size=4), max_size=6).map("".join)
ids = st.lists(st.integers(0, len(TOKENIZER) - 1), max_size=8)


def structure(built: list[int]) -> list[int]:
    """What opens and closes turns."""
    return [token for token in built if token in SPECIAL]


@settings(deadline=None, max_examples=150, derandomize=True, database=None)
@given(
    texts, st.lists(ids | texts.map(lambda x: TOKENIZER(x)["input_ids"]), min_size=1, max_size=3), ids, st.booleans()
)
def test_nothing_in_data_changes_the_structure_of_a_prompt(question, candidates, collider, conversational):
    """Markers of the chat template, as text or as the tokens themselves, placeholders and template code, anywhere."""
    builder = PromptBuilder(TOKENIZER, GCPOConfig(**options(Path("unused")), **SHORT_TEMPLATES), TEMPLATE)

    def prompt(text):
        return [{"role": "user", "content": text}] if conversational else text

    harmless = [[20]] * len(candidates)
    fusion, context = (
        builder.fusion(prompt(question), candidates),
        builder.context(prompt(question), candidates, collider),
    )
    assert structure(fusion) == structure(builder.fusion(prompt("q"), harmless))
    assert structure(context) == structure(builder.context(prompt("q"), harmless, [20]))
    # Each candidate is there, whole and once, between what the template puts around it.
    shown = [token for candidate in candidates for token in builder.content(candidate)]
    kept = [token for token in fusion if token not in SPECIAL]
    fixed = [token for token in builder.fusion(prompt(question), [[]] * len(candidates)) if token not in SPECIAL]
    assert len(kept) == len(fixed) + len(shown)


def test_a_reward_is_imported_when_its_path_is_asked_for(tmp_path, monkeypatch):
    """Reading the command line imports nothing that it names; loading the named function imports that one module."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("asked_reward", "other_reward", "prompts", "evil"):
        text = f"import pathlib\npathlib.Path('{name}.ran').touch()\ndef score(completions, **kwargs):\n    return []\n"
        (tmp_path / f"{name}.py").write_text(text)
    parse(["--model_name_or_path", "m", "--dataset_name", "evil", "--reward_funcs", "asked_reward.score", "--use_cpu"])
    load_rewards(["accuracy_reward"], "evil", ["prompt", "solution"])
    assert not list(tmp_path.glob("*.ran"))
    load_reward("asked_reward.score")
    assert [path.name for path in tmp_path.glob("*.ran")] == ["asked_reward.ran"]


@pytest.mark.parametrize("as_file", [False, True])
def test_a_data_set_is_not_run(as_file, tmp_path, monkeypatch):
    """A folder or file of Python named as the data set is refused, not imported (loading scripts are no more)."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "data"
    folder.mkdir()
    for path in (folder / "data.py", tmp_path / "data.py"):
        path.write_text(f"import pathlib\npathlib.Path({str(tmp_path / 'ran')!r}).touch()\n")
    with pytest.raises((ValueError, RuntimeError, OSError)):
        load_named(str(tmp_path / "data.py") if as_file else str(folder))
    assert not (tmp_path / "ran").exists()


class Payload:
    """Unpickling it makes a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_the_payload_works(tmp_path):
    pickle.loads(pickle.dumps(Payload(tmp_path / "ran")))
    assert (tmp_path / "ran").is_dir()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    policy = save_policy(folder / "policy")
    make_trainer(policy, folder, save_strategy="steps", save_steps=1, max_steps=1).train()
    return policy, folder / "out" / "checkpoint-1"


def test_a_checkpoint_runs_no_code(checkpoint, tmp_path):
    """Each file of it replaced by a pickle that would run something: resuming refuses, or does not read it."""
    policy, clean = checkpoint
    names = [path.name for path in clean.iterdir() if path.suffix in (".pt", ".pth", ".bin")]
    assert {"optimizer.pt", "rng_state.pth", "scheduler.pt"} <= set(names)
    for name in names:
        whole = (clean / name).read_bytes()
        torch.save({"state": Payload(tmp_path / "ran")}, clean / name)
        try:
            trainer = make_trainer(policy, tmp_path / name, save_strategy="no", max_steps=2)
            trainer.train(resume_from_checkpoint=str(clean))
        except (pickle.UnpicklingError, ValueError, RuntimeError):
            pass
        else:
            assert name == "training_args.bin", f"{name} was not read: what would it take to notice?"
        finally:
            (clean / name).write_bytes(whole)
        assert not (tmp_path / "ran").exists(), name


def test_weights_as_pickles_are_not_run(tmp_path):
    policy = Path(save_policy(tmp_path / "policy"))
    (policy / "model.safetensors").unlink()
    torch.save({"x": Payload(tmp_path / "ran")}, policy / "pytorch_model.bin")
    with pytest.raises((pickle.UnpicklingError, ValueError, RuntimeError, OSError)):
        make_trainer(str(policy), tmp_path)
    assert not (tmp_path / "ran").exists()


def unsafe_calls(source: str) -> list[str]:
    """Calls that turn bytes or text into code, in a source."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            found += [name for name in names if name.split(".")[0] in ("pickle", "dill", "joblib", "shelve", "marshal")]
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
            if name == "torch.load" and keywords.get("weights_only") != "True":
                found.append(name)
            if name in ("eval", "exec", "os.system", "yaml.load") or keywords.get("shell") == "True":
                found.append(name)
            if name.endswith("np.load") and keywords.get("allow_pickle") == "True":
                found.append(name)
    return found


def test_no_source_loads_pickles_or_runs_text():
    """Save for the sandbox, whose business is to run a model's programs, in a process that can do nothing else."""
    sources = [path for top in ("gcpo", "gcpo_kernels", "bench", "examples") for path in (ROOT / top).rglob("*.py")]
    found = {str(path.relative_to(ROOT)): calls for path in sources if (calls := unsafe_calls(path.read_text()))}
    assert found.pop("gcpo/evaluation/sandbox.py", ["exec"]) == ["exec"]
    assert not found
    planted = (
        "import pickle\ntorch.load(f)\ntorch.load(f, weights_only=False)\neval(x)\ntorch.load(f, weights_only=True)"
    )
    assert len(unsafe_calls(planted)) == 4


URL = "https://me:s3cret@host:8000/v1?api_key=s3cret"
SECRETS = {
    "hub_token": "s3cret",
    "model_init_kwargs": {"token": "s3cret", "use_auth_token": "s3cret", "proxies": {"https": URL}},
    "generation_kwargs": {"headers": {"Authorization": "Bearer s3cret", "x-api-key": "s3cret"}, "apiKeys": ["s3cret"]},
    "transformers_continuous_batching_config": '{"HF_TOKEN": "s3cret", "max_batch_tokens": 256}',
    "deepspeed": {"comet": {"api_key": "s3cret", "password": 53, "auth": {"user": "s3cret"}}},
    "vllm_server_base_url": URL,
    "trackio_space_id": "https://s3cret@host/space",
}


def test_a_run_writes_down_no_secret(tmp_path):
    """Under any option that can hold one, in `gcpo_run.json`."""
    records.start_record(tmp_path, "GCPOTrainer", copy.deepcopy(SECRETS), resumed=False)
    text = (tmp_path / records.CONFIG).read_text()
    assert "s3cret" not in text and "53" not in text
    written = json.loads(text)
    assert SECRETS.keys() <= written.keys()  # that there was one stays
    assert written["vllm_server_base_url"] == "https://<hidden>@host:8000/v1?<hidden>"
    assert json.loads(written["transformers_continuous_batching_config"])["max_batch_tokens"] == 256


def test_what_is_no_secret_is_written_as_it_is(tmp_path):
    """All defaults of all options, and what looks like a secret."""
    plain = GCPOConfig(**options(tmp_path)).to_dict() | {
        "generation_kwargs": {"eos_token_id": [2, 3], "max_new_tokens": 5, "stop_token": "</s>", "author": "me"},
        "model_init_kwargs": {"token": True, "revision": "main"},
        "fusion_prompt_template": "{question} token: see http://host/a?b=c, the key: 7 {candidates}",
        "chat_template_kwargs": '{"thinking":false}',
    }
    plain.pop("hub_token")
    assert redacted(plain) == plain


def test_processes_that_disagree_show_no_secret(tmp_path, monkeypatch):
    """Two processes with other tokens: the option is named."""
    configs = [GCPOConfig(**options(tmp_path), model_init_kwargs={"token": token}) for token in ("s3cret", "0ther")]
    shown = []
    monkeypatch.setattr(processes, "PartialState", lambda: SimpleNamespace(num_processes=2))
    monkeypatch.setattr(processes, "gather_object", lambda mine: shown.append(mine) or mine)
    processes.check_processes_agree(configs[1])
    monkeypatch.setattr(processes, "gather_object", lambda mine: shown[0] + mine)
    with pytest.raises(ValueError, match=re.escape("`model_init_kwargs`: {'token': '<hidden>'}, {'token'")) as error:
        processes.check_processes_agree(configs[0])
    assert "s3cret" not in str(error.value) and "0ther" not in str(error.value)
