"""Readiness is proved by generated tokens; until then every answer says what is missing."""

import unittest

from server import server


class Boot(unittest.TestCase):
    def test_not_ready_names_the_phase_and_when_to_ask_again(self):
        early = [reply for reply in server().boot_replies if reply.status != 200]
        self.assertTrue(early, "the server was ready before the first poll; nothing was tested")
        for reply in early:
            self.assertEqual(reply.status, 503)
            self.assertEqual(reply.json()["status"], "not_ready")
            self.assertTrue(reply.json()["phase"])
            self.assertGreaterEqual(int(reply.headers["retry-after"]), 1)

    def test_alive_from_the_start(self):
        self.assertEqual(server().livez_at_boot.status, 200)

    def test_requests_wait_behind_the_fence(self):
        reply = server().models_at_boot
        self.assertEqual(reply.status, 503)
        self.assertEqual(reply.json()["error"]["code"], "not_ready")
        self.assertGreaterEqual(int(reply.headers["retry-after"]), 1)

    def test_ready_lists_the_phases_that_prove_it(self):
        body = server().boot_replies[-1].json()
        self.assertEqual((body["status"], body["phase"]), ("ready", "ready"))
        passed = {record["phase"] for record in body["phases"] if record["ok"]}
        self.assertLessEqual({"weights", "warmup", "sentinel"}, passed)
