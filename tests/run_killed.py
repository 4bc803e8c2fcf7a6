"""
Runs `gcpo train` once for each named moment, and dies there by SIGKILL, as when a machine takes a job away. Started by
test_resume.py with the YAML file of a run and, as JSON, the moments with the folder that each writes to. Processes are
forked from one that has imported everything and computed nothing.
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from gcpo.cli import main
from gcpo.trainer import GCPOTrainer


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def cut(path: Path) -> None:
    """Leave the first half of a file, as a write that did not finish does."""
    os.truncate(path, path.stat().st_size // 2)


class Killed(GCPOTrainer):
    """Dies at `moment` of step 4, which is also the step of the second checkpoint."""

    moment = ""

    def at(self, moment: str) -> bool:
        return self.moment == moment and self.state.global_step == 4

    def _calculate_rewards(self, *args: Any) -> Any:
        if self.moment == "first rollout" or (self.moment == "rollout" and self.state.global_step == 3):
            die()
        return super()._calculate_rewards(*args)

    def save_model(self, output_dir: str | None = None, **kwargs: Any) -> None:
        super().save_model(output_dir, **kwargs)
        if self.at("weights"):
            cut(Path(str(output_dir)) / "model.safetensors")
            die()

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.at("optimizer"):
            cut(Path(output_dir) / "optimizer.pt")
            die()

    def _save_checkpoint(self, *args: Any) -> None:
        super()._save_checkpoint(*args)
        if self.at("state"):
            cut(Path(self.args.output_dir) / "checkpoint-4" / "trainer_state.json")
        if self.at("state") or self.at("saved"):
            die()


def run(config: str, folders: dict[str, str]) -> None:
    import gcpo.trainer

    gcpo.trainer.GCPOTrainer = Killed  # type: ignore[misc]
    for moment, folder in folders.items():
        child = os.fork()
        if child == 0:
            Killed.moment = moment
            main(["train", "--config", config, "--output_dir", folder])
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, f"{moment}: {status}"


if __name__ == "__main__":
    run(sys.argv[1], json.loads(sys.argv[2]))
