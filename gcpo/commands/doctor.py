"""`gcpo doctor`: prints what is installed, what it runs on, and whether the kernels are right here."""

import argparse
import platform

import gcpo_kernels
from gcpo.run.machine import cases, check, default_device, describe, installed

PACKAGES = ("gcpo", "torch", "triton", "transformers", "trl", "accelerate", "peft", "vllm", "deepspeed")
TRL_SERIES = "1.16."


def run(flags: list[str]) -> int:
    """Print the report; 1 if any function is wrong on this machine, else 0."""
    description = "print versions and the device, and check the kernels on this machine"
    argparse.ArgumentParser(prog="gcpo doctor", description=description).parse_args(flags)
    print(f"{'python':<14}{platform.python_version()} on {platform.system()} {platform.machine()}")
    for package in PACKAGES:
        print(f"{package:<14}{installed(package) or 'not installed'}")
    trl = installed("trl")
    if trl is None:
        print("warning: `gcpo train`, `eval` and `demo` need trl: pip install 'gcpo[train]'")
    elif not trl.startswith(TRL_SERIES):
        print(f"warning: trl {trl} is not {TRL_SERIES}x, which the trainer is written for: pip install 'trl~=1.16.0'")
    device = default_device()
    print(f"{'device':<14}{describe(device)}")
    print(f"{'backend':<14}{gcpo_kernels.available_backends(device)[0]}")
    print("\nlargest error against the float64 reference, relative to the largest value (float32 inputs)")
    print(f"{'function':<28}{'value':>10}{'gradient':>10}")
    outcomes = [check(case, device) for case in cases()]
    for outcome in outcomes:
        verdict = f"FAIL  {outcome.problem}" if outcome.problem else "ok"
        print(f"{outcome.name:<28}{outcome.value:>10.1e}{outcome.gradient:>10.1e}  {verdict}")
    wrong = [outcome.name for outcome in outcomes if outcome.problem]
    print(f"{len(wrong)} of {len(outcomes)} functions are wrong here: {', '.join(wrong)}" if wrong else "all ok")
    return 1 if wrong else 0
