"""Going on after a stop, on two processes."""

import json
import sys
from pathlib import Path

import pytest
from launching import launch
from tiny_policy import save_policy


@pytest.mark.slow
def test_processes_go_on_alike(tmp_path: Path) -> None:
    """From what each kept; and where that of one is lost, all of them begin a rollout, and one of them says so."""
    policy = save_policy(tmp_path / "policy")
    launch([sys.executable, "-m", "torch.distributed.run"], "run_resume.py", policy, str(tmp_path))
    first, second = (json.loads((tmp_path / f"found-{rank}.json").read_text()) for rank in range(2))
    (whole, _), (resumed, told), (fresh, said) = first
    assert resumed == whole and told == []
    assert fresh[0] == whole[0] and fresh[1:] != whole[1:]
    assert len(said) == 1 and "the state of another process is missing" in said[0]
    assert [losses for losses, _ in second] == [whole, resumed, fresh] and second[2][1] == []
