"""The device of each process, what the processes share, and the host's settings, which are restored."""

import os
import platform
import resource
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
from conftest import FORKS

import runtime.device
from runtime import processes
from runtime.device import AUTOCAST_DTYPES, Runtime, device_title, machine, pick_device, training_error
from runtime.errors import UserError
from runtime.processes import FLOAT32_OPERATORS, pick_precision, start

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("name", "environment", "expected"),
    [
        ("auto", {}, "cuda:0"),
        ("cuda:1", {}, "cuda:1"),
        ("cpu", {}, "cpu"),
        ("auto", {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, "cuda:1"),
        ("cpu", {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "9"}, "cpu"),
        ("cuda", {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "3"}, "3 processes need one device each.* has 2"),
        ("cuda:1", {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, "2 processes need one device each.* has 1"),
        ("cuda:2", {}, "finds 2 CUDA devices: give a number below 2"),
        ("mps", {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, "2 processes need one device each.* has 1"),
    ],
)
def test_each_process_has_a_device_of_its_own_with_its_number(name, environment, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    if " " in expected:
        with pytest.raises(UserError, match=expected):
            pick_device(name)
    else:
        assert str(pick_device(name)) == expected  # torch.cuda.set_device refuses one without its number


@pytest.mark.parametrize("name", ["auto", "mps"])
@pytest.mark.parametrize("error", ["", "it computes nonsense"])
def test_mps_is_used_if_it_trains_as_the_cpu_does(name, error, monkeypatch, capsys):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(runtime.device, "training_error", lambda device: error)
    if name == "mps" and error:
        with pytest.raises(UserError, match=f"--device mps: .* fails .*{error}"):
            pick_device(name)
    else:
        assert pick_device(name).type == ("cpu" if error else "mps")
    told = capsys.readouterr().out
    assert told.count("\n") == (name == "auto" and error != "") and (error in told or name == "mps")


def test_a_trial_step_finds_what_a_device_computes_wrongly(monkeypatch):
    assert training_error(CPU) == ""
    assert "meta" in training_error(torch.device("meta")), "a device that lacks an operation"
    real, calls = torch.nn.BatchNorm2d.forward, []

    def wrong_at_first(self, images):
        calls.append(1)
        return real(self, images * (2 if len(calls) == 1 else 1)) * (1.1 if len(calls) == 1 else 1)

    monkeypatch.setattr(torch.nn.BatchNorm2d, "forward", wrong_at_first)
    state = torch.get_rng_state()
    assert "gradients differ from the CPU's by" in training_error(CPU)
    assert torch.equal(torch.get_rng_state(), state)


def test_fp16_needs_cuda():
    assert pick_precision("fp16", CUDA) == "fp16"
    with pytest.raises(UserError, match="--precision fp16 needs a CUDA device"):
        pick_precision("fp16", CPU)


def test_a_machine_is_described_by_version_and_device():
    runtime = Runtime(CPU)
    title = device_title(runtime)
    assert f"{torch.get_num_threads()} thread" in title
    assert machine(runtime) == {"torch": torch.__version__, "device": title}
    assert all(type(value) is str for value in machine(runtime).values()), "torch's own class is no plain string"
    assert device_title(Runtime(torch.device("mps"))).endswith(", MPS")


def settings() -> dict:
    """Torch's global settings that a run or an evaluation may change."""
    cudnn = torch.backends.cudnn
    return {
        "enabled": cudnn.enabled, "benchmark": cudnn.benchmark,
        "float32": [operator.fp32_precision for operator in FLOAT32_OPERATORS],
        "deterministic": cudnn.deterministic, "algorithms": torch.are_deterministic_algorithms_enabled(),
        "warn only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "dtype": torch.get_default_dtype(), "device": torch.get_default_device().type,
        "products": torch.get_float32_matmul_precision(), "gradients": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(), "autocast": torch.is_autocast_enabled("cpu"),
        "cuBLAS": os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
        "fill": torch.utils.deterministic.fill_uninitialized_memory,
    }  # fmt: skip


def test_channels_last_is_for_cpus_and_half_precision_on_cuda():
    """On MPS, batch norm's gradients are wrong in it."""
    found = {(kind, word) for kind in ("cpu", "cuda", "mps") for word in AUTOCAST_DTYPES
             if Runtime(torch.device(kind), word).memory_format is torch.channels_last}  # fmt: skip
    assert found == {("cpu", word) for word in AUTOCAST_DTYPES} | {("cuda", "bf16"), ("cuda", "fp16")}


@pytest.fixture(params=[True, False])
def host(request, monkeypatch):
    """Settings of a host, a notebook perhaps, all of one kind."""
    for name in ("benchmark", "allow_tf32", "deterministic"):
        monkeypatch.setattr(torch.backends.cudnn, name, request.param)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    torch.use_deterministic_algorithms(request.param, warn_only=request.param)
    if request.param:
        torch.set_default_dtype(torch.float64)
        torch.set_default_device("meta")
    torch.set_float32_matmul_precision("medium" if request.param else "highest")
    with torch.inference_mode(request.param), torch.autocast("cpu", torch.bfloat16, enabled=request.param):
        yield settings()
    torch.use_deterministic_algorithms(False)
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)
    torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("deterministic", [True, False])
def test_a_run_restores_the_hosts_settings(deterministic, host):
    with pytest.raises(ZeroDivisionError), start("cpu", "fp32", deterministic):
        during = settings()
        raise ZeroDivisionError
    assert settings() == host
    expected = {"dtype": torch.float32, "device": "cpu", "products": "highest", "gradients": True, "inference": False}
    expected |= {"autocast": False, "benchmark": not deterministic, "fill": False}
    assert expected.items() <= during.items() and {*during["float32"]} == {"ieee"}
    if deterministic:
        assert during["deterministic"] and during["algorithms"] and not during["warn only"]


@pytest.mark.parametrize("backend", [torch.backends, torch.backends.cuda.matmul])
def test_a_host_may_use_torchs_newer_interface_to_float32(backend):
    default = [operator.fp32_precision for operator in FLOAT32_OPERATORS]
    backend.fp32_precision = "tf32"
    before = [operator.fp32_precision for operator in FLOAT32_OPERATORS]
    with start("cpu", "fp32"):
        during = {operator.fp32_precision for operator in FLOAT32_OPERATORS}
        products = torch.get_float32_matmul_precision()  # which torch.compile reads
    after = [operator.fp32_precision for operator in FLOAT32_OPERATORS]
    backend.fp32_precision = "none"
    for operator, precision in zip(FLOAT32_OPERATORS, default, strict=True):
        operator.fp32_precision = precision
    assert during == {"ieee"} and products == "highest" and "tf32" in before and after == before


def test_logits_are_repeatable_within_a_block_and_cudnn_stays_on(host):
    with pytest.raises(ZeroDivisionError), Runtime(CPU).repeatable_logits():
        assert settings() == host | {"benchmark": False, "deterministic": True}
        raise ZeroDivisionError
    assert settings() == host


@pytest.mark.parametrize(
    "precision, fast, word",
    [("auto", True, "bf16"), ("auto", False, "fp32"), ("bf16", False, "bf16"), ("fp32", True, "fp32")],
)
def test_auto_is_bf16_where_it_is_faster(precision, fast, word, monkeypatch):
    for module in (processes, runtime.device):
        monkeypatch.setattr(module, "has_fast_bf16", lambda device: fast)
    with start("cpu", precision) as here, here.autocast():
        assert here.precision == word
        assert here.product_dtype == (torch.bfloat16 if fast or word == "bf16" else torch.float32)
        dtype = torch.nn.functional.linear(torch.zeros(2, 2), torch.zeros(2, 2)).dtype
    assert dtype == (torch.bfloat16 if word == "bf16" else torch.float32)


def new_pages() -> int:
    """In a process of its own: how many pages of memory eight blocks take in a run after eight like them."""
    with start("cpu", "fp32"):
        for _ in range(2):  # malloc's alignment leaves gaps that are a little too small, but not for ever
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            for _ in range(8):
                torch.ones(64 << 20, dtype=torch.uint8)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(platform.libc_ver() < ("glibc", "2.35"), reason="needs glibc 2.35")
def test_a_block_like_one_freed_before_costs_no_new_pages():
    with ProcessPoolExecutor(1, FORKS) as forks:
        assert forks.submit(new_pages).result(120) < (64 << 20) // resource.getpagesize() / 10
