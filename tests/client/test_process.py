"""Starts that must fail: one clear message, a non-zero exit code, nothing left behind."""

import os
import subprocess
import unittest

from server import server


def serve(*options):
    """Runs `exrail serve` until it ends by itself."""
    return subprocess.run(
        [server().exrail, "serve", *options], capture_output=True, text=True, timeout=60, check=False
    )


class Starts(unittest.TestCase):
    def failed(self, message, *options):
        trace_log = os.path.join(server().folder.name, "other-trace.jsonl")
        run = serve("--trace-log", trace_log, *options)
        self.assertEqual(run.returncode, 1, run)
        self.assertIn(message, run.stderr)
        self.assertNotIn("panicked", run.stderr)

    def test_port_in_use(self):
        self.failed("already in use", "--port", str(server().port))

    def test_a_public_address_needs_a_key(self):
        self.failed("--api-key-file", "--host", "0.0.0.0", "--port", "0")

    def test_an_unknown_model_is_named(self):
        self.failed("no-such-model", "--port", "0", "--model", "no-such-model")

    def test_a_file_that_is_no_model_is_named(self):
        path = os.path.join(server().folder.name, "not-a-model.gguf")
        with open(path, "wb") as file:
            file.write(b"GGUF" + bytes(7))
        self.failed("not-a-model.gguf", "--port", "0", "--model", path)

    def test_a_missing_key_file_is_named(self):
        self.failed("no-keys-here", "--port", "0", "--api-key-file", "no-keys-here")
