"""Tool calls through the official client: who chooses, streams, results, the parse helper."""

import json
import unittest

import openai
import pydantic
from typing import Literal

from server import server

MODEL = "smollm2-135m-instruct"
QUESTION = [{"role": "user", "content": "Open the red box on shelf 7."}]


class OpenBox(pydantic.BaseModel):
    color: Literal["red", "blue"]
    shelf: int = pydantic.Field(ge=1, le=40)


TOOL = {
    "type": "function",
    "function": {
        "name": "open_box",
        "description": "Opens a box.",
        "parameters": OpenBox.model_json_schema(),
    },
}
NAMED = {"type": "function", "function": {"name": "open_box"}}


def chat(**options):
    options.setdefault("model", MODEL)
    options.setdefault("messages", QUESTION)
    options.setdefault("tools", [TOOL])
    options.setdefault("temperature", 0)
    options.setdefault("max_tokens", 200)
    return server().client().chat.completions.create(**options)


class Calls(unittest.TestCase):
    def test_demanded_calls_are_valid(self):
        for choice in ("required", NAMED):
            with self.subTest(choice=choice):
                answer = chat(tool_choice=choice, parallel_tool_calls=False).choices[0]
                self.assertEqual(answer.finish_reason, "tool_calls")
                self.assertIsNone(answer.message.content)
                (call,) = answer.message.tool_calls
                self.assertEqual((call.type, call.function.name), ("function", "open_box"))
                OpenBox.model_validate_json(call.function.arguments)

    def test_auto_gives_text_or_calls_and_none_gives_text(self):
        for choice in ("auto", "none"):
            message = chat(tool_choice=choice, max_tokens=24).choices[0].message
            if choice == "none" or not message.tool_calls:
                self.assertTrue(message.content)
                self.assertIsNone(message.tool_calls)

    def test_b20_streamed_calls_have_id_index_and_type_first(self):
        whole = chat(tool_choice="required", parallel_tool_calls=False).choices[0]
        deltas, reason = [], None
        for chunk in chat(tool_choice="required", parallel_tool_calls=False, stream=True):
            deltas += chunk.choices[0].delta.tool_calls or []
            reason = chunk.choices[0].finish_reason or reason
        self.assertEqual(reason, "tool_calls")
        first = deltas[0]
        self.assertEqual((first.index, first.type, first.function.name), (0, "function", "open_box"))
        self.assertTrue(first.id.startswith("call_"))
        arguments = "".join(delta.function.arguments or "" for delta in deltas)
        self.assertEqual(arguments, whole.message.tool_calls[0].function.arguments)

    def test_b11_no_call_comes_from_a_cut_object(self):
        for limit in range(1, 33):
            choice = chat(tool_choice=NAMED, max_tokens=limit).choices[0]
            for call in choice.message.tool_calls or []:
                OpenBox.model_validate_json(call.function.arguments)
            if not choice.message.tool_calls:
                self.assertEqual(choice.finish_reason, "length")
                self.assertEqual(choice.model_extra["exrail_finish_reason"], "schema_incomplete")

    def test_results_go_back(self):
        first = chat(tool_choice=NAMED, parallel_tool_calls=False).choices[0].message
        messages = QUESTION + [first.model_dump(exclude_none=True)]
        messages.append({
            "role": "tool", "tool_call_id": first.tool_calls[0].id, "content": "It holds a key.",
        })
        second = chat(messages=messages, tool_choice="none", max_tokens=24)
        self.assertTrue(second.choices[0].message.content)

    def test_parse_helper_gives_checked_arguments(self):
        answer = server().client().chat.completions.parse(
            model=MODEL, messages=QUESTION, tool_choice="required", max_tokens=200, temperature=0,
            tools=[openai.pydantic_function_tool(OpenBox)], parallel_tool_calls=False,
        )
        (call,) = answer.choices[0].message.tool_calls
        self.assertIsInstance(call.function.parsed_arguments, OpenBox)

    def test_the_contract_is_traced(self):
        chat(tool_choice=NAMED, max_tokens=8)
        (contract,) = server().traces()[-1]["structured"]["contracts"]
        self.assertEqual(contract["name"], "open_box")
        self.assertEqual(len(contract["contract_hash"]), 64)


class Refusals(unittest.TestCase):
    def refused(self, param, **options):
        with self.assertRaises(openai.BadRequestError) as caught:
            chat(**options)
        self.assertEqual(caught.exception.param, param)

    def test_what_cannot_be_called_is_named(self):
        self.refused("tool_choice", tool_choice={"type": "function", "function": {"name": "fly"}})
        self.refused("tools", tools=[TOOL, TOOL])
        self.refused("tools[0].function.name", tools=[
            {"type": "function", "function": {"name": "open the box"}}])
        orphan = QUESTION + [{"role": "tool", "tool_call_id": "call_x", "content": "?"}]
        self.refused("messages[1].tool_call_id", messages=orphan)

    def test_another_contract_is_a_conflict(self):
        tool = json.loads(json.dumps(TOOL))
        tool["function"]["contract_hash"] = "0" * 64
        with self.assertRaises(openai.ConflictError) as caught:
            chat(tools=[tool])
        self.assertEqual(caught.exception.code, "contract_mismatch")
