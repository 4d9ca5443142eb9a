"""Chat completions through the official client."""

import unittest

from server import server

MODEL = "smollm2-135m-instruct"
QUESTION = [{"role": "user", "content": "Name three rivers of Europe."}]


def chat(**options):
    options.setdefault("messages", QUESTION)
    options.setdefault("temperature", 0)
    options.setdefault("max_tokens", 24)
    return server().client().chat.completions.create(model=MODEL, **options)


class Models(unittest.TestCase):
    def test_generator_and_encoder_are_listed(self):
        models = {model.id for model in server().client().models.list()}
        self.assertEqual(models, {MODEL, "all-minilm-l6-v2"})

    def test_one_model_can_be_asked_for(self):
        self.assertEqual(server().client().models.retrieve(MODEL).id, MODEL)


class Chat(unittest.TestCase):
    def test_answer_has_text_usage_and_names(self):
        answer = chat()
        self.assertTrue(answer.choices[0].message.content.strip())
        self.assertEqual(answer.choices[0].message.role, "assistant")
        self.assertEqual(answer.model, MODEL)
        self.assertTrue(answer.system_fingerprint)
        usage = answer.usage
        self.assertGreater(usage.prompt_tokens, 0)
        self.assertGreater(usage.completion_tokens, 0)
        self.assertEqual(usage.total_tokens, usage.prompt_tokens + usage.completion_tokens)

    def test_length_ends_at_max_tokens(self):
        answer = chat(max_tokens=5)
        self.assertEqual(answer.choices[0].finish_reason, "length")
        self.assertEqual(answer.usage.completion_tokens, 5)

    def test_max_completion_tokens_is_the_same_limit(self):
        answer = chat(max_tokens=None, max_completion_tokens=5)
        self.assertEqual(answer.usage.completion_tokens, 5)

    def test_end_of_turn_is_a_stop(self):
        (end_of_turn,) = server().post(
            "/v1/tokenize", {"text": "<|im_end|>", "parse_special": True}
        ).json()["tokens"]
        answer = chat(logit_bias={str(end_of_turn): 100})
        self.assertEqual(answer.choices[0].finish_reason, "stop")
        self.assertEqual(answer.choices[0].message.content, "")

    def test_text_parts_are_joined(self):
        parts = [{"type": "text", "text": "Name three "}, {"type": "text", "text": "rivers of Europe."}]
        whole = chat().choices[0].message.content
        self.assertEqual(
            chat(messages=[{"role": "user", "content": parts}]).choices[0].message.content, whole
        )

    def test_stop_string_is_cut_off(self):
        whole = chat().choices[0].message.content
        stop = whole[len(whole) // 2:][:6]
        cut = chat(stop=stop).choices[0]
        self.assertEqual(cut.finish_reason, "stop")
        self.assertEqual(cut.message.content, whole[:whole.index(stop)])

    def test_two_choices_differ_by_their_draws_only(self):
        greedy = chat(n=2).choices
        self.assertEqual([choice.index for choice in greedy], [0, 1])
        self.assertEqual(greedy[0].message.content, greedy[1].message.content)
        drawn = chat(n=2, temperature=1.0, seed=5).choices
        self.assertNotEqual(drawn[0].message.content, drawn[1].message.content)

    def test_a_seed_fixes_the_answer(self):
        def draw(seed):
            return chat(temperature=1.0, seed=seed).choices[0].message.content

        self.assertEqual(draw(7), draw(7))
        self.assertNotEqual(draw(7), draw(8))

    def test_logprobs_spell_the_answer(self):
        answer = chat(max_tokens=8, logprobs=True, top_logprobs=3)
        tokens = answer.choices[0].logprobs.content
        self.assertEqual(len(tokens), answer.usage.completion_tokens)
        spelled = b"".join(bytes(token.bytes) for token in tokens)
        self.assertEqual(spelled.decode(), answer.choices[0].message.content)
        for token in tokens:
            self.assertLessEqual(token.logprob, 0)
            self.assertEqual(len(token.top_logprobs), 3)
            values = [top.logprob for top in token.top_logprobs]
            self.assertEqual(values, sorted(values, reverse=True))
            self.assertEqual(token.top_logprobs[0].token, token.token, "greedy takes the best")


class Stream(unittest.TestCase):
    def test_stream_says_what_the_whole_answer_says(self):
        chunks = list(chat(stream=True))
        self.assertEqual(chunks[0].choices[0].delta.role, "assistant")
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        whole = chat().choices[0]
        self.assertEqual(text, whole.message.content)
        self.assertEqual(chunks[-1].choices[0].finish_reason, whole.finish_reason)
        self.assertGreater(len(chunks), 5, "tokens come one by one")
        self.assertEqual(len({chunk.id for chunk in chunks}), 1)

    def test_usage_comes_last_when_asked_for(self):
        chunks = list(chat(stream=True, stream_options={"include_usage": True}, max_tokens=5))
        self.assertEqual(chunks[-1].choices, [])
        self.assertEqual(chunks[-1].usage.completion_tokens, 5)
        self.assertTrue(all(chunk.usage is None for chunk in chunks[:-1]))

    def test_no_character_is_split(self):
        messages = [{"role": "user", "content": "Write ten emoji: 🙂🚀🌍🎉🍎. Repeat them."}]
        for chunk in chat(stream=True, messages=messages, max_tokens=48):
            for choice in chunk.choices:
                self.assertNotIn("\ufffd", choice.delta.content or "")

    def test_choices_of_a_stream_carry_their_index(self):
        texts = ["", ""]
        for chunk in chat(stream=True, n=2, temperature=1.0, seed=5):
            for choice in chunk.choices:
                texts[choice.index] += choice.delta.content or ""
        whole = chat(n=2, temperature=1.0, seed=5).choices
        self.assertEqual(texts, [choice.message.content for choice in whole])
