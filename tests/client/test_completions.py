"""Text completions and the tokenizer routes."""

import unittest

from server import server

MODEL = "smollm2-135m-instruct"
PROMPT = "The capital of France is"


def complete(**options):
    options.setdefault("prompt", PROMPT)
    options.setdefault("temperature", 0)
    options.setdefault("max_tokens", 8)
    return server().client().completions.create(model=MODEL, **options)


class Completions(unittest.TestCase):
    def test_the_prompt_is_continued(self):
        answer = complete()
        self.assertIn("Paris", answer.choices[0].text)
        self.assertEqual(answer.choices[0].finish_reason, "length")
        self.assertEqual(answer.usage.completion_tokens, 8)

    def test_the_default_limit_is_the_api_s(self):
        self.assertEqual(complete(max_tokens=None).usage.completion_tokens, 16)

    def test_several_prompts_give_choices_in_order(self):
        prompts = [PROMPT, "One, two, three,"]
        both = [choice.text for choice in complete(prompt=prompts).choices]
        alone = [complete(prompt=prompt).choices[0].text for prompt in prompts]
        self.assertEqual(both, alone)

    def test_token_ids_are_a_prompt(self):
        ids = server().post("/v1/tokenize", {"text": PROMPT}).json()["tokens"]
        self.assertEqual(complete(prompt=ids).choices[0].text, complete().choices[0].text)

    def test_echo_puts_the_prompt_first(self):
        text = complete(echo=True).choices[0].text
        self.assertEqual(text, PROMPT + complete().choices[0].text)

    def test_logprobs_line_up_with_the_text(self):
        logprobs = complete(logprobs=2).choices[0].logprobs
        text = complete().choices[0].text
        self.assertEqual("".join(logprobs.tokens), text)
        self.assertTrue(all(value <= 0 for value in logprobs.token_logprobs))
        for token, offset in zip(logprobs.tokens, logprobs.text_offset):
            self.assertEqual(text[offset:offset + len(token)], token)

    def test_stream_says_the_same(self):
        chunks = list(complete(stream=True))
        text = "".join(choice.text for chunk in chunks for choice in chunk.choices)
        self.assertEqual(text, complete().choices[0].text)


class Tokenizer(unittest.TestCase):
    def test_text_survives_the_round_trip(self):
        text = "Grüße, 世界! 🙂 <|im_end|> 12345"
        encoded = server().post("/v1/tokenize", {"text": text}).json()
        self.assertEqual(encoded["count"], len(encoded["tokens"]))
        decoded = server().post("/v1/detokenize", {"tokens": encoded["tokens"]}).json()
        self.assertEqual(decoded["text"], text)

    def test_control_tokens_need_to_be_asked_for(self):
        def count(**options):
            return server().post("/v1/tokenize", {"text": "<|im_end|>", **options}).json()["count"]

        self.assertGreater(count(), 1)
        self.assertEqual(count(parse_special=True), 1)
