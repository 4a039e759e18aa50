import subprocess
import sys

import pytest

import trl_ext
from trl_ext.cli import main
from trl_ext.core.mixing import list_methods


def test_methods_are_listed(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    main(["methods"])
    printed = capsys.readouterr().out
    for slug in list_methods():
        assert slug in printed
    assert "2509.13232" in printed and "prompt_weights, compute_advantages" in printed


def test_usage(capsys):
    with pytest.raises(SystemExit):
        main(["typo"])
    assert "invalid choice" in capsys.readouterr().err


def test_as_a_module():
    result = subprocess.run([sys.executable, "-m", "trl_ext", "--version"], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == f"trl-ext {trl_ext.__version__}"


def test_importing_the_package_is_cheap():
    code = "import sys, trl_ext; assert 'torch' not in sys.modules and 'trl' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
