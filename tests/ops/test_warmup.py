"""Loading all kernels ahead, on a machine that has no GPU: what is said there, and what would be done elsewhere."""

from __future__ import annotations

import sys

import pytest
import torch

import lwkd
from lwkd.kernels import images, spec

module = sys.modules["lwkd.ops.warmup"]  # `lwkd.warmup` is the function


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_without_a_driver_it_says_what_was_looked_for(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    with pytest.raises(RuntimeError) as caught:
        lwkd.warmup()
    for part in (f"torch {torch.__version__}", "libcuda.so.1", "CUDA_VISIBLE_DEVICES='7'"):
        assert part in str(caught.value)


def test_only_cuda_devices_and_dtypes_that_kernels_read():
    with pytest.raises(ValueError, match="only CUDA devices have kernels to load, and cpu is none"):
        lwkd.warmup("cpu")
    with pytest.raises(ValueError, match=r"found torch\.float64"):
        lwkd.warmup("cuda:0", [torch.float32, torch.float64])


@pytest.fixture
def device(monkeypatch):
    """A device with 9.0 that records what is loaded, and which new processes are started."""
    loaded, started = [], []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(module._C, "load_kernel", lambda variant, device: loaded.append((variant, device)))
    monkeypatch.setattr(module.subprocess, "run", lambda command, **_: started.append(command))
    return loaded, started


def test_every_variant_is_loaded_after_one_parallel_compile(device, monkeypatch):
    pytest.importorskip("triton")  # nothing else compiles
    loaded, started = device
    monkeypatch.setattr(images, "missing", lambda variants, target: list(variants))
    everything = [(variant.text, "cuda:3") for variant in spec.all_variants()]
    assert lwkd.warmup() == len(everything)
    assert loaded == everything
    ((python, *command),) = started
    assert python == sys.executable
    assert command == ["-m", "lwkd.kernels.compile", "--arch", "90", "--element", "fp32", "fp16", "bf16"]


def test_nothing_is_compiled_that_is_there(device, monkeypatch):
    loaded, started = device
    monkeypatch.setattr(images, "missing", lambda variants, target: [])
    number = lwkd.warmup("cuda:1", [torch.bfloat16])
    assert loaded == [(variant.text, "cuda:1") for variant in spec.all_variants(["bf16"])]
    assert (number, started) == (len(loaded), [])


def test_backend_names_the_device_and_where_images_come_from(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(lwkd.ops._C, "architecture", lambda index: 90 + index)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert lwkd.backend().endswith(f"Triton kernels on CUDA device 0 (sm_90); images are {images.describe(90)}")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 10)
    assert "CUDA device 10 (sm_100)" in lwkd.backend()


@pytest.mark.parametrize(("devices", "said"), [(2, "CUDA device 0 "), (-1, "CUDA devices, if the driver finds any ")])
def test_backend_does_not_initialise_cuda(devices, said, monkeypatch):
    """Children of a process that forks later could not use it."""

    def refuse(*_):
        raise AssertionError("this initialises CUDA")

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "_device_count_nvml", lambda: devices)
    monkeypatch.setattr(lwkd.ops, "_has_driver", lambda: True)
    for module_, name in ((torch.cuda, "is_available"), (torch.cuda, "device_count"), (lwkd.ops._C, "architecture")):
        monkeypatch.setattr(module_, name, refuse)
    assert f"Triton kernels on {said}(which this process does not use yet); images are " in lwkd.backend()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_backend_without_a_device():
    assert "no CUDA kernels, since torch" in lwkd.backend()
