"""Structured answers through the official client: response formats, its parse helpers, our own fields."""

import json
import re
import unittest

import openai
import pydantic
from typing import Literal

from server import server

MODEL = "smollm2-135m-instruct"
QUESTION = [{"role": "user", "content": "Describe a red box with seven keys."}]


class Box(pydantic.BaseModel):
    color: Literal["red", "blue"]
    keys: int = pydantic.Field(ge=0, le=99)
    is_open: bool


def chat(**options):
    options.setdefault("model", MODEL)
    options.setdefault("messages", QUESTION)
    options.setdefault("temperature", 0)
    options.setdefault("max_tokens", 120)
    return server().client().chat.completions.create(**options)


def schema_format(schema):
    return {"type": "json_schema", "json_schema": {"name": "box", "schema": schema, "strict": True}}


class Schemas(unittest.TestCase):
    def test_parse_gives_a_checked_object(self):
        answer = server().client().chat.completions.parse(
            model=MODEL, messages=QUESTION, response_format=Box, max_tokens=120, temperature=0
        )
        self.assertIsInstance(answer.choices[0].message.parsed, Box)
        self.assertEqual(answer.choices[0].finish_reason, "stop")

    def test_b11_parse_of_a_cut_answer_raises(self):
        with self.assertRaises(openai.LengthFinishReasonError):
            server().client().chat.completions.parse(
                model=MODEL, messages=QUESTION, response_format=Box, max_tokens=5
            )

    def test_b9_the_same_schema_in_both_fields_is_the_same_answer(self):
        schema = Box.model_json_schema()
        openai_field = chat(response_format=schema_format(schema))
        native = chat(extra_body={"json_schema": schema})
        text = openai_field.choices[0].message.content
        self.assertEqual(native.choices[0].message.content, text)
        Box.model_validate_json(text)
        hashes = [line["structured"]["schema_hash"] for line in server().traces()[-2:]]
        self.assertEqual(hashes[0], hashes[1])

    def test_any_object(self):
        choice = chat(response_format={"type": "json_object"}, max_tokens=200).choices[0]
        if choice.finish_reason == "stop":
            self.assertIsInstance(json.loads(choice.message.content), dict)
        else:
            self.assertEqual(choice.model_extra["exrail_finish_reason"], "schema_incomplete")

    def test_regex_and_grammar(self):
        dates = chat(extra_body={"regex": r"\d{4}-\d{2}-\d{2}"}, temperature=1.2, seed=3)
        self.assertTrue(re.fullmatch(r"[0-9]{4}-[0-9]{2}-[0-9]{2}", dates.choices[0].message.content))
        grammar = {"type": "lark", "text": 'start: "yes" | "no"'}
        answer = chat(extra_body={"grammar": grammar}, temperature=1.2, seed=3)
        self.assertIn(answer.choices[0].message.content, ("yes", "no"))

    def test_stream_says_what_the_whole_answer_says(self):
        form = schema_format(Box.model_json_schema())
        whole = chat(response_format=form)
        chunks = list(chat(response_format=form, stream=True))
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        self.assertEqual(text, whole.choices[0].message.content)
        self.assertEqual(chunks[-1].choices[0].finish_reason, "stop")

    def test_stream_helper_parses(self):
        with server().client().chat.completions.stream(
            model=MODEL, messages=QUESTION, response_format=Box, max_tokens=120, temperature=0
        ) as stream:
            answer = stream.get_final_completion()
        self.assertIsInstance(answer.choices[0].message.parsed, Box)


class Refusals(unittest.TestCase):
    def refused(self, param, code, **options):
        with self.assertRaises(openai.BadRequestError) as caught:
            chat(**options)
        self.assertEqual((caught.exception.param, caught.exception.code), (param, code))
        return caught.exception.message

    def test_b1_a_bad_pattern_is_named_by_its_pointer(self):
        schema = {"type": "object", "properties": {"a": {"type": "string", "pattern": "[a-z"}}}
        with self.assertRaises(openai.BadRequestError) as caught:
            chat(response_format=schema_format(schema))
        self.assertEqual(caught.exception.param, "response_format.json_schema.schema")
        self.assertIn("pattern", caught.exception.message)

    def test_b3_a_bad_regex_is_refused(self):
        self.refused("regex", "invalid_grammar", extra_body={"regex": "[a-z"})

    def test_b8_two_constraints_and_names_of_others_are_refused(self):
        both = {"regex": "a", "json_schema": {"type": "object"}}
        self.refused("regex", "invalid_value", extra_body=both)
        message = self.refused("guided_json", "unsupported_field", extra_body={"guided_json": {}})
        self.assertIn("json_schema", message)
