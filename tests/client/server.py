"""The server under test: one `exrail serve` for all tests, on a free loopback port, with a key and
one collection. Its boot is watched from the first moment."""

import http.client
import json
import os
import subprocess
import tempfile
import time
import urllib.parse

import openai

HERE = os.path.dirname(os.path.abspath(__file__))
KEY = "test-key-of-the-client-tests-0123456789"
COLLECTION = "varnholm"
BOOT_LIMIT_S = 300
REQUEST_LIMIT_S = 120


class Reply:
    """Status, headers and body of one raw exchange."""

    def __init__(self, response):
        self.status = response.status
        self.headers = {name.lower(): value for name, value in response.getheaders()}
        self.body = response.read()

    def json(self):
        return json.loads(self.body)


class Server:
    def __init__(self, exrail):
        self.exrail = exrail
        self.folder = tempfile.TemporaryDirectory(prefix="exrail-client-test-")
        self.trace_log = os.path.join(self.folder.name, "trace.jsonl")
        self.boot_replies = []
        collection = f"{COLLECTION}={os.path.join(self.folder.name, 'collection')}"
        key_file = os.path.join(self.folder.name, "keys")
        with open(key_file, "w", encoding="ascii") as file:
            file.write(f"# keys of the tests\n{KEY}\n")
        subprocess.run(
            [exrail, "ingest", os.path.join(HERE, "corpus"), "--collection", collection, "--json"],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        self.process = subprocess.Popen(
            [exrail, "serve", "--port", "0", "--json", "--collection", collection,
             "--api-key-file", key_file, "--trace-log", self.trace_log],
            stdout=subprocess.PIPE,
        )
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"exrail serve ended with {self.process.wait()}, printed no URL")
        self.url = json.loads(line)["url"]
        address = urllib.parse.urlsplit(self.url)
        self.host, self.port = address.hostname, address.port
        self._watch_boot()

    def _watch_boot(self):
        """Asks /readyz until it says yes, and keeps every answer for test_boot."""
        self.livez_at_boot = self.raw("GET", "/livez", key=None)
        self.models_at_boot = self.raw("GET", "/v1/models")
        limit = time.monotonic() + BOOT_LIMIT_S
        while time.monotonic() < limit:
            reply = self.raw("GET", "/readyz", key=None)
            self.boot_replies.append(reply)
            if reply.status == 200:
                return
            if self.process.poll() is not None:
                raise RuntimeError(f"exrail serve ended with {self.process.returncode} in its boot")
            time.sleep(0.02)
        raise RuntimeError(f"not ready after {BOOT_LIMIT_S} s: {self.boot_replies[-1].body!r}")

    def client(self, key=KEY):
        # No retries: a test must see the first answer.
        return openai.OpenAI(
            base_url=self.url + "/v1", api_key=key, max_retries=0, timeout=REQUEST_LIMIT_S
        )

    def raw(self, method, path, body=None, key=KEY):
        """One request without the client, for what the client would never send."""
        headers = {"Content-Type": "application/json"}
        if key is not None:
            headers["Authorization"] = f"Bearer {key}"
        connection = http.client.HTTPConnection(self.host, self.port, timeout=REQUEST_LIMIT_S)
        try:
            connection.request(method, path, body=body, headers=headers)
            return Reply(connection.getresponse())
        finally:
            connection.close()

    def post(self, path, value):
        return self.raw("POST", path, json.dumps(value).encode())

    def metrics(self):
        """Metrics without labels, by name."""
        reply = self.raw("GET", "/metrics")
        assert reply.status == 200, reply.body
        lines = reply.body.decode().splitlines()
        pairs = [line.rsplit(" ", 1) for line in lines if line and not line.startswith("#")]
        return {name: float(value) for name, value in pairs if "{" not in name}

    def traces(self):
        with open(self.trace_log, encoding="utf-8") as file:
            return [json.loads(line) for line in file]

    def stop(self):
        """Ends the server the way a service manager does, and returns its exit code."""
        if self.process.poll() is None:
            self.process.terminate()
        try:
            return self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            return None
        finally:
            self.process.stdout.close()
            self.folder.cleanup()


SERVER = None


def server():
    """The running server; run.py starts it."""
    assert SERVER is not None, "run through tests/client/run.py"
    return SERVER
