"""What libraries print while they are imported."""

import logging

import pytest

import fedelta


def test_the_message_about_an_optional_kernel_of_bitsandbytes_is_not_printed(caplog: pytest.LogCaptureFixture) -> None:
    assert fedelta.__version__
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    logger.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s", "No module named 'kernels'")
    logger.warning("another message")
    assert [record.getMessage() for record in caplog.records] == ["another message"]
