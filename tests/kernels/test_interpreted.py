"""The Triton kernels run without a GPU: every test of the backend ``interpreted``, in Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

triton = pytest.importorskip("triton")

TESTS = Path(__file__).parents[1]
PROCESSES = {
    **{stem: [f"ops/test_{stem}.py"] for stem in ("attention", "attention_maps", "hutchinson", "jacobian")},
    "rates": ["ops/test_rates.py", "ops/test_kernel_errors.py"],
    **{f"interpreted_{name}": [f"interpreted/test_{name}.py"] for name in ("launcher", "plans")},
}


MASKS_OF_BOTH = ("attention", "attention_maps", "interpreted_launcher")


@pytest.fixture(scope="module")
def interpreters(tmp_path_factory):
    """All processes, side by side: the interpreter must be chosen before kernels are imported."""
    running = {}
    for name, files in PROCESSES.items():
        folder = tmp_path_factory.mktemp(name)
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:randomly", "--timeout=280"]
        command += [f"--junitxml={folder / 'report.xml'}", *(str(TESTS / file) for file in files)]
        with (folder / "output.txt").open("w") as output:
            process = subprocess.Popen(
                command, cwd=TESTS.parent, env=os.environ | {"TRITON_INTERPRET": "1"}, stdout=output, stderr=output
            )
        running[name] = (process, folder)
    yield running
    for process, _ in running.values():
        process.kill()
        process.wait()


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", PROCESSES)
def test_interpreted(name, interpreters, subtests):
    """Every test that this process has run, reported one by one."""
    process, folder = interpreters[name]
    status = process.wait()
    if name in MASKS_OF_BOTH and not triton.__version__.startswith("3.6."):
        pytest.skip(f"Triton {triton.__version__} interprets no mask that is made of a block and a number (3.6 does)")
    report = folder / "report.xml"
    assert report.exists(), f"the interpreter's tests did not run:\n{(folder / 'output.txt').read_text()}"
    cases = list(ElementTree.parse(report).iter("testcase"))
    assert cases, f"no tests were found:\n{(folder / 'output.txt').read_text()}"
    for case in cases:
        with subtests.test(msg=case.get("name")):
            for problem in (*case.iter("failure"), *case.iter("error"), *case.iter("skipped")):
                pytest.fail(problem.text or problem.get("message") or "failed without a message")
    assert status == 0, (folder / "output.txt").read_text()
