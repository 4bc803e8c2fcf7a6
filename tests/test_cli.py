"""The command line: what it refuses and how it says so, and training and evaluation end to end."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import trl
import yaml

from gcpo import cli
from gcpo.cli import main
from gcpo.commands import flags
from gcpo.commands import train as training
from gcpo.run import inputs

TASK = "reasoning_gym:chain_sum"


def run(*argv: str) -> int:
    """The exit code of a command, however it leaves."""
    try:
        return main([str(arg) for arg in argv])
    except SystemExit as error:
        return int(error.code or 0)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A random Llama of one layer, with a chat template and without."""
    from gcpo.demo.tiny import save_tiny, tiny_model, tiny_tokenizer

    folder = tmp_path_factory.mktemp("models")
    tokenizer = tiny_tokenizer(["a"])
    model = tiny_model(tokenizer, hidden_size=16, num_layers=1)
    save_tiny(model, tokenizer, folder / "chat")
    tokenizer.chat_template = None
    save_tiny(model, tokenizer, folder / "plain")
    return {"plain": folder / "plain", "chat": folder / "chat"}


@pytest.fixture
def config(tmp_path: Path, models: dict[str, Path]) -> Path:
    """A YAML file for two steps; one value is text that only the parser turns into a number."""
    settings = {
        "model_name_or_path": str(models["chat"]),
        "dataset_name": TASK,
        "task_size": 8,
        "task_config": '{"max_terms": 2, "max_digits": 1}',
        "reward_funcs": "reasoning_gym",
        "output_dir": str(tmp_path / "out"),
        "num_generations": 2,
        "num_colliders": 2,
        "collider_max_completion_length": 4,
        "max_completion_length": 4,
        "per_device_train_batch_size": 2,
        "learning_rate": "1e-3",
        "max_steps": 2,
        "save_steps": 1,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "disable_tqdm": True,
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def test_help_lists_every_command_without_heavy_imports() -> None:
    code = (
        "import sys; from gcpo.cli import main; main(['--help']); print('torch' in sys.modules, 'trl' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert all(f"\n  {name} " in out for name in cli.COMMANDS)
    assert out.splitlines()[-1] == "False False"


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_of_a_command(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(command, "--help") == 0
    assert f"gcpo {command}" in capsys.readouterr().out


def test_train_help_has_the_options_of_trl_and_of_gcpo(capsys: pytest.CaptureFixture[str]) -> None:
    run("train", "--help")
    text = capsys.readouterr().out
    for flag in ("--kappa", "--estimator", "--num_generations", "--use_peft", "--dataset_name", "--task_config"):
        assert flag in text
    assert "--accelerate_config FILE" in text and "any flag of `accelerate launch`" in " ".join(text.split())


@pytest.mark.parametrize(
    ("argv", "wanted"),
    [
        (["trian"], "unknown command 'trian' (did you mean train?)"),
        (["train", "--kappa", "high"], "--kappa: invalid float value: 'high'"),
        (["train", "--kappa", "-1"], "`kappa` must be"),
        (["train", "--estimator", "magic"], "`estimator` must be one of"),
        (["train", "--kapa", "1"], "unknown flag --kapa (did you mean --kappa?)"),
        (["train", "stray"], "unexpected argument 'stray'"),
        (["train", "--config"], "`--config` must be a YAML file"),
        (["train", "--config=nowhere.yaml"], "`--config` must be a YAML file, got 'nowhere.yaml'"),
        (["plan", "--config"], "`--config` must be a YAML file, got 'nothing'"),
        (["plan", "--output", "."], "`--output` must be a file, got the folder '.'"),
        (["train", "--loss_type", "ppo"], "`loss_type` must be one of 'grpo', 'bnpo'"),
        (["train", "--max_steps", "1"], "`--model_name_or_path` is missing"),
        (
            ["train", "--model_name_or_path", "./nowhere"],
            "`--model_name_or_path` must be a name on the hub or a folder",
        ),
        (["eval", "--dataset_name", TASK], "--model_name_or_path"),
        (["eval", "--dataset_name", TASK, "--model_name_or_path", "m", "--batch_size", "two"], "--batch_size"),
        (["doctor", "--fast"], "--fast"),
        (["train", "--torch_dtype", "float32"], "unknown flag --torch_dtype: it is called --dtype now"),
        (
            ["train", "--max-prompt-length", "9"],
            "unknown flag --max-prompt-length, which there is no more: prompts",
        ),
        (["train", "--config", "a.yaml", "--config=b.yaml"], "`--config` must be given once"),
        (["train", "--num_iterations", "2.0"], "--num_iterations/--num-iterations: invalid int value: '2.0'"),
        (["train", "--candidate_context_tokens", "few"], "invalid int value: 'few'"),
        (["train", "--temperature", "0"], "`temperature` must be finite and above 0, got 0.0"),
        (["train", "--min_p", "2"], "`min_p` must be finite and at least 0 and at most 1, got 2.0"),
        (["train", "--logging_steps", "0"], "requires non-zero --logging_steps"),
        (
            ["train", "--generation_batch_size", "16", "--num_generations", "6", "--num_processes", "2"],
            "`num_generations` must divide `generation_batch_size` = 16, got 6",
        ),
        (["train", "--report_to", "wandb"], "`--report_to wandb`: WandbCallback requires wandb to be installed"),
        (["train", "--report_to", "flyte"], "`--report_to flyte`: FlyteCallback requires flytekit to be installed"),
        (["train", "--report_to", "wandbb"], "`--report_to` must be none, all, or some of azure_ml"),
    ],
)
def test_wrong_arguments_name_what_is_wrong(argv: list[str], wanted: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*argv) == 2
    error = capsys.readouterr().err
    assert wanted in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        (["--dataset_name", "reasoning_gym:chain_sun"], "Did you mean 'chain_sum'"),
        (["--task_config", "[1]"], "`--task_config` must be a JSON object"),
        (["--task_config", '{"terms": 1}'], "has no option terms"),
        (["--task_config", '{"seed": 1}'], "use `--task_seed`"),
        (["--reward_funcs", "accuracy"], "`--reward_funcs` must be one of accuracy_reward"),
        (["--reward_funcs", "no_such_module.reward"], "cannot import 'no_such_module.reward'"),
        (["--reward_funcs", "gcpo.evaluation.tasks.nothing"], "cannot import 'gcpo.evaluation.tasks.nothing'"),
        (["--reward_funcs", "gcpo.evaluation.tasks.SYSTEM_PROMPT"], "must be a function, got str"),
        (["--reward_funcs", "./rewards.py:letters"], "must be a dotted path such as rewards.letters"),
        (["--reward_funcs", "rewards.py"], "must be a dotted path such as rewards.letters, not a file"),
        (["--reward_funcs", "gcpo.cli.usage"], "gcpo.cli.usage must take **kwargs, it is passed"),
        (["--reward_timeout", "0"], "`--reward_timeout` must be finite and above 0, got 0.0"),
        (["--dataset_name", "./nowhere.jsonl"], "there is no file or folder './nowhere.jsonl'"),
        (["--dataset_name", "nowhere.jsonl"], "there is no file or folder 'nowhere.jsonl'"),
        (["--per_device_train_batch_size", "18"], "The dataset has 8 prompts, one rollout takes 9: lower"),
        (["--gradient_accumulation_steps", "9", "--max_steps", "-1"], "has 8 prompts, one rollout takes 9: lower"),
        (["--per_device_train_batch_size", "3"], "`num_generations` must divide the rows of a rollout"),
        (
            ["--eval_strategy", "epoch", "--per_device_eval_batch_size", "3"],
            "`per_device_eval_batch_size` x processes = 3 x 1 must be divisible by",
        ),
        (["--reward_funcs", "accuracy_reward"], "accuracy_reward needs the dataset's column solution"),
        (["--resume_from_checkpoint", "last"], "no checkpoint in"),
        (["--resume_from_checkpoint", "./nowhere"], "`--resume_from_checkpoint` must be a checkpoint folder"),
    ],
)
def test_wrong_dataset_reward_or_checkpoint(
    flags: list[str], wanted: str, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("train", "--config", config, *flags) == 2
    assert wanted in capsys.readouterr().err


def test_flags_that_take_json(capsys: pytest.CaptureFixture[str]) -> None:
    """All of them; the text itself is not shown, as it may hold a token."""
    parser = training.make_parser()
    names = [name for name, hint in get_type_hints(trl.GRPOConfig).items() if "dict" in str(hint)]
    assert {"generation_kwargs", "model_init_kwargs", "liger_kernel_config", "deepspeed"} <= set(names)
    for name in names:
        for text, wanted in (("{top_k: s3cret}", "got what is no JSON (Expecting"), ("[1]", "")):
            with pytest.raises(SystemExit):
                parser.parse_known_args([f"--{name}", text])
            error = capsys.readouterr().err
            assert f"argument --{name}" in error and "must be a JSON object" in error and wanted in error
            assert "s3cret" not in error
        for text, value in ((' {"a": "1"}', {"a": "1"}), ("none", None)):
            found = getattr(parser.parse_known_args([f"--{name}={text}"])[0], name)
            assert (json.loads(found) if isinstance(found, str) else found) == value


def test_what_was_renamed_or_dropped_is_no_flag_now() -> None:
    known = set(training.make_parser()._option_string_actions)
    assert {f"--{name}" for name in flags.RENAMED.values()} <= known
    assert not {f"--{name}" for name in (*flags.RENAMED, *flags.GONE)} & known


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("task_config: {a: 1}", "`task_config` must be text"),
        ("model_name_or_path: {a: 1}", "`model_name_or_path` must be text"),
        ("kapa: 1", "`--config`: unknown key kapa (did you mean kappa?)"),
        ("torch_dtype: float32", "`--config`: unknown key torch_dtype: it is called dtype now"),
        ("no_share_prefix: true", "`--config`: unknown key no_share_prefix: write share_prefix: false"),
        ("learning-rate: 1\nlearning_rate: 2", "`learning_rate` must be given once, got it as `learning_rate` too"),
        ("num_iterations: 2.0", "`num_iterations` must be an integer, got 2.0"),
        ("num_iterations: '2.0'", "invalid int value: '2.0'"),
        ("max-steps: true", "`max_steps` must be an integer, got True"),
        ("kappa: [1]", "`kappa` must be a number, got [1]"),
        ("use_cpu: 3", "`use_cpu` must be true or false, got 3"),
        ("generation_kwargs: [1]", "`generation_kwargs` must be a mapping, got [1]"),
        ("dtype: fp16", "`dtype` must be one of auto, bfloat16, float16, float32, got 'fp16'"),
    ],
)
def test_wrong_keys_and_values_of_a_yaml_file(
    text: str, wanted: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text + "\n")
    assert run("train", "--config", path) == 2
    assert wanted in capsys.readouterr().err


