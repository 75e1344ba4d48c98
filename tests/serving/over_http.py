"""Asks ``vllm serve`` what an OpenAI client would ask, over HTTP."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SECONDS = 900
TEXT = {"prompt": "The number of ways to", "max_tokens": 24, "temperature": 0}

SHOWN = "http://localhost:8000"
CLIENT = """\
from openai import OpenAI
client = OpenAI(base_url="{address}/v1", api_key="none")
made = client.completions.create(
    model="{name}", prompt="The number of ways to", max_tokens=24, temperature=0)
print(repr(made.choices[0].text))
"""


@contextmanager
def server(python: Path, checkpoint: Path, dtype: str) -> Iterator[str]:
    """The address of a running ``vllm serve``; it ends with the block.

    Raises:
        RuntimeError: it did not answer in time; the message is the end of its log.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    named = name_of_vllm(checkpoint.parent / "metadata")
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(named), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
    }
    log = checkpoint.parent / f"{checkpoint.name}-serve.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [python.parent / "vllm", *options(checkpoint, dtype), "--port", str(port)],
            stdout=output,
            stderr=output,
            env=environment,
        )
        try:
            address = f"http://127.0.0.1:{port}"
            wait(process, address, log)
            yield address
        finally:
            process.terminate()
            process.wait(60)


def name_of_vllm(folder: Path) -> Path:
    """A folder that tells Python of a package ``vllm``.

    The one for CPUs is called vllm-cpu, and its command line asks for the version of ``vllm``.
    """
    about = folder / "vllm-0.32.0+cpu.dist-info" / "METADATA"
    about.parent.mkdir(parents=True, exist_ok=True)
    about.write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n")
    return folder


def options(checkpoint: Path, dtype: str) -> list[str]:
    """The command line, without the port."""
    return [
        "serve", str(checkpoint), "--dtype", dtype, "--enforce-eager", "--max-model-len", "256",
        "--served-model-name", checkpoint.name,
    ]  # fmt: skip


def wait(process: subprocess.Popen[bytes], address: str, log: Path) -> None:
    """Return when the server says that it is well."""
    end = time.monotonic() + SECONDS
    while time.monotonic() < end and process.poll() is None:
        try:
            with urllib.request.urlopen(f"{address}/health", timeout=5):
                return
        except OSError:
            time.sleep(1)
    raise RuntimeError(f"vllm serve did not start: {log.read_text()[-2000:]}")


def completions(address: str, body: Mapping[str, Any]) -> dict[str, Any]:
    """The answer to POST /v1/completions."""
    request = urllib.request.Request(
        f"{address}/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json", "Authorization": "Bearer none"},
    )
    with urllib.request.urlopen(request, timeout=SECONDS) as answer:
        found: dict[str, Any] = json.load(answer)
    return found


def client(python: Path, address: str, name: str) -> str:
    """What the OpenAI client of vLLM's environment gets for the same question."""
    code = CLIENT.format(address=address, name=name)
    done = subprocess.run(
        [python, "-c", code], check=True, capture_output=True, text=True, timeout=SECONDS
    )
    return done.stdout.strip()


def ask(
    python: Path, checkpoint: Path, dtype: str, prompts: Sequence[Sequence[int]], tokens: int
) -> tuple[list[list[int]], str]:
    """Greedy tokens for prompts of token ids, and a transcript of one question in words."""
    with server(python, checkpoint, dtype) as address:
        body = {
            "model": checkpoint.name,
            "prompt": list(prompts),
            "max_tokens": tokens,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
        }
        choices = sorted(completions(address, body)["choices"], key=lambda one: one["index"])
        question = {"model": checkpoint.name, **TEXT}
        answer = completions(address, question)
        spoken = client(python, address, checkpoint.name)
    kept = {key: answer[key] for key in ("object", "model", "choices", "usage") if key in answer}
    kept["choices"] = [
        {key: one[key] for key in ("index", "text", "finish_reason")} for one in kept["choices"]
    ]
    kept["usage"] = {key: value for key, value in kept["usage"].items() if value is not None}
    command = " ".join(["vllm", *options(Path(checkpoint.name), dtype)])
    transcript = (
        f"$ {command}\n$ curl -s localhost:8000/v1/completions "
        f"-H 'Content-Type: application/json' \\\n    -d '{json.dumps(question)}'\n"
        f"{json.dumps(kept, indent=1, ensure_ascii=False)}\n$ python\n"
        + "".join(
            f">>> {line}\n"
            for line in CLIENT.format(address=SHOWN, name=checkpoint.name).splitlines()
        )
        + spoken
    )
    return [choice["token_ids"] for choice in choices], transcript
