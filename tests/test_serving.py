"""A merged folder is served by `transformers serve` as it is, and answers a request that carries a picture."""

from __future__ import annotations

import base64
import importlib.util
import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from typing import Any

import digits
import pytest

import vlm_sft
from vlm_sft.tools.merging import merge

pytestmark = [
    pytest.mark.web,
    pytest.mark.loopback,
    pytest.mark.skipif(importlib.util.find_spec("fastapi") is None, reason="`make test-browser` runs it"),
]


def post(address: str, request: dict[str, Any]) -> dict[str, Any]:
    """The reply, once the server is up and has one."""
    body = urllib.request.Request(address, json.dumps(request).encode(), {"Content-Type": "application/json"})
    for _ in range(240):
        try:
            with urllib.request.urlopen(body, timeout=120) as reply:
                return json.load(reply)
        except urllib.error.HTTPError as error:
            pytest.fail(f"{error}: {error.read().decode()}")
        except urllib.error.URLError:  # nobody listens yet
            time.sleep(0.5)
    pytest.fail("no server after two minutes")


def test_digits_are_read_over_http(tmp_path, tmp_path_factory):
    quickstart = digits.quickstart(tmp_path_factory)
    adapter = digits.adapter(tmp_path / "adapter", quickstart.folder, std=0.02)
    merged = tmp_path / "merged"
    merge(adapter, merged, base="original")
    rows = quickstart.rows.select(range(8))
    model, processor = vlm_sft.load_model(merged), vlm_sft.load_processor(merged)
    expected = vlm_sft.generate(model, vlm_sft.ChatTemplate(processor), rows, max_new_tokens=8, progress=False)
    right = [row["messages"][-1]["content"] for row in rows]
    assert sum(said == digit for said, digit in zip(expected, right, strict=True)) >= 4

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(merged), "--port", str(port)]
    said = []
    with subprocess.Popen([*command, "--host", "127.0.0.1", "--device", "cpu"], cwd=tmp_path) as server:
        try:
            for row in rows:
                row["images"][0].save(tmp_path / "digit.png")
                picture = base64.b64encode((tmp_path / "digit.png").read_bytes()).decode()
                content = [
                    {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{picture}"}},
                    {"type": "text", "text": "Which digit is this?"},
                ]
                request = {"model": str(merged), "messages": [{"role": "user", "content": content}], "max_tokens": 8}
                reply = post(f"http://127.0.0.1:{port}/v1/chat/completions", request | {"temperature": 0.0})
                said.append(reply["choices"][0]["message"]["content"].strip())
        finally:
            server.kill()
    assert said == expected
