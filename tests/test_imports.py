"""What ``import lightning_polydis`` costs, and does not do."""

import json
import subprocess
import sys

IMPORTED = """
import json, sys, warnings
import lightning  # what it imports and warns of is its own affair
before = set(sys.modules)
with warnings.catch_warnings():
    warnings.simplefilter("error")
    import lightning_polydis
print(json.dumps(sorted({name.partition(".")[0] for name in set(sys.modules) - before})))
"""


def test_the_import_is_silent_and_brings_in_nothing_that_takes_its_time():
    done = subprocess.run([sys.executable, "-c", IMPORTED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    imported = set(json.loads(done.stdout))
    assert "lightning_polydis" in imported
    assert not imported & {"captum", "horama", "jinja2", "pandas", "safetensors", "sklearn", "tensorboard", "zennit"}
