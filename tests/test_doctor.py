"""`gcpo doctor`: the kernels checked on this machine, and a wrong one found."""

import pytest
import torch

from gcpo.cli import main
from gcpo.commands import doctor


def test_doctor_passes_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    for name in ("torch", "triton", "vllm", "device", "backend", *(case.name for case in doctor.cases())):
        assert f"\n{name} " in out
    assert "FAIL" not in out


def test_doctor_covers_every_differentiable_function() -> None:
    import gcpo_kernels

    without_gradient = {"available_backends", "group_advantages", "causal_reference_logprob"}
    assert {case.name for case in doctor.cases()} == set(gcpo_kernels.__all__) - without_gradient


@pytest.mark.parametrize("fault", ["value", "gradient", "nan", "raises"])
def test_doctor_finds_a_wrong_kernel(
    fault: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import gcpo_kernels

    right = gcpo_kernels.leave_one_out_mean

    def wrong(z: torch.Tensor) -> torch.Tensor:
        out = right(z)
        if fault == "raises":
            raise RuntimeError("does not compile")
        if fault == "gradient":
            return out.detach() + 0 * z
        return out * (float("nan") if fault == "nan" else 1.001)

    monkeypatch.setattr(gcpo_kernels, "leave_one_out_mean", wrong)
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "1 of 7 functions are wrong here: leave_one_out_mean" in out
    assert out.count("FAIL") == 1


def test_doctor_warns_of_another_trl(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    installed = doctor.installed
    monkeypatch.setattr(doctor, "cases", lambda: iter(()))
    for version, wanted in (("1.17.0", "warning: trl 1.17.0 is not 1.16.x"), (None, "need trl")):
        monkeypatch.setattr(doctor, "installed", lambda name, v=version: v if name == "trl" else installed(name))
        assert main(["doctor"]) == 0
        assert wanted in capsys.readouterr().out
