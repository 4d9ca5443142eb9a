"""Every refusal has the class that the client raises for it, and names what is wrong. After all of
them the server still answers."""

import json
import unittest

import openai

from server import server

MODEL = "smollm2-135m-instruct"
# The first tokens of the answer lead by at least 2.5 nats, so that no rounding turns them.
MESSAGES = [{"role": "user", "content": "What is the capital of Japan?"}]
ANSWER = "The capital of Japan"
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


def chat(**options):
    client = options.pop("client", None) or server().client()
    options.setdefault("model", MODEL)
    options.setdefault("messages", MESSAGES)
    options.setdefault("max_tokens", 4)
    return client.chat.completions.create(**options)


class Refusals(unittest.TestCase):
    def tearDown(self):
        answer = chat(temperature=0).choices[0].message.content
        self.assertEqual(answer, ANSWER, "the server keeps serving")

    def refused(self, param, **options):
        with self.assertRaises(openai.BadRequestError) as caught:
            chat(**options)
        self.assertEqual(caught.exception.param, param)
        self.assertIn(param, caught.exception.message)

    def test_wrong_key(self):
        with self.assertRaises(openai.AuthenticationError) as caught:
            chat(client=server().client(key="not-the-key-of-this-server"))
        self.assertEqual(caught.exception.code, "invalid_api_key")

    def test_no_route_is_open_without_a_key(self):
        for method, path in [
            ("GET", "/v1/models"), ("GET", "/metrics"), ("GET", "/v1/exrail/config"),
            ("POST", "/v1/chat/completions"), ("POST", "/v1/ask"), ("GET", "/nothing/here"),
        ]:
            with self.subTest(path=path):
                self.assertEqual(server().raw(method, path, key=None).status, 401)

    def test_unknown_model(self):
        with self.assertRaises(openai.NotFoundError) as caught:
            chat(model="gpt-oss")
        self.assertEqual(caught.exception.code, "model_not_found")
        self.assertIn(MODEL, caught.exception.message, "what there is, is named")

    def test_unsupported_fields_are_named(self):
        self.refused("functions", extra_body={"functions": [TOOL["function"]]})
        self.refused("response_format", extra_body={"response_format": {"type": "yaml"}})
        self.refused("guided_json", extra_body={"guided_json": {}})

    def test_values_out_of_range_are_named(self):
        self.refused("temperature", temperature=-1)
        self.refused("top_p", top_p=1.5)
        self.refused("n", n=0)
        self.refused("max_tokens", extra_body={"max_tokens": -3})
        self.refused("top_logprobs", top_logprobs=3)

    def test_unknown_roles_and_parts_are_named_by_path(self):
        self.refused("messages[0].role", messages=[{"role": "robot", "content": "x"}])
        image = {"type": "image_url", "image_url": {"url": "data:,"}}
        with self.assertRaises(openai.BadRequestError) as caught:
            chat(messages=[{"role": "user", "content": [image]}])
        self.assertIn("messages[0].content[0]", caught.exception.param)

    def test_a_prompt_over_the_context(self):
        with self.assertRaises(openai.BadRequestError) as caught:
            chat(messages=[{"role": "user", "content": "word " * 9000}])
        self.assertEqual(caught.exception.code, "context_length_exceeded")

    def test_an_unknown_collection(self):
        with self.assertRaises(openai.NotFoundError) as caught:
            chat(extra_body={"exrail": {"collection": "nowhere"}})
        self.assertEqual(caught.exception.code, "collection_not_found")

    def test_bodies_that_are_no_json(self):
        whole = json.dumps({"model": MODEL, "messages": MESSAGES}).encode()
        bodies = {
            "bad UTF-8": whole.replace(b"Japan", b"\xff\xfe"),
            "truncated": whole[:-7],
            "empty": b"",
            "text after it": whole + b"}",
            "deeply nested": b'{"model":' + b"[" * 5000,
        }
        for name, body in bodies.items():
            with self.subTest(name):
                reply = server().raw("POST", "/v1/chat/completions", body)
                self.assertEqual(reply.status, 400, reply.body)
                self.assertTrue(reply.json()["error"]["message"])

    def test_a_body_over_the_limit(self):
        body = b'{"model":"' + b"x" * (64 << 20)
        try:
            status = server().raw("POST", "/v1/chat/completions", body).status
        except (BrokenPipeError, ConnectionResetError):
            return  # The server hung up while the body was still coming; also a refusal.
        self.assertEqual(status, 413)

    def test_unknown_routes(self):
        reply = server().raw("GET", "/v1/files")
        self.assertEqual((reply.status, reply.json()["error"]["code"]), (404, "no_such_route"))
