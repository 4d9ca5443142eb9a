"""A client that goes away gives everything back."""

import time
import unittest

from server import server

MODEL = "smollm2-135m-instruct"


class Cancel(unittest.TestCase):
    def settle(self, wanted, limit_s=5):
        """Waits until `wanted(metrics)` and returns the metrics."""
        limit = time.monotonic() + limit_s
        while True:
            metrics = server().metrics()
            if wanted(metrics):
                return metrics
            self.assertLess(time.monotonic(), limit, metrics)
            time.sleep(0.02)

    def test_a_closed_stream_returns_its_pages(self):
        all_free = lambda m: m["exrail_kv_pages_free"] == m["exrail_kv_pages_total"]
        before = self.settle(all_free)
        end_of_turn = server().post(
            "/v1/tokenize", {"text": "<|im_end|><|endoftext|>", "parse_special": True}
        ).json()["tokens"]
        stream = server().client().chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "Count to a million."}],
            max_tokens=1500,
            stream=True,
            # Never ends by itself, so that only the hang-up can end it.
            logit_bias={str(token): -100 for token in end_of_turn},
        )
        for _ in range(5):
            next(stream)
        during = server().metrics()
        self.assertLess(during["exrail_kv_pages_free"], during["exrail_kv_pages_total"])
        self.assertEqual(during["exrail_sequences_running"], 1)
        stream.close()
        after = self.settle(all_free)
        self.assertEqual(
            after["exrail_sequences_cancelled_total"],
            before["exrail_sequences_cancelled_total"] + 1,
        )
        generated = after["exrail_generated_tokens_total"] - before["exrail_generated_tokens_total"]
        self.assertLess(generated, 1500, "the hang-up ended it, not the limit")
        self.assertEqual(after["exrail_sequences_running"], 0)
        self.assertEqual(after["exrail_engine_panics_total"], 0)
