"""Embeddings, as floats and in the client's own default, base64."""

import math
import unittest

import openai

from server import server

MODEL = "all-minilm-l6-v2"


def embed(texts, **options):
    return server().client().embeddings.create(model=MODEL, input=texts, **options)


def dot(a, b):
    return sum(x * y for x, y in zip(a, b))


class Embeddings(unittest.TestCase):
    def test_base64_and_float_are_the_same_vector(self):
        default = embed("a quiet harbour").data[0].embedding
        plain = embed("a quiet harbour", encoding_format="float").data[0].embedding
        self.assertEqual(len(default), 384)
        for a, b in zip(default, plain):
            self.assertAlmostEqual(a, b, delta=1e-6)

    def test_vectors_have_unit_length_and_keep_their_order(self):
        texts = ["one", "two words", "and now three"]
        answer = embed(texts)
        self.assertEqual([item.index for item in answer.data], [0, 1, 2])
        for text, item in zip(texts, answer.data):
            self.assertAlmostEqual(math.sqrt(dot(item.embedding, item.embedding)), 1, delta=1e-4)
            alone = embed(text).data[0].embedding
            self.assertGreater(dot(alone, item.embedding), 0.999)
        self.assertGreater(answer.usage.prompt_tokens, 0)

    def test_near_meanings_are_near(self):
        cat, kitten, bank = (
            item.embedding
            for item in embed(
                ["A cat sleeps on the sofa.", "The kitten naps on a couch.", "Banks raise rates."]
            ).data
        )
        self.assertGreater(dot(cat, kitten), dot(cat, bank) + 0.3)

    def test_another_width_is_refused(self):
        with self.assertRaises(openai.BadRequestError) as caught:
            embed("x", dimensions=128)
        self.assertEqual(caught.exception.param, "dimensions")

    def test_the_generator_embeds_nothing(self):
        with self.assertRaises(openai.NotFoundError):
            server().client().embeddings.create(model="smollm2-135m-instruct", input="x")