def test_a_yaml_file_is_read_as_flags_are(tmp_path: Path) -> None:
    """Either spelling of a name; what YAML makes of `no` and of a single entry; a dict as one or as JSON."""
    path = tmp_path / "config.yaml"
    path.write_text(
        "learning-rate: 1e-3\nsave_strategy: no\nreward-funcs: think_format_reward\nreward_weights: 2\nuse_cpu: 1\n"
        "bf16: false\ngeneration_kwargs: {top_k: 3}\nlr_scheduler_kwargs: '{\"num_cycles\": 2}'\nmax_steps: 3\n"
        f"output_dir: {tmp_path}\n"
    )
    script_args, config, *_ = training.parse(["--config", str(path), "--max_steps", "4"])
    assert script_args.reward_funcs == ["think_format_reward"]
    found = {"learning_rate": 1e-3, "reward_weights": [2], "use_cpu": True, "generation_kwargs": {"top_k": 3}}
    found |= {"lr_scheduler_kwargs": {"num_cycles": 2}, "max_steps": 4, "save_strategy": "no"}
    assert {name: getattr(config, name) for name in found} == found


def test_a_yaml_file_that_is_none_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("kappa: 1\n  alpha: 1\n")
    for command in ("train", "plan"):
        assert run(command, "--config", path) == 2
        assert f'`--config` must be a YAML file: mapping values are not allowed here in "{path}", line 2' in (
            capsys.readouterr().err
        )


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GCPO_DEBUG", "1")
    with pytest.raises(inputs.ArgumentsError):
        run("train", "--model_name_or_path", "./nowhere")


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ('{"prompt": "a"}\n{"prompt": \n', "rows.jsonl' (JSON parse error"),
        ("", "rows.jsonl' (it holds no rows)"),
        ('{"question": "1 + 1", "answer": "2"}\n' * 8, "must have a column `prompt`, got question, answer"),
        ('{"problem": "1 + 1", "answer": 2}\n{"problem": "1", "answer": null}\n', "row 2: `answer` must be text or"),
        ('{"problem": "1 + 1", "answer": 2}\n{"answer": 3}\n', "row 2: `problem` must be text or a number, got None"),
    ],
)
def test_a_file_that_cannot_be_trained_on(
    text: str, wanted: str, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rows.jsonl").write_text(text)
    assert run("train", "--config", config, "--dataset_name", tmp_path / "rows.jsonl") == 2
    assert wanted in capsys.readouterr().err


@pytest.mark.parametrize("flags", [[], ["--dataset_streaming"]], ids=["whole", "stream"])
def test_rows_of_problem_and_answer_are_trained_on_as_they_are_evaluated(
    flags: list[str], config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gcpo.trainer
    from gcpo.evaluation.benchmarks import MATH_PROMPT, math_reward

    seen: dict[str, Any] = {}

    def trainer(**kwargs: Any) -> None:
        seen.update(kwargs)
        raise ValueError("seen")

    monkeypatch.setattr(gcpo.trainer, "GCPOTrainer", trainer)
    monkeypatch.setattr(training, "checked", lambda reward: reward)
    rows, given = tmp_path / "rows.jsonl", tmp_path / "given.jsonl"
    rows.write_text('{"problem": "1 + 1", "answer": 2, "level": 1}\n' * 8)
    given.write_text('{"prompt": "1 + 1", "answer": 2}\n' * 8)
    settings = yaml.safe_load(config.read_text())
    del settings["reward_funcs"]
    config.write_text(yaml.safe_dump(settings))
    evaluate = [*flags, "--eval_strategy", "steps", "--eval_steps", "1", "--dataset_test_split", "train"]
    assert run("train", "--config", config, "--dataset_name", rows, *evaluate) == 2
    assert seen["reward_funcs"] == [math_reward]
    for part in ("train_dataset", "eval_dataset"):
        row = next(iter(seen[part]))
        assert row["prompt"] == [{"role": "user", "content": f"1 + 1\n\n{MATH_PROMPT}"}]
        assert (row["answer"], row["level"]) == ("2", 1)
    assert run("train", "--config", config, "--dataset_name", rows, *flags, "--no_task_conversational") == 2
    assert next(iter(seen["train_dataset"]))["prompt"] == f"1 + 1\n\n{MATH_PROMPT}"
    # A prompt of one's own is kept, and judged the same way, unless by a model.
    assert run("train", "--config", config, "--dataset_name", given, *flags) == 2
    assert (seen["reward_funcs"], next(iter(seen["train_dataset"]))["prompt"]) == ([math_reward], "1 + 1")
    assert (
        run("train", "--config", config, "--dataset_name", given, *flags, "--reward_model_name_or_path", "judge") == 2
    )
    assert seen["reward_funcs"] == ["judge"]


def test_nothing_is_saved_where_no_step_was_made(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A stream smaller than one rollout, whose length is not known before."""
    (tmp_path / "rows.jsonl").write_text('{"prompt": "1 + 1"}\n')
    flags = ["--dataset_name", tmp_path / "rows.jsonl", "--dataset_streaming", "--per_device_train_batch_size", "4"]
    flags += ["--reward_funcs", "think_format_reward"]
    assert run("train", "--config", config, *flags) == 2
    assert "No step was made, and nothing is saved: one rollout takes 2 prompts" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("*.safetensors"))


@pytest.mark.parametrize(
    ("flag", "package"),
    [
        ("use_vllm", "vLLM"),
        ("load_in_4bit", "bitsandbytes"),
        ("use_peft", "peft"),
        ("use_liger_kernel", "liger-kernel"),
    ],
)
def test_a_flag_whose_package_is_missing(
    flag: str, package: str, config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(flags, "find_spec", lambda name: None)
    assert run("train", "--config", config, f"--{flag}") == 2
    assert f"`--{flag}` needs {package}, which is not installed: `pip install " in capsys.readouterr().err


def test_packages_that_others_miss_are_errors_of_one_line() -> None:
    with pytest.raises(inputs.ArgumentsError, match=r"^this needs that$"), inputs.argument_errors():
        raise ImportError("this needs that")
    with pytest.raises(ImportError, match="ours"), inputs.argument_errors():
        raise ImportError("ours", name="gcpo.trainer")


def test_a_wrong_reward_stops_training_with_one_line(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "wrong_for_cli.py").write_text("def nothing(completions, **kwargs):\n    pass\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert run("train", "--config", config, "--reward_funcs", "wrong_for_cli.nothing") == 2
    assert "'nothing' must return a list" in capsys.readouterr().err


def test_none_can_be_written_for_an_optional_integer(tmp_path: Path) -> None:
    flags = ["--candidate_context_tokens", "none", "--output_dir", str(tmp_path), "--bf16", "false"]
    config = training.parse(flags)[1]
    assert config.candidate_context_tokens is None
    assert training.parse([*flags[2:], "--candidate_context_tokens", "7"])[1].candidate_context_tokens == 7


@pytest.mark.parametrize(
    "flags",
    [
        [],
        # Whole groups on two processes, which one does not make.
        ["--per_device_train_batch_size", "1"],
        ["--eval_strategy", "epoch", "--per_device_eval_batch_size", "1"],
    ],
)
def test_flags_of_accelerate_launch_are_passed_on(
    flags: list[str], monkeypatch: pytest.MonkeyPatch, config: Path
) -> None:
    import accelerate.commands.launch as accelerate_launch

    seen = []
    monkeypatch.setattr(accelerate_launch, "launch_command", seen.append)
    assert run("train", "--config", config, *flags, "--accelerate_config", "zero2", "--num_processes", "2") == 0
    (args,) = seen
    assert args.config_file.endswith("zero2.yaml")
    assert args.num_processes == 2
    assert args.module
    assert args.training_script == "gcpo.cli"
    assert args.training_script_args[:2] == ["train", "--config"]


@pytest.mark.parametrize(("ended", "wanted"), [(2, 2), (-9, 137)])
def test_the_exit_code_of_a_process_that_failed(
    ended: int, wanted: int, monkeypatch: pytest.MonkeyPatch, config: Path
) -> None:
    import accelerate.commands.launch as accelerate_launch
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

    def fails(args: Any) -> None:
        raise ChildFailedError("gcpo.cli", {1: ProcessFailure(1, 0, ended, "")})

    monkeypatch.setattr(accelerate_launch, "launch_command", fails)
    assert run("train", "--config", config, "--num_processes", "2") == wanted


def test_a_model_without_a_chat_template_is_refused_for_messages(
    config: Path, models: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("train", "--config", config, "--model_name_or_path", models["plain"]) == 2
    assert "has no chat template" in capsys.readouterr().err


def test_train_resume_and_eval(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = ["--log_completions", "--num_completions_to_print", "0"]
    assert run("train", "--config", config, *shown) == 0
    out = capsys.readouterr().out
    first = next(line for line in out.splitlines() if line.startswith("gcpo train: model="))
    for part in ("task=reasoning_gym:chain_sum", "n=2", "L=2", "estimator=loo", "kappa=0.06", "steps=2"):
        assert part in first
    folder = tmp_path / "out"
    kept = {path: path.read_bytes() for path in (folder / "model.safetensors", folder / "gcpo_run.json")}
    kept |= {path: path.read_bytes() for path in (folder / "completions").iterdir()}
    assert len(kept) == 3

    # Another run does not take the folder of this one, and what is finished stays as it is.
    assert run("train", "--config", config) == 2
    assert "holds checkpoint-2 of an earlier run: `--resume` goes on with it" in capsys.readouterr().err
    for _ in range(2):
        assert run("train", "--config", config, *shown, "--resume", "--learning_rate", "1") == 0
        assert f"already finished: {folder / 'checkpoint-2'} is of step 2, of 2" in capsys.readouterr().out
        assert not (folder / "checkpoint-3").exists()
        assert all(path.read_bytes() == content for path, content in kept.items())

    # Two prompts per epoch and one epoch more; the number of steps is worked out, not given.
    more = [
        "--max_steps",
        "-1",
        "--num_train_epochs",
        "0.5",
        "--num_iterations",
        "2",
        "--gradient_accumulation_steps",
        2,
    ]
    more += ["--save_total_limit", "1"]  # what it went on from is gone at the end
    assert run("train", "--config", config, *more, "--resume_from_checkpoint", "last") == 0
    assert not (folder / "checkpoint-2").exists()
    state = json.loads((max(folder.glob("checkpoint-*"), key=_step) / "trainer_state.json").read_text())
    assert f"steps={state['max_steps']} " in capsys.readouterr().out
    assert state["global_step"] == state["max_steps"] > 2

    result = tmp_path / "result.json"
    flags = ["--dataset_name", TASK, "--task_size", "3", "--max_new_tokens", "4", "--num_samples", "2"]
    assert run("eval", "--model_name_or_path", folder, *flags, "--output", result) == 0
    written = json.loads(result.read_text())
    assert written["result"]["num_prompts"] == 3
    assert written["settings"]["dataset_name"] == TASK
    assert f"pass@1             {written['result']['pass_at_1']:.4f} ±" in capsys.readouterr().out


def test_evaluation_while_training_a_base_model_with_an_adapter(
    config: Path, models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--no_task_conversational", "--use_peft", "--eval_strategy", "steps", "--eval_steps", "2"]
    flags += ["--task_eval_size", "2", "--per_device_eval_batch_size", "2", "--disable_tqdm", "false"]
    assert run("train", "--config", config, "--model_name_or_path", models["plain"], *flags) == 0
    shown = capsys.readouterr()
    assert "eval_reward" in shown.out
    for name in ("training", "evaluation"):  # where there is no terminal: lines of their own, no bar
        assert re.search(rf"^{name}: 2 of 2 steps, \d+ s$", shown.err, re.MULTILINE)
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


def test_ctrl_c_names_the_last_checkpoint(
    config: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import TrainerCallback

    import gcpo.trainer

    class Interrupt(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 1:
                raise KeyboardInterrupt

    original = gcpo.trainer.GCPOTrainer
    monkeypatch.setattr(gcpo.trainer, "GCPOTrainer", lambda **kwargs: original(callbacks=[Interrupt()], **kwargs))
    assert run("train", "--config", config) == 130
    error = capsys.readouterr().err
    assert f"interrupted at step 1; continue with --resume_from_checkpoint {tmp_path / 'out' / 'checkpoint-1'}" in error


def _step(folder: Path) -> int:
    return int(folder.name.rsplit("-", 1)[1])
